"""What was measured, as rows; the table, the CSV file and the plot that are made of them."""

import csv
import dataclasses
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

FORWARD = "forward"
BACKWARD = "forward+backward"


@dataclasses.dataclass(frozen=True)
class Row:
    """One implementation on one batch of logits, (batch, seq_len, vocab_size), the same for all."""

    impl: str
    vocab_size: int
    batch: int
    seq_len: int
    dtype: str
    scored_share: float  # of the rows; the first part of each sequence, the prompt, is not scored
    passes: str  # FORWARD, without autograd, or BACKWARD, which is both
    ms: float  # median
    ms_p20: float
    ms_p80: float
    samples: int
    glogits_per_s: float  # over all logits, scored or not
    copy_share: float  # least traffic over time, as a part of the machine's copy speed
    peak_mib: float | None  # above the inputs, with the result and the gradient; None: not known
    value_error: float  # largest against float64, nats
    value_rounding: float  # half a unit in the last place of the largest value, in float32
    grad_error: float | None  # largest against float64, relative to the largest element
    grad_rounding: float  # half a unit in the last place of that element, in dtype, likewise
    speedup: float | None  # log_softmax's time over this one's

    @property
    def num_logits(self) -> int:
        return self.batch * self.seq_len * self.vocab_size


def least_bytes(num_logits: int, num_scored: int, itemsize: int, passes: str) -> int:
    """Bytes that have to move: a pass reads scored logits once, the gradient is written whole."""
    if passes == FORWARD:
        return itemsize * num_scored
    return itemsize * (2 * num_scored + num_logits)


HEADINGS = (
    "implementation",
    "dtype",
    "scored",
    "pass",
    "ms",
    "p20 - p80",
    "G logits/s",
    "of copy",
    "peak MiB",
    "value error",
    "grad error",
    "speed-up",
)
LEFT_ALIGNED = (0, 1, 3)
NOTES = """\
ms: median. G logits/s: all logits, scored or not. of copy: the least traffic that the pass can have
  over its time, as a part of the speed at which this machine copies.
  On a CPU buffers of 8 MiB or more are fresh pages in each call, as for batches of everyday size.
peak MiB: above the inputs, with result and gradient. On a CPU it is the resident size: dpo_triton
  does not touch a gradient's pages of rows that are not scored, and those do not count.
value error, grad error: largest against float64, in nats; and relative to the largest element.
speed-up: over log_softmax in the same case."""


def table(rows: Iterable[Row]) -> str:
    """Return rows as aligned text, a blank line before each case."""
    lines: list[tuple[str, ...]] = [HEADINGS]
    previous: tuple[object, ...] | None = None
    for row in rows:
        case = (row.vocab_size, row.dtype, row.scored_share, row.passes)
        if case != previous:
            lines.append(("",) * len(HEADINGS))
        previous = case
        lines.append(
            (
                row.impl,
                row.dtype,
                f"{row.scored_share:.0%}",
                row.passes,
                f"{row.ms:.2f}",
                f"{row.ms_p20:.2f} - {row.ms_p80:.2f}",
                f"{row.glogits_per_s:.3f}",
                f"{row.copy_share:.1%}",
                "n/a" if row.peak_mib is None else f"{row.peak_mib:.1f}",
                f"{row.value_error:.1e}",
                "" if row.grad_error is None else f"{row.grad_error:.1e}",
                "n/a" if row.speedup is None else f"{row.speedup:.2f}x",
            )
        )
    return aligned(lines, LEFT_ALIGNED)


def aligned(lines: Sequence[Sequence[str]], left_aligned: Collection[int]) -> str:
    """Return lines of as many cells as text, the columns of those numbers to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        (
            cell.ljust(width) if i in left_aligned else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


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


def plot(path: Path, rows: list[Row], machine: str) -> None:
    """Draw time and peak memory of forward + backward over the vocabulary, a line a peer.

    Of the dtypes and shares that were measured it shows the first.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullLocator

    dtype, share = rows[0].dtype, rows[0].scored_share
    shown = [r for r in rows if (r.dtype, r.scored_share, r.passes) == (dtype, share, BACKWARD)]
    vocab_sizes = sorted({row.vocab_size for row in shown})
    impls = list(dict.fromkeys(row.impl for row in shown))
    figure, (time_axis, memory_axis) = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    for marker, impl in zip("osD^vPX*" * len(impls), impls, strict=False):
        ours = sorted((row for row in shown if row.impl == impl), key=lambda row: row.vocab_size)
        time_axis.plot(
            [row.vocab_size for row in ours],
            [1e6 * row.ms / row.num_logits for row in ours],
            marker=marker,
            label=impl,
        )
        known = [row for row in ours if row.peak_mib is not None and row.peak_mib > 0]
        memory_axis.plot(
            [row.vocab_size for row in known],
            [2**20 * (row.peak_mib or 0.0) / row.num_logits for row in known],
            marker=marker,
            label=impl,
        )
    time_axis.set_ylabel("ms per million logits")
    memory_axis.set_ylabel("peak memory above the inputs, bytes per logit")
    for axis in (time_axis, memory_axis):
        axis.set(xscale="log", yscale="log", xlabel="vocabulary size")
        axis.set_xticks(vocab_sizes, [str(v) for v in vocab_sizes], rotation=45)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3, which="both")
    handles, names = time_axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(impls))
    figure.suptitle(f"forward + backward, {dtype}, {share:.0%} of the rows scored\n{machine}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(os.fspath(path), dpi=110)
    plt.close(figure)
