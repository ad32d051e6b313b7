"""What the head in tiles sets out to reach, judged by the rows of a run."""

from collections.abc import Iterator

from goals import Goal
from linear_peers import FORMULA, FORMULA_SCORED, OURS, TRL
from linear_report import FROZEN, TRAINED, LinearRow
from report import BACKWARD

SHARE = 0.45  # of the rows scored: that of public preference sets
PEAK_MIB = 64.0
# Shares and heads whose times are judged: the others are there to be looked at.
JUDGED = ((SHARE, TRAINED), (SHARE, FROZEN), (1.0, TRAINED))


def judge(rows: list[LinearRow], headline: str) -> list[Goal]:
    """Return what the rows can judge: nothing about a peer that did not run.

    Time and memory are those of the headline's model in float32, errors of each model and dtype.
    """
    at_headline = [row for row in rows if (row.model, row.dtype) == (headline, "float32")]
    return [*_speeds(at_headline), *_memory(at_headline), *_errors(rows)]


def _speeds(rows: list[LinearRow]) -> Iterator[Goal]:
    ms = {(row.impl, row.scored_share, row.head): row.ms for row in rows if row.passes == BACKWARD}
    for what, peer, share, head, goal, is_speed_up in (
        ("speed over TRL", TRL, SHARE, TRAINED, 3.5, True),
        ("time of the formula on the scored rows", FORMULA_SCORED, SHARE, TRAINED, 1.15, False),
        ("time of the same, frozen head over trained", FORMULA_SCORED, SHARE, FROZEN, 0.8, False),
        ("speed over TRL", TRL, 1.0, TRAINED, 1.5, True),
        ("time of the formula", FORMULA, 1.0, TRAINED, 1.25, False),
    ):
        # What a frozen head saves is told by the time of the formula that trains it.
        ours, theirs = ms.get((OURS, share, head)), ms.get((peer, share, TRAINED))
        if ours is None or theirs is None:
            continue
        ratio = theirs / ours if is_speed_up else ours / theirs
        yield Goal(
            f"{what}, {share:.0%} scored",
            f"{'>=' if is_speed_up else '<='} {goal:.2f}x",
            f"{ratio:.2f}x",
            ratio >= goal if is_speed_up else ratio <= goal,
        )


def _memory(rows: list[LinearRow]) -> Iterator[Goal]:
    for row in rows:
        if row.impl == OURS and row.passes == BACKWARD and row.peak_mib is not None:
            yield Goal(
                f"peak above inputs and gradients, {row.scored_share:.0%} scored, {row.head} head",
                f"<= {PEAK_MIB:.0f} MiB",
                f"{row.peak_mib:.1f} MiB",
                row.peak_mib <= PEAK_MIB,
            )


def _errors(rows: list[LinearRow]) -> Iterator[Goal]:
    """Our errors are nowhere above another's, but for what rounding the result can add to any."""

    def case(row: LinearRow) -> tuple[object, ...]:
        return row.model, row.dtype, row.scored_share, row.passes, row.head

    ours = [row for row in rows if row.impl == OURS]
    others = [row for row in rows if row.impl != OURS]
    for model, dtype in dict.fromkeys((row.model, row.dtype) for row in ours):
        for what, name in (
            ("values", "value"),
            ("gradients of hidden", "hidden_grad"),
            ("gradients of weight", "weight_grad"),
        ):
            error, rounding = f"{name}_error", f"{name}_rounding"
            excesses = [
                (getattr(row, error) - getattr(other, error)) / getattr(row, rounding)
                for row in ours
                for other in others
                if (row.model, row.dtype) == (model, dtype)
                and case(row) == case(other)
                and getattr(row, error) is not None
            ]
            if excesses:
                no_worse = sum(excess <= 0 for excess in excesses)
                yield Goal(
                    f"roundings by which {what} err more than another's, {model}, {dtype}",
                    "<= 1",
                    f"{max(excesses):.3f} (not above in {no_worse} of {len(excesses)})",
                    max(excesses) <= 1,
                )
