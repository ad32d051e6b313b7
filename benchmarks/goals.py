"""What this package sets out to reach at one vocabulary size, judged by the rows of a run."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peers import COMPILED, LOG_SOFTMAX, OURS, OURS_IN_PLACE
from report import BACKWARD, FORWARD, Row

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


@dataclass(frozen=True)
class Goal:
    what: str
    goal: str
    measured: str
    met: bool


def judge(rows: list[Row], headline: int) -> list[Goal]:
    """Return what the rows at the headline can judge: nothing about a peer that did not run."""
    rows = [row for row in rows if row.vocab_size == headline]
    return [*_speeds(rows), *_memory(rows), *_errors(rows)]


def goals_text(goals: list[Goal], headline: int) -> str:
    """Return goals as aligned lines."""
    if not goals:
        return f"goals: none can be judged without V = {headline}"
    return goal_lines(f"goals, V = {headline} (of the speeds: on a CPU)", goals)


def goal_lines(heading: str, goals: list[Goal], found: str = "measured") -> str:
    """Return goals as aligned lines under a heading; `found` says how the figures were had."""
    columns = ("what", "goal", "measured")
    widths = {name: max(len(getattr(goal, name)) for goal in goals) for name in columns}
    lines = [heading]
    for goal in goals:
        what, target, measured = (getattr(goal, name).ljust(widths[name]) for name in columns)
        verdict = "met" if goal.met else "MISSED"
        lines.append(f"  {what}  goal {target}  {found} {measured}  {verdict}")
    return "\n".join(lines)


def _speeds(rows: list[Row]) -> Iterator[Goal]:
    ms = {(row.impl, row.dtype, row.scored_share, row.passes): row.ms for row in rows}
    for (dtype, share), over_log_softmax in SPEEDUPS.items():
        for peer, goals in ((LOG_SOFTMAX, over_log_softmax), (COMPILED, COMPILED_SPEEDUPS[share])):
            for passes, goal in zip((FORWARD, BACKWARD), goals, strict=True):
                ours, theirs = (ms.get((impl, dtype, share, passes)) for impl in (OURS, peer))
                if ours is not None and theirs is not None:
                    yield Goal(
                        f"speed over {peer}, {dtype}, {share:.0%} scored, {passes}",
                        f">= {goal:.2f}x",
                        f"{theirs / ours:.2f}x",
                        theirs / ours >= goal,
                    )


def _memory(rows: list[Row]) -> Iterator[Goal]:
    for row in rows:
        if row.impl not in (OURS, OURS_IN_PLACE) or row.peak_mib is None:
            continue
        most = BASE_MIB + ROW_BYTES * row.batch * row.seq_len / 2**20
        if row.passes == BACKWARD and row.impl == OURS:
            most += row.num_logits * getattr(torch, row.dtype).itemsize / 2**20  # the gradient
        yield Goal(
            f"peak of {row.impl}, {row.dtype}, {row.scored_share:.0%} scored, {row.passes}",
            f"<= {most:.1f} MiB",
            f"{row.peak_mib:.1f} MiB",
            row.peak_mib <= most,
        )


def _errors(rows: list[Row]) -> Iterator[Goal]:
    """Our errors are nowhere above another's, but for what rounding the result can add to any."""
    for what, error, rounding in (
        ("values", "value_error", "value_rounding"),
        ("gradients", "grad_error", "grad_rounding"),
    ):
        excesses = [
            (getattr(ours, error) - getattr(other, error)) / getattr(ours, rounding)
            for ours in rows
            for other in rows
            if ours.impl in (OURS, OURS_IN_PLACE)
            and other.impl not in (OURS, OURS_IN_PLACE)
            and (ours.dtype, ours.scored_share, ours.passes)
            == (other.dtype, other.scored_share, other.passes)
            and getattr(ours, error) is not None
        ]
        if excesses:
            no_worse = sum(excess <= 0 for excess in excesses)
            yield Goal(
                f"error of {what} over every other's, in roundings of the result",
                "<= 1",
                f"{max(excesses):.3f} (not above in {no_worse} of {len(excesses)})",
                max(excesses) <= 1,
            )
