"""The tables and the plot that are made of the kernel benchmark's figures."""

from pathlib import Path

from benchmarks.common.report import BOTH, FORWARD, Figures, Table, draw_groups, drawing
from benchmarks.kernel.cases import PASSES
from gpu_lab.model import LAUNCH_SECONDS

PTX = "PTX instructions per logit"
SASS = {
    "shortest": "machine instructions per logit",
    "hot": "machine instructions per logit, every iteration",
    "whole": "machine instructions per logit, whole loop",
}
TIME, FLOOR, BINDING = "modelled time", "modelled memory floor", "modelled binding resource"
MEMORY, OF_FLOOR = "modelled memory time", "modelled time over the floor"
STREAMING, SHORT = "modelled streaming kernels", "modelled short kernels"
OPERATORS, WHOLE = "modelled PyTorch's operators", "modelled whole time"
COPY_SHARE = "share of a copy's speed"
IN_GRAPH = "time in a CUDA graph"  # replayed: the host has no part in it

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


WHOLE_NOTES = f"""\
modelled: nothing here was measured. us of a call: whole = streaming + short kernels + PyTorch's
  operators, each launch {1e6 * LAUNCH_SECONDS:.1f} us. short: kernels per token, with their blocks,
  float64 and chains of dependent instructions. A card that waits for the host takes the host's time
  instead: see bench_host. A peer that is not installed is left out."""

INSTRUCTIONS: Table = (
    {"target": "where", "pass": "passes", "implementation": "impl"},
    {
        "PTX/logit": ("{:.2f}", dict(quantity=PTX)),
        "SASS/logit": ("{:.2f}", dict(quantity=SASS["shortest"])),
        "every iteration": ("{:.2f}", dict(quantity=SASS["hot"])),
        "whole loop": ("{:.2f}", dict(quantity=SASS["whole"])),
        "exp2": ("{:.3f}", dict(quantity="exp2 per logit")),
        "bar": ("{:.0f}", dict(quantity="barriers in the loop")),
        "launches": ("{:.0f}", dict(quantity="launches")),
        "regs": ("{:.0f}", dict(quantity="registers")),
        "spills": ("{:.0f}", dict(quantity="spills")),
        "occ": ("{:.0%}", dict(quantity="occupancy")),
        "wide loads": ("{:.1%}", dict(quantity="16-byte share of loads")),
        "wide stores": ("{:.1%}", dict(quantity="16-byte share of stores")),
    },
)
BYTES: Table = (
    {"scored": "case", "implementation": "impl"},
    {
        **{
            f"{passes}: {name}": ("{:.3f}", dict(quantity=f"{kind} bytes per logit", passes=passes))
            for passes in PASSES
            for name, kind in dict(load="loaded", store="stored", PyTorch="PyTorch's").items()
        },
        "total": ("{:.3f}", dict(quantity="total bytes per logit")),
    },
)
MODELLED: Table = (
    {"scored": "case", "pass": "passes", "GPU": "where", "implementation": "impl"},
    {
        "ms": ("{:.3f}", dict(quantity=TIME)),
        "of floor": ("{:.2f}x", dict(quantity=OF_FLOOR)),
        "binds": ("{}", dict(quantity=BINDING)),
    },
)
WHOLE_CALLS: Table = (
    {"case": "case", "GPU": "where", "implementation": "impl"},
    {
        "forward us": ("{:.1f}", dict(quantity=WHOLE, passes=FORWARD)),
        "streaming": ("{:.1f}", dict(quantity=STREAMING, passes=FORWARD)),
        "short": ("{:.1f}", dict(quantity=SHORT, passes=FORWARD)),
        "operators": ("{:.1f}", dict(quantity=OPERATORS, passes=FORWARD)),
        f"{BOTH} us": ("{:.1f}", dict(quantity=WHOLE, passes=BOTH)),
    },
)
MEASURED: Table = (
    {"implementation": "impl", "scored": "case", "pass": "passes"},
    {
        "ms": ("{:.4f}", dict(quantity="time")),
        "p20": ("{:.4f}", dict(quantity="time, p20")),
        "p80": ("{:.4f}", dict(quantity="time, p80")),
        "GB/s": ("{:.0f}", dict(quantity="least bytes over time")),
        "of copy": ("{:.1%}", dict(quantity=COPY_SHARE)),
        "ms in a CUDA graph": ("{:.4f}", dict(quantity=IN_GRAPH)),
    },
)


def plot(path: Path, rows: Figures, machine: str, *, case: str, title: str) -> None:
    """Draw instructions per logit by target, and the modelled time by device over its floor."""
    impls = rows.column("impl")
    targets, devices = rows.select(PTX).column("where"), rows.select(TIME).column("where")

    def of_both(quantity: str, impl: str, device: str) -> float:
        key = dict(impl=impl, where=device, case=case)
        return sum(rows.value(quantity, passes=passes, **key) or 0.0 for passes in PASSES)

    counted = {
        f"{passes}\n{target}": [
            rows.value(PTX, impl=impl, passes=passes, where=target) or 0.0 for impl in impls
        ]
        for target in targets
        for passes in PASSES
    }
    times = {device: [of_both(TIME, impl, device) for impl in impls] for device in devices}
    with drawing(path, title, num_axes=2, figsize=(17, 5.2), width_ratios=(2, 3)) as (left, right):
        draw_groups(left, counted, impls, "PTX instructions per logit", "%.1f")
        left.set_title("instructions per logit, counted")
        draw_groups(right, times, impls, "modelled ms", "%.2f")
        right.set_title(f"modelled time, forward + backward; scored: {case}")
        for x, device in enumerate(devices):
            floor = of_both(FLOOR, impls[0], device)
            label = "modelled memory floor" if x == 0 else None
            right.plot([x - 0.45, x + 0.45], [floor, floor], "k--", linewidth=1.5, label=label)
