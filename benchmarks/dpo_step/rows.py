"""What was measured of a step, as rows: their goal and their plot."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import goals
from benchmarks.common.goals import Goal
from benchmarks.common.peers import OURS
from benchmarks.common.report import draw_bars, shown
from benchmarks.dpo_step.batch import NUM_PAIRS, Batch
from benchmarks.dpo_step.clock import Parts

MOST_SHARE = 0.2  # of the step, for head and log-probabilities
PARTS = {
    "backbones_ms": "backbones, forward",
    "head_ms": "head + log-probs, forward",
    "head_backward_ms": "head + log-probs, backward",
    "backbone_backward_ms": "backbone, backward",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """Medians over the steps of one path."""

    impl: str = shown("implementation")
    pairs: int
    seq_len: int
    tokens: int  # without padding
    scored: int
    ms: float = shown("ms", "{:.0f}")
    ms_p20: float = shown("p20", "{:.0f}")
    ms_p80: float = shown("p80", "{:.0f}")
    samples: int
    backbones_ms: float = shown(PARTS["backbones_ms"], "{:.0f}")  # policy and reference
    # Both heads, log-probabilities, loss and metrics; then until the last hidden state has its
    # gradient.
    head_ms: float = shown(PARTS["head_ms"], "{:.0f}")
    head_backward_ms: float = shown(PARTS["head_backward_ms"], "{:.0f}")
    backbone_backward_ms: float = shown(PARTS["backbone_backward_ms"], "{:.0f}")
    head_share: float = shown("head share", "{:.1%}")  # of the step: head_ms + head_backward_ms
    peak_mib: float | None = shown("peak MiB", "{:.0f}")  # above the weights, with the gradients
    loss: float = shown("loss", "{:.6f}")
    value_error: float = shown("value error", "{:.1e}")  # of a sum, from the same hidden states


NOTES = """\
ms: medians, of the parts too. peak MiB: above the weights, with the gradients. value error: of a
  sequence's sum against float64 from the same hidden states, in nats."""


def to_row(batch: Batch, samples: list[Parts], **measured: Any) -> Row:
    """Medians of the parts, beside what else was measured."""
    totals = [sum(parts.values()) for parts in samples]
    p20, p80 = np.quantile(totals, [0.2, 0.8]).tolist()
    shares = [
        (parts["head_ms"] + parts["head_backward_ms"]) / total
        for parts, total in zip(samples, totals, strict=True)
    ]
    return Row(
        pairs=NUM_PAIRS,
        seq_len=batch.input_ids.shape[1],
        tokens=int(batch.attention_mask.sum()),
        scored=int(batch.scored.sum()),
        ms=statistics.median(totals),
        ms_p20=p20,
        ms_p80=p80,
        samples=len(samples),
        head_share=statistics.median(shares),
        **{name: statistics.median(parts[name] for parts in samples) for name in PARTS},
        **measured,
    )


def judge(rows: Sequence[Row]) -> list[Goal]:
    """The share of head and log-probabilities of our step, beside the others'."""
    ours = next(row for row in rows if row.impl == OURS)
    others = ", ".join(f"{row.impl} {row.head_share:.1%}" for row in rows if row is not ours)
    what = "share of head and log-probs of a step"
    goal = goals.at_most(what, MOST_SHARE, ours.head_share, "{:.1%}")
    return [replace(goal, measured=f"{goal.measured} ({others})")]


def plot(path: Path, rows: Sequence[Row], machine: str) -> None:
    """Draw a bar for each path, of the parts of its step."""
    names = [f"{row.impl}\nhead {row.head_share:.0%}" for row in rows]
    parts = {label: [getattr(row, name) / 1e3 for row in rows] for name, label in PARTS.items()}
    title = f"a DPO step, {rows[0].pairs} pairs\n{machine}"
    draw_bars(path, title, names, parts, "seconds")
