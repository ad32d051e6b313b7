"""What a published run sets out to reach, judged by its rows; what must hold is in the tests."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common.peers import OURS
from benchmarks.common.report import aligned


@dataclass(frozen=True)
class Goal:
    what: str
    goal: str
    measured: str
    met: bool


def at_least(what: str, least: float, value: float, form: str) -> Goal:
    """A goal whose numbers are written by a form such as "{:.2f}x"."""
    return Goal(what, f">= {form.format(least)}", form.format(value), value >= least)


def at_most(what: str, most: float, value: float, form: str) -> Goal:
    return Goal(what, f"<= {form.format(most)}", form.format(value), value <= most)


def no_worse(what: str, rows: Sequence[Any], quantity: str) -> Iterator[Goal]:
    """Our errors are nowhere above another's but for what rounding the result can add to any.

    Rows with an `impl` are compared where their `case` is equal; `{quantity}_error` is None where
    there is no such error, `{quantity}_rounding` half a unit in the last place of the result.
    """
    excesses = [
        (getattr(ours, f"{quantity}_error") - getattr(other, f"{quantity}_error"))
        / getattr(ours, f"{quantity}_rounding")
        for ours in rows
        for other in rows
        if ours.impl.startswith(OURS)
        and not other.impl.startswith(OURS)
        and ours.case == other.case
        and getattr(ours, f"{quantity}_error") is not None
    ]
    if excesses:
        not_above = sum(excess <= 0 for excess in excesses)
        measured = f"{max(excesses):.3f} (not above in {not_above} of {len(excesses)})"
        yield Goal(what, "<= 1", measured, max(excesses) <= 1)


def text(heading: str, goals: Sequence[Goal], needed: str) -> str:
    """Return goals as aligned lines, or that none can be judged without what is needed."""
    if not goals:
        return f"goals: none can be judged without {needed}"
    lines = [["", "goal", "measured", ""]]
    lines += [[x.what, x.goal, x.measured, "met" if x.met else "MISSED"] for x in goals]
    return f"goals, {heading}\n{aligned(lines, len(lines[0]))}"
