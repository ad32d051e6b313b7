"""What was measured of logits, as rows, and the plots that are made of them."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.common.cases import Call, Case, CaseRow
from benchmarks.common.logits_peers import LOG_SOFTMAX
from benchmarks.common.measure import least_bytes
from benchmarks.common.report import BOTH, FORWARD, Line, draw_lines, drawing, shown

VOCABULARY, SIZES = "vocabulary", "sizes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row(CaseRow):
    """One implementation on one batch of logits, (batch, seq_len, vocab_size), the same for all."""

    part: str  # VOCABULARY, one size of batch, or SIZES, from the smallest to the largest
    threads: int = shown("threads")
    neighbours: int = shown("neighbours")  # other processes that each keep a core busy
    glogits_per_s: float = shown("G logits/s", "{:.3f}")  # over all logits, scored or not
    copy_share: float = shown("of copy", "{:.1%}")  # least traffic over time, of the copy speed
    grad_error: float | None = shown("grad error", "{:.1e}", "")  # relative to the largest element
    grad_rounding: float  # half a unit in the last place of that element, in dtype, likewise
    speedup: float | None = shown("speed-up", "{:.2f}x")  # log_softmax's time over this one's

    @property
    def num_logits(self) -> int:
        return self.batch * self.seq_len * self.vocab_size

    @property
    def shape(self) -> str:
        return f"{self.batch} x {self.seq_len} x {self.vocab_size}"

    @property
    def case(self) -> tuple[object, ...]:
        """Rows with the same one are of the same logits, pass and setting."""
        of_batch = (self.part, self.batch, self.seq_len, self.vocab_size, self.dtype)
        return *of_batch, self.scored_share, self.passes, self.threads, self.neighbours


def rows_of(case: Case, calls: list[Call], copy_gb_per_s: float, part: str) -> list[Row]:
    """Return a row for each implementation that ran."""
    logits = case.batch.rows
    num_scored, setting = int(case.batch.mask.sum()) * case.batch.vocab_size, case.setting
    traffic = least_bytes(logits.numel(), num_scored, logits.element_size())[setting.passes]
    log_softmax = next((call for call in calls if call.peer.name == LOG_SOFTMAX), None)
    return [
        Row(
            **case.common(call),
            part=part,
            threads=setting.threads,
            neighbours=setting.neighbours,
            glogits_per_s=logits.numel() / call.ms / 1e6,
            copy_share=traffic / call.ms / 1e6 / copy_gb_per_s,
            grad_error=next(iter(call.grad_errors), None),
            grad_rounding=case.batch.roundings[1],
            speedup=call.speedup_over(log_softmax),
        )
        for call in calls
    ]


NOTES = """\
ms: median. neighbours: other processes that each keep a core busy. G logits/s: all logits, scored
  or not. of copy: the least traffic that the pass can have over its time, as a part of the speed at
  which this machine copies.
  On a CPU buffers of 8 MiB or more are fresh pages in each call, as for batches of everyday size.
peak MiB: above the inputs, with result and gradient. On a CPU it is the resident size: dpo_triton
  does not touch a gradient's pages of rows that are not scored, and those do not count.
value error, grad error: largest against float64, in nats; and relative to the largest element.
speed-up: over log_softmax in the same case, the median over rounds in which both ran."""


def lines_of(
    rows: Sequence[Row], x: Callable[[Row], float], y: Callable[[Row], float]
) -> dict[str, Line]:
    """A line for each implementation."""
    impls = dict.fromkeys(row.impl for row in rows)
    return {impl: [(x(row), y(row)) for row in rows if row.impl == impl] for impl in impls}


def plot_vocabulary(path: Path, rows: Sequence[Row], machine: str) -> None:
    """Draw time and peak memory of forward + backward over the vocabulary, a line a peer.

    Of the dtypes and shares that were measured it shows the first.
    """
    dtype, share = rows[0].dtype, rows[0].scored_share
    of = (VOCABULARY, dtype, share, BOTH)
    shown = [row for row in rows if (row.part, row.dtype, row.scored_share, row.passes) == of]
    title = f"forward + backward, {dtype}, {share:.0%} of the rows scored\n{machine}"
    units = {
        "ms per million logits": lambda row: 1e6 * row.ms / row.num_logits,
        "peak memory above the inputs, bytes per logit": lambda row: (
            2**20 * (row.peak_mib or 0.0) / row.num_logits
        ),
    }
    panels = {unit: lines_of(shown, lambda row: row.vocab_size, y) for unit, y in units.items()}
    ticks = {size: str(size) for size in sorted({row.vocab_size for row in shown})}
    with drawing(path, title, num_axes=2, figsize=(13, 5.5)) as axes:
        draw_lines(axes, panels, "vocabulary size", ticks, rotation=45)


def plot_sizes(path: Path, rows: Sequence[Row], machine: str) -> None:
    """Draw the time of a call over its number of logits, a line a peer, a panel a pass.

    Of the dtypes that were measured it shows the first, all of its rows scored.
    """
    sized = [row for row in rows if row.part == SIZES]
    of = (sized[0].dtype, sized[0].threads, 0)
    shown = [row for row in sized if (row.dtype, row.threads, row.neighbours) == of]
    panels = {
        f"ms of a call, {passes}": lines_of(
            [row for row in shown if row.passes == passes],
            lambda row: row.num_logits,
            lambda row: row.ms,
        )
        for passes in (FORWARD, BOTH)
    }
    ticks = {row.num_logits: row.shape for row in shown}
    title = f"time of a call over its size, {of[0]}, {of[1]} threads\n{machine}"
    with drawing(path, title, num_axes=2, figsize=(13, 6.5)) as axes:
        draw_lines(axes, panels, "sequences x tokens x vocabulary", ticks, rotation=90)


PLOTS = {VOCABULARY: ("", plot_vocabulary), SIZES: ("-sizes", plot_sizes)}  # by what follows a name
