"""Tables, CSV files and figures made of rows."""

import contextlib
import csv
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FORWARD = "forward"
BACKWARD = "backward"
BOTH = "forward+backward"


def shown(heading: str, form: str = "{}", otherwise: str = "n/a") -> Any:
    """A field of a row that is a column of the table too.

    Args:
        form: how a value is written; `otherwise` stands where there is none.
    """
    return dataclasses.field(metadata=dict(heading=heading, form=form, otherwise=otherwise))


def table(*cases: Iterable[Any]) -> str:
    """Return rows of one dataclass as aligned text, words before numbers, a blank line between
    cases."""
    filled = [list(case) for case in cases]
    first = next(row for case in filled for row in case)
    fields = [field for field in dataclasses.fields(first) if field.metadata]
    words = [field for field in fields if isinstance(getattr(first, field.name), str)]
    fields = words + [field for field in fields if field not in words]
    lines = [[str(field.metadata["heading"]) for field in fields]]
    for case in filled:
        lines += [[""] * len(fields)] if len(cases) > 1 else []
        lines += [[_cell(row, field) for field in fields] for row in case]
    return aligned(lines, len(words))


def _cell(row: Any, field: "dataclasses.Field[Any]") -> str:
    value = getattr(row, field.name)
    if value is None:
        return str(field.metadata["otherwise"])
    return str(field.metadata["form"].format(value))


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

    def pivot(self, headings: Mapping[str, str], columns: Mapping[str, "Cell"]) -> str:
        """Return a table: a line for all figures that share what stands to the left.

        Args:
            headings: what stands there -> the field of a figure; lines are in its order of values.
            columns: heading -> which figure of a line, and how it is written; else nothing is.
        """
        lines: dict[tuple[str, ...], list[str]] = {}
        for i, (form, where) in enumerate(columns.values()):
            for f in self:
                if all(getattr(f, k) == v for k, v in where.items()):
                    key = tuple(getattr(f, name) for name in headings.values())
                    cells = lines.setdefault(key, [""] * len(columns))
                    cells[i] = cells[i] or form.format(f.value)
        order = [self.column(name).index for name in headings.values()]
        keys = sorted(
            lines, key=lambda key: [at(cell) for at, cell in zip(order, key, strict=True)]
        )
        body = [[*key, *lines[key]] for key in keys]
        return aligned([[*headings, *columns], *body], len(headings))


Cell = tuple[str, dict[str, str]]  # a form, and the fields of a figure
Table = tuple[Mapping[str, str], Mapping[str, Cell]]  # what `Figures.pivot` takes


def figures(
    impl: str,
    passes: str,
    where: str,
    case: str,
    how: str,
    values: Mapping[str, tuple[str, float | str]],
) -> Figures:
    """A figure of each quantity -> (unit, value)."""
    return Figures(
        Figure(impl, passes, where, case, quantity, unit, value, how)
        for quantity, (unit, value) in values.items()
    )


def file_stem(machine: str) -> str:
    """Return the name of a machine as files carry it."""
    return re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")


def write_csv(path: Path, rows: Sequence[Any], run: Mapping[str, object]) -> None:
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
HATCHES = ("", "//", "..", "xx")
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")  # Okabe and Ito's: told apart by everybody
Line = Sequence[tuple[float, float]]


@contextlib.contextmanager
def drawing(path: Path, title: str, *, num_axes: int = 1, **options: Any) -> Iterator[Any]:
    """Yield matplotlib's figure and an array of axes side by side, and save it as a PNG file.

    The legend of all axes is below them, each name once.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, num_axes, layout="constrained", squeeze=False, **options)
    yield axes[0]
    legends = [axis.get_legend_handles_labels() for axis in axes[0] if axis.get_legend() is None]
    handles = {name: handle for pair in legends for handle, name in zip(*pair, strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_lines(
    axes: Iterable[Any],
    panels: Mapping[str, Mapping[str, Line]],
    label: str,
    ticks: Mapping[float, str] | None = None,
    **tick_options: Any,
) -> None:
    """Draw lines over logarithmic axes; points at or below 0 are left out.

    Args:
        panels: what stands beside an axis -> name of a line -> its points.
        ticks: numbers below, and how they are written; by default 1, 2, 5, 10, ...
    """
    from matplotlib.ticker import LogLocator, NullLocator

    for axis, (unit, lines) in zip(axes, panels.items(), strict=True):
        for i, (name, points) in enumerate(lines.items()):
            kept = sorted(point for point in points if point[1] > 0)
            marker = MARKERS[i % len(MARKERS)]
            axis.plot([x for x, _ in kept], [y for _, y in kept], marker=marker, label=name)
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel=unit)
        if ticks is None:
            axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.xaxis.set_major_formatter("{x:g}")
        else:
            axis.set_xticks(list(ticks), list(ticks.values()), **tick_options)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3, which="both")


def draw_bars(
    path: Path, title: str, names: Sequence[str], parts: Mapping[str, Sequence[float]], label: str
) -> None:
    """Draw a bar for each name, made of its parts."""
    left = [0.0] * len(names)
    with drawing(path, title, figsize=(10, 5)) as (axis,):
        for i, (part, widths) in enumerate(parts.items()):
            colour = COLOURS[i] if i < len(COLOURS) else f"C{i}"
            axis.barh(names, widths, left=left, label=part, color=colour)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.invert_yaxis()
        axis.set_xlabel(label)


def draw_groups(
    axis: Any, groups: Mapping[str, Sequence[float]], names: Sequence[str], label: str, form: str
) -> None:
    """Draw a group of upright bars for each name of one, a bar for each of names, and its height
    above it in C's form."""
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        style = dict(color=COLOURS[i % 4], hatch=HATCHES[i % 4], edgecolor="white", label=name)
        shift = (i - (len(names) - 1) / 2) * width
        heights = [values[i] for values in groups.values()]
        bars = axis.bar([x + shift for x in range(len(groups))], heights, width=width, **style)
        axis.bar_label(bars, fmt=form, fontsize=8)
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set_ylabel(label)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.margins(y=0.2)
