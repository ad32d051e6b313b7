"""Tables, CSV files and figures made of rows."""

import contextlib
import csv
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FORWARD = "forward"
BACKWARD = "forward+backward"


class Columns(dict[str, Callable[[Any], str]]):
    """Heading -> what a row's cell says; the first `num_left` columns stand to the left."""

    def __init__(self, num_left: int, cells: Mapping[str, Callable[[Any], str]]) -> None:
        super().__init__(cells)
        self.num_left = num_left

    def table(self, rows: Iterable[Any], case: Callable[[Any], object] = lambda row: None) -> str:
        """Return rows as aligned text, a blank line between cases."""
        lines: list[list[str]] = [list(self)]
        previous = None
        for row in rows:
            if case(row) != previous:
                lines.append([""] * len(self))
                previous = case(row)
            lines.append([cell(row) for cell in self.values()])
        return aligned(lines, self.num_left)


def optional(form: str, value: Any, otherwise: str = "n/a") -> str:
    """A number by its form, or what stands where there is none."""
    return otherwise if value is None else form.format(value)


def aligned(lines: Sequence[Sequence[str]], num_left: int) -> str:
    """Return lines of as many cells as text in columns, the first num_left of them to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < num_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


@dataclasses.dataclass(frozen=True)
class Figure:
    """One number of a run, where each row of a file has another quantity."""

    impl: str
    passes: str  # "forward", "backward", "forward+backward"
    where: str  # a target or a device
    case: str  # rows scored, and whether the next token is; or a shape
    quantity: str
    unit: str
    value: float | str
    how: str  # "counted" by the emulator, "static" in the machine code, "derived", "modelled", ...


class Figures(list[Figure]):
    """Figures that can be looked up."""

    def value(self, quantity: str, **where: str) -> Any:
        """Return the value of the first figure that fits, or None."""
        return next((f.value for f in self.select(quantity, **where)), None)

    def select(self, quantity: str, **where: str) -> "Figures":
        return Figures(
            f
            for f in self
            if f.quantity == quantity and all(getattr(f, k) == v for k, v in where.items())
        )

    def column(self, name: str) -> list[str]:
        """Return what a column holds, each value once."""
        return list(dict.fromkeys(getattr(figure, name) for figure in self))


def file_stem(machine: str) -> str:
    """Return the name of a machine as files carry it."""
    return re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")


def write_csv(path: Path, rows: Sequence[Any], run: Mapping[str, str | int | float]) -> None:
    """Write rows of a dataclass, and beside each what the whole run shares: versions, command."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [field.name for field in dataclasses.fields(rows[0])]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *run], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            cells = dataclasses.asdict(row) | dict(run)
            writer.writerow(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in cells.items()}
            )


MARKERS = "osD^vPX*"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")  # Okabe and Ito's: told apart by everybody


@contextlib.contextmanager
def drawing(path: Path, title: str, *, num_axes: int = 1, **options: Any) -> Iterator[Any]:
    """Yield matplotlib's figure and an array of axes side by side, and save it as a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, num_axes, layout="constrained", squeeze=False, **options)
    yield figure, axes[0]
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def log_axes(axes: Iterable[Any], ticks: Sequence[int], label: str, **tick_options: Any) -> None:
    """Make both scales logarithmic, with these numbers below."""
    from matplotlib.ticker import NullLocator

    for axis in axes:
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.set_xticks(ticks, [str(tick) for tick in ticks], **tick_options)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3, which="both")
