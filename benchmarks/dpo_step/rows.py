"""What was measured of a step, as rows: their table, their goal, and their plot."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.common import goals
from benchmarks.common.goals import Goal
from benchmarks.common.peers import OURS
from benchmarks.common.report import Columns, drawing, optional
from benchmarks.dpo_step.batch import NUM_PAIRS, Batch
from benchmarks.dpo_step.clock import Parts

MOST_SHARE = 0.2  # of the step, for head and log-probabilities
PARTS = {
    "backbones_ms": "backbones, forward",
    "head_ms": "head + log-probs, forward",
    "head_backward_ms": "head + log-probs, backward",
    "backbone_backward_ms": "backbone, backward",
}


@dataclass(frozen=True)
class Row:
    """Medians over the steps of one path."""

    impl: str
    pairs: int
    seq_len: int
    tokens: int  # without padding
    scored: int
    loss: float
    ms: float
    ms_p20: float
    ms_p80: float
    samples: int
    backbones_ms: float  # policy and reference
    head_ms: float  # both heads, log-probabilities, loss and metrics
    head_backward_ms: float  # until the last hidden state has its gradient
    backbone_backward_ms: float
    head_share: float  # of the step: head_ms + head_backward_ms
    peak_mib: float | None  # above the weights, with the gradients
    value_error: float  # of a sum against float64 from the same hidden states, nats


COLUMNS = Columns(
    1,
    {
        "implementation": lambda row: row.impl,
        "ms": lambda row: f"{row.ms:.0f}",
        "p20 - p80": lambda row: f"{row.ms_p20:.0f} - {row.ms_p80:.0f}",
        **{
            label: lambda row, part=part: f"{getattr(row, part):.0f}"
            for part, label in PARTS.items()
        },
        "head share": lambda row: f"{row.head_share:.1%}",
        "peak MiB": lambda row: optional("{:.0f}", row.peak_mib),
        "loss": lambda row: f"{row.loss:.6f}",
        "value error": lambda row: f"{row.value_error:.1e}",
    },
)


def to_row(
    name: str,
    batch: Batch,
    samples: list[Parts],
    loss: float,
    peak_mib: float | None,
    value_error: float,
) -> Row:
    totals = [1e3 * parts.total for parts in samples]
    p20, p80 = np.quantile(totals, [0.2, 0.8]).tolist()

    def median(of: Callable[[Parts], float]) -> float:
        return statistics.median(map(of, samples))

    return Row(
        impl=name,
        pairs=NUM_PAIRS,
        seq_len=batch.input_ids.shape[1],
        tokens=int(batch.attention_mask.sum()),
        scored=int(batch.scored.sum()),
        loss=loss,
        ms=statistics.median(totals),
        ms_p20=p20,
        ms_p80=p80,
        samples=len(samples),
        backbones_ms=1e3 * median(lambda p: p.backbones),
        head_ms=1e3 * median(lambda p: p.head),
        head_backward_ms=1e3 * median(lambda p: p.head_backward),
        backbone_backward_ms=1e3 * median(lambda p: p.backbone_backward),
        head_share=median(lambda p: (p.head + p.head_backward) / p.total),
        peak_mib=peak_mib,
        value_error=value_error,
    )


def judge(rows: list[Row]) -> list[Goal]:
    """The share of head and log-probabilities of our step, beside the others'."""
    ours = next(row for row in rows if row.impl == OURS)
    others = ", ".join(f"{row.impl} {row.head_share:.1%}" for row in rows if row is not ours)
    goal = goals.at_most(
        "share of head and log-probs of a step", MOST_SHARE, ours.head_share, "{:.1%}"
    )
    return [replace(goal, measured=f"{goal.measured} ({others})")]


def plot(path: Path, rows: list[Row], machine: str) -> None:
    """Draw a bar for each path, of the parts of its step."""
    names = [f"{row.impl}\nhead {row.head_share:.0%}" for row in rows]
    left = np.zeros(len(rows))
    title = f"a DPO step, {rows[0].pairs} pairs\n{machine}"
    with drawing(path, title, figsize=(9, 3.4)) as (figure, (axis,)):
        for part, label in PARTS.items():
            widths = np.array([getattr(row, part) / 1e3 for row in rows])
            axis.barh(names, widths, left=left, label=label)
            left += widths
        axis.invert_yaxis()
        axis.set_xlabel("seconds")
        figure.legend(loc="outside lower center", ncols=4, fontsize="small")
