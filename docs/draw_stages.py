"""Draw stages.svg and tiles.svg, of stages.md: `python docs/draw_stages.py`."""

import argparse
from pathlib import Path

BLUE, ORANGE, GREY, WHITE, DARK = "#9ecae1", "#fdae6b", "#e5e5e5", "#ffffff", "#222222"


class Drawing:
    """SVG elements in the order of drawing, on white: it is read on dark pages too."""

    def __init__(self, width: int, height: int) -> None:
        self.elements = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="sans-serif" font-size="13">',
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{DARK}"/></marker>'
            "</defs>",
            f'<rect width="{width}" height="{height}" fill="{WHITE}"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, fill: str = WHITE) -> None:
        self.elements.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" '
            f'stroke="{DARK}" stroke-width="0.8"/>'
        )

    def text(
        self, x: float, y: float, text: str, *, anchor: str = "start", style: str = ""
    ) -> None:
        self.elements.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{DARK}" {style}>{text}</text>'
        )

    def middle(self, x: float, y: float, text: str) -> None:
        self.text(x, y, text, anchor="middle")

    def title(self, x: float, y: float, text: str) -> None:
        self.text(x, y, text, style='font-weight="bold" font-size="15"')

    def arrow(self, *points: tuple[float, float]) -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.elements.append(
            f'<polyline points="{path}" fill="none" stroke="{DARK}" stroke-width="1.4" '
            'marker-end="url(#head)"/>'
        )

    def write(self, path: Path) -> None:
        path.write_text("\n".join([*self.elements, "</svg>"]) + "\n")


ROW = 24
SPLITS = (130, 130, 80)  # widths: two whole splits, and the rest of the vocabulary
ROWS = (None, None, 40, 290, 150, 205)  # where a token's target is; None: not scored


def matrix(d: Drawing, x: float, y: float, fill: str, unscored: str) -> None:
    """Rows of logits, or of their gradient, with the targets."""
    for n, target in enumerate(ROWS):
        top, left = y + n * ROW, x
        if target is None:
            d.box(x, top, sum(SPLITS), ROW, GREY)
            d.middle(x + sum(SPLITS) / 2, top + 17, unscored)
            continue
        for width in SPLITS:
            d.box(left, top, width, ROW, fill)
            left += width
        d.box(x + target, top, 9, ROW, ORANGE)


def stages() -> Drawing:
    d = Drawing(980, 480)
    x, y = 30.0, 80.0
    d.title(x, 28, "logits: a row a token, V columns")
    for left, name in ((0, "split 0: 16384"), (130, "split 1: 16384"), (260, "the rest")):
        d.text(x + left + 6, y - 10, name)
    matrix(d, x, y, BLUE, "not scored: not read")
    d.box(x, 238, 9, 12, ORANGE)
    d.text(x + 16, 249, "the target, which stays out of the sums")

    x = 480
    d.arrow((378, 152), (x - 10, 152))
    d.middle(424, 142, "1 partials")
    d.title(x, 28, "partials")
    d.text(x, 46, "a pair for each split: peak, total;")
    d.text(x, 62, "and the target's logit")
    for n, target in enumerate(ROWS):
        for k in range(len(SPLITS) + 1):
            fill = GREY if target is None else ORANGE if k == len(SPLITS) else BLUE
            d.box(x + 38 * k + 8 * (k == len(SPLITS)), y + n * ROW, 38, ROW, fill)

    x = 760
    d.arrow((646, 152), (x - 10, 152))
    d.middle(698, 142, "2 combine")
    d.middle(698, 172, "in order,")
    d.middle(698, 188, "in float64")
    d.title(x, 28, "log-probabilities")
    for n, target in enumerate(ROWS):
        d.box(x, y + n * ROW, 70, ROW, GREY if target is None else WHITE)
        d.middle(x + 35, y + n * ROW + 17, "0" if target is None else f"logp[{n}]")
    d.arrow((x + 72, 152), (880, 152))
    d.box(882, 138, 76, 28)
    d.middle(920, 157, "value[s]")
    d.text(850, 190, "weighted sum,")
    d.text(850, 206, "or mean")

    x, y = 30.0, 320.0
    d.title(x, y - 14, "gradient of the logits")
    matrix(d, x, y, BLUE, "0")
    d.arrow((20, 152), (10, 152), (10, 392), (26, 392))
    d.arrow((795, 228), (795, 392), (378, 392))
    d.text(420, 382, "3 grad, from a token's complement, reference and share")
    d.text(420, 412, "upstream gradient * weight * slope, times")
    d.text(420, 430, "complement = 1 - p at the target, and elsewhere")
    d.text(420, 448, "-p = -share * 2^(z / ln 2 - reference)")
    return d


def tiles() -> Drawing:
    d = Drawing(980, 560)
    x, y = 190.0, 110.0
    widths = (150, 150, 150, 90)
    heights = (64, 64, 34)
    d.title(20, 28, "The head in tiles: one row of partials for each tile of columns")
    d.text(x, 62, "weight (V, H), 4096 rows a tile, each read once")
    left = x
    for width in widths:
        d.box(left, y - 36, width, 26, ORANGE)
        left += width
    d.text(20, y - 14, "scored rows of")
    d.text(20, y + 2, "hidden (M, H)")
    number, top = 0, y
    for height in heights:
        d.box(x - 50, top, 40, height, ORANGE)
        top += height
    left = x
    for column, width in enumerate(widths):
        top = y
        for height in heights:
            number += 1
            d.box(left, top, width, height, BLUE if number > 9 else WHITE)
            d.middle(left + width / 2, top + height / 2 + 5, str(number))
            top += height
        d.arrow((left + width / 2, top + 4), (left + width / 2, top + 40))
        d.box(left, top + 42, width, 26, BLUE)
        d.middle(left + width / 2, top + 59, f"pair {column}")
        left += width
    d.text(left + 14, y + 20, "tiles in this order: columns")
    d.text(left + 14, y + 37, "outside, rows inside")
    d.box(left + 14, y + 56, 14, 14, BLUE)
    d.text(left + 36, y + 68, "kept for the backward pass;")
    d.text(left + 36, y + 85, "the others are made again")
    d.text(20, y + 221, "partials of a token")
    d.arrow((left + 4, y + 217), (left + 60, y + 217))
    d.text(left + 66, y + 222, "combine")

    y = 430.0
    d.title(20, y - 28, "A sharded vocabulary: a rank is only more splits")
    left = x
    for rank, width in enumerate((widths[0] + widths[1], widths[2], widths[3])):
        d.box(left + 4, y - 12, width - 8, 26, GREY)
        d.middle(left + width / 2, y + 5, f"rank {rank}")
        d.arrow((left + width / 2, y + 16), (left + width / 2, y + 46))
        left += width
    left = x
    for column, width in enumerate(widths):
        d.box(left, y + 48, width, 26, BLUE)
        d.middle(left + width / 2, y + 65, f"pair {column}")
        left += width
    d.text(20, y + 65, "gathered, in rank order")
    d.arrow((left + 4, y + 61), (left + 60, y + 61))
    d.text(left + 66, y + 66, "the same combine, on each")
    d.text(
        x,
        y + 100,
        "A pair is 8 bytes. The gradient of a rank's logits needs nothing from another rank.",
    )
    return d


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write")
    out = parser.parse_args().out
    stages().write(out / "stages.svg")
    tiles().write(out / "tiles.svg")
