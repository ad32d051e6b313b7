"""Five plain sentences that the rows support: who is fastest, where this package loses, memory,
error, and when to take something else."""

import dataclasses
from collections.abc import Sequence

from benchmarks.common.peers import OURS
from benchmarks.common.report import BOTH, FORWARD
from benchmarks.vocab.rows import Row

PASSES = {FORWARD: "forward", BOTH: "forward and backward"}
CLOSE = 1.05  # ratios of times below that are no difference


def sentences(rows: Sequence[Row], headline: int) -> list[str]:
    """Return them, of the largest batch at the headline where one is, else of the largest at all.

    What is said of every case leaves out rows beside busy neighbours, and our way in place.
    """
    quiet = [row for row in rows if row.neighbours == 0 and not _is_variant(row)]
    at_headline = [row for row in quiet if row.vocab_size == headline and row.impl == OURS]
    ours = [row for row in quiet if row.impl == OURS]
    main = max(at_headline or ours, key=lambda row: (row.num_logits, row.scored_share, row.threads))
    # Of the same batch and setting, both passes.
    both = [row for row in quiet if dataclasses.replace(row, passes=main.passes).case == main.case]
    lost = sorted(_losses(quiet), key=lambda pair: pair[0].ms / pair[1].ms, reverse=True)
    return [
        _fastest(both, main),
        _lost(lost, len(ours)),
        _memory([row for row in both if row.passes == BOTH]),
        _error(quiet),
        _advice(lost),
    ]


def _is_variant(row: Row) -> bool:
    return row.impl != OURS and row.impl.startswith(OURS)


def _where(row: Row) -> str:
    scored = "" if row.scored_share == 1 else f", {row.scored_share:.0%} scored"
    threads = f"{row.threads} thread{'s' * (row.threads != 1)}"
    return f"{row.shape} {row.dtype} logits{scored}, {threads}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _fastest(rows: Sequence[Row], main: Row) -> str:
    parts = []
    for passes, name in PASSES.items():
        first, *others = sorted((r for r in rows if r.passes == passes), key=lambda row: row.ms)
        beside = [f"{row.ms / first.ms:.2f} times as fast as {row.impl}" for row in others[:1]]
        parts.append(
            f"{first.impl} is fastest {name} ({', '.join([f'{_number(first.ms)} ms', *beside])})"
        )
    return f"Of {_where(main)}, {' and '.join(parts)}."


def _losses(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Ours and the fastest other one, where that takes less time."""
    found = []
    for ours in (row for row in rows if row.impl == OURS):
        others = [row for row in rows if row.impl != OURS and row.case == ours.case]
        fastest = min(others, key=lambda row: row.ms, default=ours)
        if ours.ms > CLOSE * fastest.ms:
            found.append((ours, fastest))
    return found


def _lost(lost: Sequence[tuple[Row, Row]], num_cases: int) -> str:
    if not lost:
        return f"Nobody beats {OURS} by more than {CLOSE - 1:.0%} in any of {num_cases} cases."
    ours, fastest = lost[0]
    return (
        f"{OURS} loses in {len(lost)} of {num_cases} cases, by most to {fastest.impl}: "
        f"{ours.ms / fastest.ms:.2f} times its time, {PASSES[ours.passes]}, of {_where(ours)}."
    )


def _memory(rows: Sequence[Row]) -> str:
    known = sorted((r for r in rows if r.peak_mib is not None), key=lambda row: row.peak_mib or 0.0)
    ours = next((row for row in known if row.impl == OURS), None)
    if ours is None:
        return "What a call holds of memory is not known on this machine."
    least, most = known[0], known[-1]
    mib = {row.impl: _number(row.peak_mib or 0.0) for row in known}
    text = f"At its peak {OURS} holds {mib[OURS]} MiB above those logits"
    if least is ours:
        return f"{text}, the least of all; {most.impl} holds {mib[most.impl]}."
    return f"{text}, and {least.impl} less, {mib[least.impl]}; {most.impl} {mib[most.impl]}."


def _error(rows: Sequence[Row]) -> str:
    errors: dict[str, float] = {}
    for row in rows:
        errors[row.impl] = max(errors.get(row.impl, 0.0), row.value_error)
    best = min(errors, key=lambda impl: errors[impl])
    worst = max(errors, key=lambda impl: errors[impl])
    text = f"Against float64 the values of {OURS} err by {errors[OURS]:.1e} nats at most"
    if best == OURS:
        return f"{text}, the least of all; those of {worst} by {errors[worst]:.1e}."
    return f"{text}, and those of {best} by less, {errors[best]:.1e}."


def _advice(lost: Sequence[tuple[Row, Row]]) -> str:
    if not lost:
        return f"Nothing here speaks for anything but {OURS}."
    sizes: dict[tuple[str, str], list[int]] = {}
    for ours, fastest in lost:
        sizes.setdefault((fastest.impl, PASSES[ours.passes]), []).append(ours.num_logits)
    ways = []
    for (impl, passes), numbers in sizes.items():
        span = " to ".join(f"{number:,}" for number in sorted({min(numbers), max(numbers)}))
        cases = f"{len(numbers)} case{'s' * (len(numbers) > 1)}"
        ways.append(f"{impl} {passes} in {cases} of {span} logits")
    return f"Where time alone counts, take {', '.join(ways)}; {OURS} in all others."
