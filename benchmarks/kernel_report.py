"""The kernel benchmark's rows, and the tables, the CSV file and the plot that are made of them."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_lab import model

Value = float | str
PASSES = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class Row:
    impl: str
    passes: str  # "forward", "backward", "forward+backward"
    where: str  # a target or a device
    case: str  # rows scored, and whether the next token is
    quantity: str
    unit: str
    value: Value
    how: str  # "counted" by the emulator, "static" in the machine code, "derived", "modelled"


class Rows(list[Row]):
    """Rows that can be looked up."""

    def value(self, quantity: str, **where: str) -> Any:
        """Return the value of the first row that fits, or None."""
        for row in self:
            if row.quantity == quantity and all(getattr(row, k) == v for k, v in where.items()):
                return row.value
        return None

    def column(self, name: str) -> list[str]:
        """Return what a column holds, each value once."""
        return list(dict.fromkeys(getattr(row, name) for row in self))


PTX = "PTX instructions per logit"
SASS = {
    "shortest": "machine instructions per logit",
    "hot": "machine instructions per logit, every iteration",
    "whole": "machine instructions per logit, whole loop",
}
TIME, FLOOR, BINDING = "modelled time", "modelled memory floor", "modelled binding resource"
MEMORY = "modelled memory time"
RESOURCES = ("memory", "issue slots", *model.RESOURCES.values())

INSTRUCTION_NOTES = """\
PTX/logit: instructions of threads that the emulator executed, over the logits scored; kernels that
  work per token (dpo_triton's combine) were counted on 512 tokens, and their share at V is in it.
SASS/logit: of the loop's machine code, static: the shortest way round, which is that of every tile
  but the target's; in brackets what every iteration passes and the whole loop: where a branch parts
  the target's tile from the others, the first leaves out both sides and the other has both. A
  kernel without a loop counts whole. PTX holds moves and address arithmetic that the assembler
  removes, and not what it adds: SASS is what the hardware issues.
exp2: executed, per logit. bar: barriers in the loop. launches: of Triton kernels in the pass. regs:
  a thread's. occ: share of the warps resident. wide: share of the bytes moved by 16-byte accesses.
backward: a training step less a forward without gradients. Liger's gradient kernel also repeats the
  forward: of its two loops the larger one, which stores the gradient, stands under SASS."""
BYTES_NOTES = """\
Over all logits, scored or not; what threads that run together read at one address counts once.
scored: the last rows of each sequence. shift: the next token is scored: dpo_triton takes
  shift=True, the peers logits[:, :-1].
  A slice lacks a row of each sequence, so slice_backward's 6 bytes are a little less here.
PyTorch: of both passes; derived, not counted: what PyTorch's own operators on logits or gradients
  read and write (slice_backward: zeros for the whole gradient and a copy into them; copies to make
  a slice contiguous; Liger's multiplication by the upstream gradient)."""
MODEL_NOTES = """\
modelled: nothing here was measured. The largest of bytes over 90 % of the memory's speed, SASS
  issue slots and pipe cycles; PyTorch's own operators after that, by their bytes. Launches, latency
  and tails are left out. Each cell: ms; over the floor, which is the time of the least bytes that
  the pass must move; and which resource binds the kernel."""
STATIC_NOTE = (
    "MI300X: its machine code is read, not run: bytes are those that the emulator counted for "
)


def aligned(lines: Sequence[Sequence[str]], num_left: int) -> str:
    """Return cells as text in columns, the first num_left of them to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < num_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def instruction_table(rows: Rows) -> str:
    lines = [
        ("implementation", "pass", "target", "PTX/logit", "SASS/logit", "exp2", "bar", "launches")
        + ("regs", "spills", "occ", "wide loads", "wide stores")
    ]
    chosen = Rows(row for row in rows if row.quantity in (PTX, *SASS.values()))
    for target in chosen.column("where"):
        for passes in chosen.column("passes"):
            for impl in chosen.column("impl"):
                key = dict(impl=impl, passes=passes, where=target)
                if rows.value("registers", **key) is None:
                    continue
                sass = {way: _text(rows.value(name, **key), "{:.2f}") for way, name in SASS.items()}
                lines.append(
                    (
                        impl,
                        passes,
                        target,
                        _text(rows.value(PTX, **key), "{:.2f}"),
                        f"{sass['shortest']} ({sass['hot']} - {sass['whole']})",
                        _text(rows.value("exp2 per logit", **key), "{:.3f}"),
                        _text(rows.value("barriers in the loop", **key), "{:.0f}"),
                        _text(rows.value("launches", **key), "{:.0f}"),
                        _text(rows.value("registers", **key), "{:.0f}"),
                        _text(rows.value("spills", **key), "{:.0f}"),
                        _text(rows.value("occupancy", **key), "{:.0%}"),
                        _text(rows.value("16-byte share of loads", **key), "{:.1%}"),
                        _text(rows.value("16-byte share of stores", **key), "{:.1%}"),
                    )
                )
    return aligned(lines, 3)


def bytes_table(rows: Rows) -> str:
    lines = [
        ("implementation", "scored", "forward", "backward: load", "store", "PyTorch", "total"),
    ]
    chosen = Rows(row for row in rows if row.quantity == "total bytes per logit")
    for case in chosen.column("case"):
        for impl in chosen.column("impl"):
            key = dict(impl=impl, case=case)
            forward, backward = (dict(key, passes=p) for p in ("forward", "backward"))
            torch_bytes = [
                rows.value("PyTorch's bytes per logit", **k) or 0.0 for k in (forward, backward)
            ]
            loaded, stored = (
                [rows.value(f"{kind} bytes per logit", **k) or 0.0 for k in (forward, backward)]
                for kind in ("loaded", "stored")
            )
            lines.append(
                (impl, case, f"{loaded[0] + stored[0]:.3f}", f"{loaded[1]:.3f}")
                + (f"{stored[1]:.3f}", f"{sum(torch_bytes):.3f}")
                + (f"{rows.value('total bytes per logit', **key):.3f}",)
            )
    return aligned(lines, 2)


def model_table(rows: Rows) -> str:
    """Return for each device ms, how often the floor's time, and the kernel's binding resource."""
    chosen = Rows(row for row in rows if row.quantity == TIME)
    devices = chosen.column("where")
    lines = [["implementation", "scored", "pass", *(f"modelled on {name}" for name in devices)]]
    for case in chosen.column("case"):
        for passes in chosen.column("passes"):
            for impl in chosen.column("impl"):
                cells = []
                for device in devices:
                    key = dict(impl=impl, case=case, passes=passes, where=device)
                    ms, floor = chosen.value(TIME, **key), rows.value(FLOOR, **key)
                    binding = rows.value(BINDING, **key)
                    cells.append("" if ms is None else f"{ms:.3f}  {ms / floor:.2f}x  {binding}")
                lines.append([impl, case, passes, *cells])
    return aligned(lines, 3 + len(devices))


def next_resource(rows: Rows, **where: str) -> tuple[str, float]:
    """Return what takes a kernel longest but for what binds it, and its modelled time in ms."""
    binding = rows.value(BINDING, **where)
    times = {name: rows.value(f"{TIME} of {name} in the kernel", **where) for name in RESOURCES}
    others = {name: ms for name, ms in times.items() if ms is not None and name != binding}
    longest = max(others, key=lambda name: float(others[name]))
    return longest, float(others[longest])


def _text(value: Any, form: str) -> str:
    return "" if value is None else form.format(value)


COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")  # Okabe and Ito's: told apart by everybody
HATCHES = ("", "//", "..", "xx")


def plot(path: Path, rows: Rows, case: str, title: str) -> None:
    """Draw instructions per logit by target, and the modelled time by device over its floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    impls = rows.column("impl")
    counted = Rows(row for row in rows if row.quantity == PTX)
    groups = [(p, t) for t in counted.column("where") for p in counted.column("passes")]
    devices = Rows(row for row in rows if row.quantity == TIME).column("where")
    width = 0.8 / len(impls)
    for i, impl in enumerate(impls):
        style: dict[str, Any] = dict(
            width=width, color=COLOURS[i % 4], hatch=HATCHES[i % 4], edgecolor="white", label=impl
        )
        shift = (i - (len(impls) - 1) / 2) * width
        heights = [rows.value(PTX, impl=impl, passes=p, where=t) or 0.0 for p, t in groups]
        bars = axes[0].bar([x + shift for x in range(len(groups))], heights, **style)
        axes[0].bar_label(bars, fmt="%.1f", fontsize=8)
        times = [
            sum(rows.value(TIME, impl=impl, passes=p, where=d, case=case) or 0.0 for p in PASSES)
            for d in devices
        ]
        bars = axes[1].bar([x + shift for x in range(len(devices))], times, **style)
        axes[1].bar_label(bars, fmt="%.2f", fontsize=8)
    for x, device in enumerate(devices):
        floor = sum(rows.value(FLOOR, passes=p, where=device, case=case) or 0.0 for p in PASSES)
        label = "modelled memory floor" if x == 0 else None
        axes[1].plot([x - 0.45, x + 0.45], [floor, floor], "k--", linewidth=1.5, label=label)
    axes[0].set_xticks(range(len(groups)), [f"{passes}\n{target}" for passes, target in groups])
    axes[0].set(ylabel="PTX instructions per logit", title="instructions per logit, counted")
    axes[1].set_xticks(range(len(devices)), devices)
    axes[1].set(ylabel="modelled ms", title=f"modelled time, forward + backward; scored: {case}")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.margins(y=0.2)
        axis.legend(ncols=len(impls) + 1, fontsize=9, loc="upper center")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(os.fspath(path), dpi=110)
    plt.close(figure)
