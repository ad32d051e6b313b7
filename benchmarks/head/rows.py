"""What was measured of heads, as rows: their table, their goals, and their plot."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import goals
from benchmarks.common.goals import Goal
from benchmarks.common.peers import OURS
from benchmarks.common.report import BACKWARD, MARKERS, Columns, drawing, optional
from benchmarks.head.peers import FORMULA, FORMULA_SCORED, TRL

TRAINED = "trained"
FROZEN = "frozen"


@dataclass(frozen=True)
class Row:
    """One implementation on hidden states (batch, seq_len, H) and a weight (V, H)."""

    impl: str
    model: str  # whose H and V they are
    hidden_size: int
    vocab_size: int
    batch: int
    seq_len: int
    dtype: str
    scored_share: float  # of the rows; the first part of each sequence, the prompt, is not scored
    passes: str  # FORWARD, without autograd, or BACKWARD, which is both
    head: str  # TRAINED or FROZEN, whose weight has no gradient; FORWARD does not tell them apart
    ms: float  # median
    ms_p20: float
    ms_p80: float
    samples: int
    peak_mib: float | None  # above inputs and gradients; None: not known
    value_error: float  # largest against float64, nats
    value_rounding: float  # half a unit in the last place of the largest value, in float32
    hidden_grad_error: float | None  # largest against float64, relative to the largest element
    hidden_grad_rounding: float  # half a unit in the last place of that element, likewise
    weight_grad_error: float | None
    weight_grad_rounding: float
    of_floor: float | None  # its time over that of the plain formula on the scored rows alone


COLUMNS = Columns(
    3,
    {
        "implementation": lambda row: row.impl,
        "pass": lambda row: row.passes,
        "head": lambda row: row.head if row.passes == BACKWARD else "",
        "dtype": lambda row: row.dtype,
        "scored": lambda row: f"{row.scored_share:.0%}",
        "ms": lambda row: f"{row.ms:.1f}",
        "p20 - p80": lambda row: f"{row.ms_p20:.1f} - {row.ms_p80:.1f}",
        "of floor": lambda row: optional("{:.2f}x", row.of_floor),
        "peak MiB": lambda row: optional("{:.1f}", row.peak_mib),
        "value error": lambda row: f"{row.value_error:.1e}",
        "grad hidden": lambda row: optional("{:.1e}", row.hidden_grad_error, ""),
        "grad weight": lambda row: optional("{:.1e}", row.weight_grad_error, ""),
    },
)
NOTES = """\
ms: median of calls in turns over the implementations, each buffer of 8 MiB or more fresh pages.
of floor: its time over that of log_softmax on the scored rows alone, which no arithmetic undercuts
  but that of a frozen head.
peak MiB: above the inputs and the gradients. On a CPU it is the resident size.
value error: largest against float64, in nats; grad hidden, grad weight: relative to the largest
  element. The loss is SimPO's of the values."""


def case_of(row: Row) -> tuple[object, ...]:
    return row.model, row.dtype, row.scored_share, row.passes, row.head


def table(rows: list[Row]) -> str:
    return COLUMNS.table(rows, case_of)


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
            result += goals.no_worse(what, some, quantity, case_of)
    return result


def _times(rows: list[Row]) -> Iterator[Goal]:
    ms = {(row.impl, row.scored_share, row.head): row.ms for row in rows if row.passes == BACKWARD}
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
        if row.impl == OURS and row.passes == BACKWARD and row.peak_mib is not None:
            share = f"{row.scored_share:.0%} scored"
            what = f"peak above inputs and gradients, {share}, {row.head} head"
            yield goals.at_most(what, PEAK_MIB, row.peak_mib, "{:.1f} MiB")


def plot(path: Path, rows: list[Row], machine: str) -> None:
    """Draw peak memory against time of forward + backward of a trained head, a panel a share.

    Of the models and dtypes that were measured it shows the first.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    first = rows[0]
    case = (first.model, first.dtype, BACKWARD)
    shown = [row for row in rows if (row.model, row.dtype, row.passes) == case and row.peak_mib]
    shares = sorted({row.scored_share for row in shown})
    impls = list(dict.fromkeys(row.impl for row in rows))
    title = (
        f"{first.model}: {first.batch * first.seq_len} tokens, H = {first.hidden_size}, "
        f"V = {first.vocab_size}, {first.dtype}, forward + backward; open markers: frozen head\n"
        f"{machine}"
    )
    panels = dict(num_axes=max(1, len(shares)), figsize=(14, 5.5), sharex=True, sharey=True)
    with drawing(path, title, **panels) as (figure, axes):
        for axis, share in zip(axes, shares, strict=False):
            for row in shown:
                if row.scored_share == share:
                    i, is_filled = impls.index(row.impl), row.head == TRAINED
                    axis.plot(
                        row.ms / 1e3,
                        max(1.0, row.peak_mib or 0.0),
                        MARKERS[i % len(MARKERS)],
                        color=f"C{i}",
                        fillstyle="full" if is_filled else "none",
                        markersize=9,
                        label=row.impl if is_filled else None,
                    )
            axis.set(xscale="log", yscale="log", xlabel="seconds", title=f"{share:.0%} scored")
            axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.3, which="both")
        axes[0].set_ylabel("peak memory above inputs and gradients, MiB")
        legends = [axis.get_legend_handles_labels() for axis in axes]
        handles = {name: handle for pair in legends for handle, name in zip(*pair, strict=True)}
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=4)
