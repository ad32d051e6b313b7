"""The goals of logits on a CPU, judged by the rows: nothing is said of who did not run."""

from collections.abc import Iterator, Sequence

import torch

from benchmarks.common import goals
from benchmarks.common.goals import Goal
from benchmarks.common.logits_peers import COMPILED, LOG_SOFTMAX, OURS_IN_PLACE
from benchmarks.common.peers import OURS
from benchmarks.common.report import BOTH, FORWARD
from benchmarks.vocab.first_call import CACHED, EMPTY, FirstCall
from benchmarks.vocab.rows import SIZES, VOCABULARY, Row

# At the headline, (peer, dtype, share of the rows scored) -> speed over it: forward, with backward.
SPEEDS = {
    (LOG_SOFTMAX, "bfloat16", 1.0): (5.0, 3.5),
    (LOG_SOFTMAX, "bfloat16", 0.5): (10.0, 5.0),
    (LOG_SOFTMAX, "float32", 1.0): (3.0, 1.8),
    (LOG_SOFTMAX, "float32", 0.5): (5.0, 2.5),
    **{
        (COMPILED, dtype, share): (forward, 3.5)
        for dtype in ("bfloat16", "float32")
        for share, forward in ((1.0, 1.2), (0.5, 2.2))
    },
}
# Over log_softmax, by the number of logits from which it holds.
SIZE_SPEEDS = {8 * 16 * 64: 0.8, 2 * 16 * 32000: 1.5}
FIRST_CALL_S = {EMPTY: 6.0, CACHED: 0.5}
BASE_MIB = 1.0  # of memory above the inputs, and
ROW_BYTES = 64  # for each row of logits


def judge(rows: Sequence[Row], first_calls: Sequence[FirstCall], headline: int) -> list[Goal]:
    at_headline = [r for r in rows if (r.part, r.vocab_size) == (VOCABULARY, headline)]
    excess = "error of {} over every other's, in roundings of the result"
    return [
        *_speeds(at_headline),
        *_sizes([row for row in rows if row.part == SIZES and row.impl == OURS]),
        *_beside_neighbours(rows),
        *_first_calls(first_calls),
        *_memory(at_headline),
        *goals.no_worse(excess.format("values"), rows, "value"),
        *goals.no_worse(excess.format("gradients"), rows, "grad"),
    ]


def _speeds(rows: Sequence[Row]) -> Iterator[Goal]:
    ms = {(row.impl, row.dtype, row.scored_share, row.passes): row.ms for row in rows}
    for (peer, dtype, share), least in SPEEDS.items():
        for passes, goal in zip((FORWARD, BOTH), least, strict=True):
            ours, theirs = (ms.get((impl, dtype, share, passes)) for impl in (OURS, peer))
            if ours is not None and theirs is not None:
                what = f"speed over {peer}, {dtype}, {share:.0%} scored, {passes}"
                yield goals.at_least(what, goal, theirs / ours, "{:.2f}x")


def _sizes(ours: Sequence[Row]) -> Iterator[Goal]:
    for row in ours:
        least = [goal for size, goal in SIZE_SPEEDS.items() if size <= row.num_logits]
        if row.speedup is not None and row.neighbours == 0 and least:
            what = f"speed over {LOG_SOFTMAX}, {row.shape}, {row.dtype}, threads: {row.threads}"
            yield goals.at_least(f"{what}, {row.passes}", least[-1], row.speedup, "{:.2f}x")


def _beside_neighbours(rows: Sequence[Row]) -> Iterator[Goal]:
    """No more slowed by a busy neighbour than the formula is."""
    ms = {(row.impl, *row.case): row.ms for row in rows}
    for ours in rows:
        if ours.impl == OURS and ours.neighbours > 0:
            slowed = [
                ms.get((impl, *ours.case), 0.0) / ms.get((impl, *ours.case[:-1], 0), 1.0)
                for impl in (OURS, LOG_SOFTMAX)
            ]
            what = f"slowed by {ours.neighbours} busy neighbour, {ours.shape}, {ours.dtype}"
            if all(slowed):
                yield goals.at_most(f"{what}, {ours.passes}", slowed[1], slowed[0], "{:.2f}x")


def _first_calls(first_calls: Sequence[FirstCall]) -> Iterator[Goal]:
    for call in first_calls:
        if call.passes == FORWARD:
            what = f"first call of a process, {call.cache} folder of compiled code"
            yield goals.at_most(what, FIRST_CALL_S[call.cache], call.seconds, "{:.2f} s")


def _memory(rows: Sequence[Row]) -> Iterator[Goal]:
    for row in rows:
        if row.impl in (OURS, OURS_IN_PLACE) and row.peak_mib is not None:
            most = BASE_MIB + ROW_BYTES * row.batch * row.seq_len / 2**20
            if row.passes == BOTH and row.impl == OURS:
                most += row.num_logits * getattr(torch, row.dtype).itemsize / 2**20  # the gradient
            what = f"peak of {row.impl}, {row.dtype}, {row.scored_share:.0%} scored, {row.passes}"
            yield goals.at_most(what, most, row.peak_mib, "{:.1f} MiB")
