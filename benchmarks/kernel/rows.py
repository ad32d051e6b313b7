"""The tables and the plot that are made of the kernel benchmark's figures."""

from pathlib import Path
from typing import Any

from benchmarks.common.report import COLOURS, Figures, drawing
from benchmarks.kernel.counts import PASSES
from gpu_lab import model

PTX = "PTX instructions per logit"
SASS = {
    "shortest": "machine instructions per logit",
    "hot": "machine instructions per logit, every iteration",
    "whole": "machine instructions per logit, whole loop",
}
TIME, FLOOR, BINDING = "modelled time", "modelled memory floor", "modelled binding resource"
MEMORY, OF_FLOOR = "modelled memory time", "modelled time over the floor"
RESOURCES = ("memory", "issue slots", *model.RESOURCES.values())

INSTRUCTION_NOTES = """\
PTX/logit: instructions of threads that the emulator executed, over the logits scored; kernels that
  work per token (dpo_triton's combine) were counted on 512 tokens, and their share at V is in it.
SASS/logit: of the loop's machine code, static: the shortest way round, which is that of every tile
  but the target's; then what every iteration passes and the whole loop: where a branch parts the
  target's tile from the others, the first leaves out both sides and the other has both. A
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
PyTorch: derived, not counted: what PyTorch's own operators on logits or gradients read and write
  (slice_backward: zeros for the whole gradient and a copy into them; copies to make a slice
  contiguous; Liger's multiplication by the upstream gradient)."""
MODEL_NOTES = """\
modelled: nothing here was measured. The largest of bytes over 90 % of the memory's speed, SASS
  issue slots and pipe cycles; PyTorch's own operators after that, by their bytes. Launches, latency
  are in the table of whole times. ms; over the floor, which is the time of the least bytes that
  the pass must move; and which resource binds the kernel."""
STATIC_NOTE = (
    "other targets' machine code is read, not run: bytes are those that the emulator counted for "
)


def instruction_table(rows: Figures) -> str:
    columns = {
        "PTX/logit": (PTX, "{:.2f}"),
        "SASS/logit": (SASS["shortest"], "{:.2f}"),
        "every iteration": (SASS["hot"], "{:.2f}"),
        "whole loop": (SASS["whole"], "{:.2f}"),
        "exp2": ("exp2 per logit", "{:.3f}"),
        "bar": ("barriers in the loop", "{:.0f}"),
        "launches": ("launches", "{:.0f}"),
        "regs": ("registers", "{:.0f}"),
        "spills": ("spills", "{:.0f}"),
        "occ": ("occupancy", "{:.0%}"),
        "wide loads": ("16-byte share of loads", "{:.1%}"),
        "wide stores": ("16-byte share of stores", "{:.1%}"),
    }
    cells = {name: (form, dict(quantity=q)) for name, (q, form) in columns.items()}
    return rows.pivot({"target": "where", "pass": "passes", "implementation": "impl"}, cells)


def bytes_table(rows: Figures) -> str:
    moved = {"load": "loaded", "store": "stored", "PyTorch": "PyTorch's"}
    cells = {
        f"{passes}: {name}": (
            "{:.3f}",
            dict(quantity=f"{kind} bytes per logit", passes=passes),
        )
        for passes in PASSES
        for name, kind in moved.items()
    }
    total = ("{:.3f}", dict(quantity="total bytes per logit"))
    return rows.pivot({"scored": "case", "implementation": "impl"}, {**cells, "total": total})


def model_table(rows: Figures) -> str:
    """Return ms, how often the floor's time, and the resource that binds the kernel."""
    columns = {"ms": (TIME, "{:.3f}"), "of floor": (OF_FLOOR, "{:.2f}x"), "binds": (BINDING, "{}")}
    cells = {name: (form, dict(quantity=quantity)) for name, (quantity, form) in columns.items()}
    headings = {"scored": "case", "pass": "passes", "GPU": "where", "implementation": "impl"}
    return rows.pivot(headings, cells)


def next_resource(rows: Figures, **where: str) -> tuple[str, float]:
    """Return what takes a kernel longest but for what binds it, and its modelled time in ms."""
    binding = rows.value(BINDING, **where)
    times = {name: rows.value(f"{TIME} of {name} in the kernel", **where) for name in RESOURCES}
    others = {name: ms for name, ms in times.items() if ms is not None and name != binding}
    longest = max(others, key=lambda name: float(others[name]))
    return longest, float(others[longest])


HATCHES = ("", "//", "..", "xx")


def plot(path: Path, rows: Figures, machine: str, *, case: str, title: str) -> None:
    """Draw instructions per logit by target, and the modelled time by device over its floor."""
    impls = rows.column("impl")
    counted = rows.select(PTX)
    groups = [(p, t) for t in counted.column("where") for p in counted.column("passes")]
    devices = rows.select(TIME).column("where")

    def of_both(quantity: str, **key: str) -> float:
        return sum(rows.value(quantity, passes=p, case=case, **key) or 0.0 for p in PASSES)

    with drawing(path, title, num_axes=2, figsize=(13, 5.2)) as axes:
        width = 0.8 / len(impls)
        for i, impl in enumerate(impls):
            style: dict[str, Any] = dict(
                width=width,
                color=COLOURS[i % 4],
                hatch=HATCHES[i % 4],
                edgecolor="white",
                label=impl,
            )
            shift = (i - (len(impls) - 1) / 2) * width
            heights = [rows.value(PTX, impl=impl, passes=p, where=t) or 0.0 for p, t in groups]
            times = [of_both(TIME, impl=impl, where=device) for device in devices]
            for axis, values, form in zip(axes, (heights, times), ("%.1f", "%.2f"), strict=True):
                bars = axis.bar([x + shift for x in range(len(values))], values, **style)
                axis.bar_label(bars, fmt=form, fontsize=8)
        for x, device in enumerate(devices):
            floor = of_both(FLOOR, where=device, impl=impls[0])
            label = "modelled memory floor" if x == 0 else None
            axes[1].plot([x - 0.45, x + 0.45], [floor, floor], "k--", linewidth=1.5, label=label)
        axes[0].set_xticks(range(len(groups)), [f"{passes}\n{target}" for passes, target in groups])
        axes[0].set(ylabel="PTX instructions per logit", title="instructions per logit, counted")
        axes[1].set_xticks(range(len(devices)), devices)
        modelled = f"modelled time, forward + backward; scored: {case}"
        axes[1].set(ylabel="modelled ms", title=modelled)
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", alpha=0.3)
            axis.set_axisbelow(True)
            axis.margins(y=0.2)
