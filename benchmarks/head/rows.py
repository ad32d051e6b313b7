"""What was measured of heads, as rows: their table, their goals, and their plot."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import goals
from benchmarks.common.cases import HEADS, Call, Case, CaseRow
from benchmarks.common.goals import Goal
from benchmarks.common.peers import OURS
from benchmarks.common.report import BOTH, Line, draw_lines, drawing, shown
from benchmarks.head.peers import FORMULA, FORMULA_SCORED, TRL

TRAINED, FROZEN = HEADS[True], HEADS[False]


@dataclass(frozen=True, kw_only=True)
class Row(CaseRow):
    """One implementation on hidden states (batch, seq_len, H) and a weight (V, H).

    The peak is above inputs and gradients.
    """

    model: str  # whose H and V they are
    hidden_size: int
    head: str = shown("head")  # TRAINED or FROZEN; FORWARD does not tell them apart
    hidden_grad_error: float | None = shown("grad hidden", "{:.1e}", "")  # relative to the largest
    hidden_grad_rounding: float  # half a unit in the last place of that element, likewise
    weight_grad_error: float | None = shown("grad weight", "{:.1e}", "")
    weight_grad_rounding: float
    of_floor: float | None = shown("of floor", "{:.2f}x")  # over the formula on scored rows alone

    @property
    def case(self) -> tuple[object, ...]:
        """Rows with the same one are of the same batch, pass and head."""
        return self.model, self.dtype, self.scored_share, self.passes, self.head


def rows_of(case: Case, calls: list[Call]) -> list[Row]:
    """Return a row for each implementation that ran."""
    batch, setting = case
    assert batch.weight is not None
    by_name = {call.peer.name: call for call in calls}
    floor = by_name.get(FORMULA_SCORED, by_name.get(FORMULA))
    of_grads = batch.rows.nbytes + setting.trains_weight * batch.weight.nbytes
    above = of_grads / 2**20 if setting.passes == BOTH else 0.0
    rows = []
    for call in calls:
        of_hidden, of_weight = (*call.grad_errors, None, None)[:2]
        peak = None if call.peak_mib is None else call.peak_mib - above
        row = Row(
            **case.common(call) | dict(peak_mib=peak),
            model=batch.name,
            hidden_size=batch.rows.shape[-1],
            head=HEADS[setting.trains_weight],
            hidden_grad_error=of_hidden,
            hidden_grad_rounding=batch.roundings[1],
            weight_grad_error=of_weight,
            weight_grad_rounding=batch.roundings[2],
            of_floor=None if floor is None else floor.speedup_over(call),
        )
        rows.append(row)
    return rows


NOTES = """\
ms: median of calls in turns over the implementations, each buffer of 8 MiB or more fresh pages.
of floor: its time over that of log_softmax on the scored rows alone, which no arithmetic undercuts
  but that of a frozen head.
peak MiB: above the inputs and the gradients. On a CPU it is the resident size.
value error: largest against float64, in nats; grad hidden, grad weight: relative to the largest
  element. The loss is SimPO's of the values."""


SHARE = 0.45  # of the rows scored: that of public preference sets
PEAK_MIB = 64.0
# Shares and heads whose times are judged: the others are there to be looked at.
JUDGED = ((SHARE, TRAINED), (SHARE, FROZEN), (1.0, TRAINED))
# What a frozen head saves is told by the time of the formula that trains it.
SPEEDS = (
    ("speed over TRL", TRL, SHARE, TRAINED, 3.5),
    ("speed over TRL", TRL, 1.0, TRAINED, 1.5),
)
TIMES = (
    ("time of the formula on the scored rows", FORMULA_SCORED, SHARE, TRAINED, 1.15),
    ("time of the same, frozen head over trained", FORMULA_SCORED, SHARE, FROZEN, 0.8),
    ("time of the formula", FORMULA, 1.0, TRAINED, 1.25),
)


def judge(rows: list[Row], headline: str) -> list[Goal]:
    """Return what the rows can judge: nothing about a peer that did not run.

    Time and memory are those of the headline's model in float32, errors of each model and dtype.
    """
    at_headline = [row for row in rows if (row.model, row.dtype) == (headline, "float32")]
    result = [*_times(at_headline), *_memory(at_headline)]
    for model, dtype in dict.fromkeys((row.model, row.dtype) for row in rows):
        some = [row for row in rows if (row.model, row.dtype) == (model, dtype)]
        for what, quantity in (
            ("values", "value"),
            ("gradients of hidden", "hidden_grad"),
            ("gradients of weight", "weight_grad"),
        ):
            what = f"roundings by which {what} err more than another's, {model}, {dtype}"
            result += goals.no_worse(what, some, quantity)
    return result


def _times(rows: list[Row]) -> Iterator[Goal]:
    ms = {(row.impl, row.scored_share, row.head): row.ms for row in rows if row.passes == BOTH}
    for what, peer, share, head, goal in SPEEDS + TIMES:
        ours, theirs = ms.get((OURS, share, head)), ms.get((peer, share, TRAINED))
        if ours is not None and theirs is not None:
            what = f"{what}, {share:.0%} scored"
            if peer == TRL:
                yield goals.at_least(what, goal, theirs / ours, "{:.2f}x")
            else:
                yield goals.at_most(what, goal, ours / theirs, "{:.2f}x")


def _memory(rows: list[Row]) -> Iterator[Goal]:
    for row in rows:
        if row.impl == OURS and row.passes == BOTH and row.peak_mib is not None:
            share = f"{row.scored_share:.0%} scored"
            what = f"peak above inputs and gradients, {share}, {row.head} head"
            yield goals.at_most(what, PEAK_MIB, row.peak_mib, "{:.1f} MiB")


def plot(path: Path, rows: Sequence[Row], machine: str) -> None:
    """Draw peak memory against time of forward + backward, a panel a share, a line a peer.

    Of the models and dtypes that were measured it shows the first.
    """
    first = rows[0]
    case = (first.model, first.dtype, BOTH)
    drawn = [row for row in rows if (row.model, row.dtype, row.passes) == case and row.peak_mib]
    impls = list(dict.fromkeys(row.impl for row in rows))

    def line(impl: str, share: float) -> Line:
        mine = [row for row in drawn if (row.impl, row.scored_share) == (impl, share)]
        return [(row.ms / 1e3, max(1.0, row.peak_mib or 0.0)) for row in mine]

    shares = sorted({row.scored_share for row in drawn}) or [1.0]
    unit = "peak above inputs and gradients, MiB; {:.0%} scored"
    panels = {unit.format(share): {impl: line(impl, share) for impl in impls} for share in shares}
    title = (
        f"{first.model}: {first.batch * first.seq_len} tokens, H = {first.hidden_size}, "
        f"V = {first.vocab_size}, {first.dtype}, forward + backward; a line ends at a frozen head "
        f"and at one that trains, which takes longer\n{machine}"
    )
    options = dict(num_axes=len(shares), figsize=(14, 5.5), sharex=True, sharey=True)
    with drawing(path, title, **options) as axes:
        draw_lines(axes, panels, "seconds")
