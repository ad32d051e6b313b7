"""What was measured of logits, as rows: their table, their goals, and their plot."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.common import goals
from benchmarks.common.goals import Goal
from benchmarks.common.peers import OURS
from benchmarks.common.report import (
    BACKWARD,
    FORWARD,
    MARKERS,
    Columns,
    drawing,
    log_axes,
    optional,
)
from benchmarks.vocab.peers import COMPILED, LOG_SOFTMAX, OURS_IN_PLACE


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


COLUMNS = Columns(
    2,
    {
        "implementation": lambda row: row.impl,
        "pass": lambda row: row.passes,
        "dtype": lambda row: row.dtype,
        "scored": lambda row: f"{row.scored_share:.0%}",
        "ms": lambda row: f"{row.ms:.2f}",
        "p20 - p80": lambda row: f"{row.ms_p20:.2f} - {row.ms_p80:.2f}",
        "G logits/s": lambda row: f"{row.glogits_per_s:.3f}",
        "of copy": lambda row: f"{row.copy_share:.1%}",
        "peak MiB": lambda row: optional("{:.1f}", row.peak_mib),
        "value error": lambda row: f"{row.value_error:.1e}",
        "grad error": lambda row: optional("{:.1e}", row.grad_error, ""),
        "speed-up": lambda row: optional("{:.2f}x", row.speedup),
    },
)
NOTES = """\
ms: median. G logits/s: all logits, scored or not. of copy: the least traffic that the pass can have
  over its time, as a part of the speed at which this machine copies.
  On a CPU buffers of 8 MiB or more are fresh pages in each call, as for batches of everyday size.
peak MiB: above the inputs, with result and gradient. On a CPU it is the resident size: dpo_triton
  does not touch a gradient's pages of rows that are not scored, and those do not count.
value error, grad error: largest against float64, in nats; and relative to the largest element.
speed-up: over log_softmax in the same case."""


def case_of(row: Row) -> tuple[object, ...]:
    return row.vocab_size, row.dtype, row.scored_share, row.passes


def table(rows: list[Row]) -> str:
    return COLUMNS.table(rows, case_of)


# (dtype, share of the rows scored) -> speed over log_softmax: forward, forward + backward.
SPEEDUPS = {
    ("bfloat16", 1.0): (5.0, 3.5),
    ("bfloat16", 0.5): (10.0, 5.0),
    ("float32", 1.0): (3.0, 1.8),
    ("float32", 0.5): (5.0, 2.5),
}
# Share of the rows scored -> speed over torch.compile: forward, forward + backward.
COMPILED_SPEEDUPS = {1.0: (0.91, 1.0), 0.5: (1.8, 1.8)}
BASE_MIB = 8.0  # of memory above the inputs, and
ROW_BYTES = 64  # for each row of logits


def judge(rows: list[Row], headline: int) -> list[Goal]:
    """Return what the rows at the headline can judge: nothing about a peer that did not run."""
    rows = [row for row in rows if row.vocab_size == headline]
    excess = "error of {} over every other's, in roundings of the result"
    return [
        *_speeds(rows),
        *_memory(rows),
        *goals.no_worse(excess.format("values"), rows, "value", case_of),
        *goals.no_worse(excess.format("gradients"), rows, "grad", case_of),
    ]


def _speeds(rows: list[Row]) -> Iterator[Goal]:
    ms = {(row.impl, row.dtype, row.scored_share, row.passes): row.ms for row in rows}
    for (dtype, share), over_log_softmax in SPEEDUPS.items():
        for peer, least in ((LOG_SOFTMAX, over_log_softmax), (COMPILED, COMPILED_SPEEDUPS[share])):
            for passes, goal in zip((FORWARD, BACKWARD), least, strict=True):
                ours, theirs = (ms.get((impl, dtype, share, passes)) for impl in (OURS, peer))
                if ours is not None and theirs is not None:
                    what = f"speed over {peer}, {dtype}, {share:.0%} scored, {passes}"
                    yield goals.at_least(what, goal, theirs / ours, "{:.2f}x")


def _memory(rows: list[Row]) -> Iterator[Goal]:
    for row in rows:
        if row.impl in (OURS, OURS_IN_PLACE) and row.peak_mib is not None:
            most = BASE_MIB + ROW_BYTES * row.batch * row.seq_len / 2**20
            if row.passes == BACKWARD and row.impl == OURS:
                most += row.num_logits * getattr(torch, row.dtype).itemsize / 2**20  # the gradient
            what = f"peak of {row.impl}, {row.dtype}, {row.scored_share:.0%} scored, {row.passes}"
            yield goals.at_most(what, most, row.peak_mib, "{:.1f} MiB")


def plot(path: Path, rows: list[Row], machine: str) -> None:
    """Draw time and peak memory of forward + backward over the vocabulary, a line a peer.

    Of the dtypes and shares that were measured it shows the first.
    """
    dtype, share = rows[0].dtype, rows[0].scored_share
    shown = [r for r in rows if (r.dtype, r.scored_share, r.passes) == (dtype, share, BACKWARD)]
    vocab_sizes = sorted({row.vocab_size for row in shown})
    impls = list(dict.fromkeys(row.impl for row in shown))
    title = f"forward + backward, {dtype}, {share:.0%} of the rows scored\n{machine}"
    with drawing(path, title, num_axes=2, figsize=(13, 5.5)) as (figure, axes):
        for marker, impl in zip(MARKERS * len(impls), impls, strict=False):
            line = sorted((r for r in shown if r.impl == impl), key=lambda row: row.vocab_size)
            times = [(r.vocab_size, 1e6 * r.ms / r.num_logits) for r in line]
            peaks = [(r.vocab_size, 2**20 * r.peak_mib / r.num_logits) for r in line if r.peak_mib]
            for axis, points in zip(axes, (times, [p for p in peaks if p[1] > 0]), strict=True):
                axis.plot(*zip(*points, strict=True), marker=marker, label=impl)
        axes[0].set_ylabel("ms per million logits")
        axes[1].set_ylabel("peak memory above the inputs, bytes per logit")
        log_axes(axes, vocab_sizes, "vocabulary size", rotation=45)
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(impls))
