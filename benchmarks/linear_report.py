"""What was measured of heads, as rows; the table and the plot that are made of them."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from report import BACKWARD, aligned

TRAINED = "trained"
FROZEN = "frozen"


@dataclass(frozen=True)
class LinearRow:
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


HEADINGS = (
    "implementation",
    "dtype",
    "scored",
    "pass",
    "head",
    "ms",
    "p20 - p80",
    "of floor",
    "peak MiB",
    "value error",
    "grad hidden",
    "grad weight",
)
LEFT_ALIGNED = (0, 1, 3, 4)
NOTES = """\
ms: median of calls in turns over the implementations, each buffer of 8 MiB or more fresh pages.
of floor: its time over that of log_softmax on the scored rows alone, which no arithmetic undercuts
  but that of a frozen head.
peak MiB: above the inputs and the gradients. On a CPU it is the resident size.
value error: largest against float64, in nats; grad hidden, grad weight: relative to the largest
  element. The loss is SimPO's of the values."""


def table(rows: Iterable[LinearRow]) -> str:
    """Return rows as aligned text, a blank line before each case."""
    lines: list[tuple[str, ...]] = [HEADINGS]
    previous: tuple[object, ...] | None = None
    for row in rows:
        case = (row.model, row.dtype, row.scored_share, row.passes, row.head)
        if case != previous:
            lines.append(("",) * len(HEADINGS))
        previous = case
        errors = (row.value_error, row.hidden_grad_error, row.weight_grad_error)
        lines.append(
            (
                row.impl,
                row.dtype,
                f"{row.scored_share:.0%}",
                row.passes,
                row.head if row.passes == BACKWARD else "",
                f"{row.ms:.1f}",
                f"{row.ms_p20:.1f} - {row.ms_p80:.1f}",
                "n/a" if row.of_floor is None else f"{row.of_floor:.2f}x",
                "n/a" if row.peak_mib is None else f"{row.peak_mib:.1f}",
                *("" if error is None else f"{error:.1e}" for error in errors),
            )
        )
    return aligned(lines, LEFT_ALIGNED)


def plot(path: Path, rows: list[LinearRow], machine: str) -> None:
    """Draw peak memory against time of forward + backward of a trained head, a panel a share.

    Of the models and dtypes that were measured it shows the first.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    model, dtype = rows[0].model, rows[0].dtype
    shown = [
        row
        for row in rows
        if (row.model, row.dtype, row.passes) == (model, dtype, BACKWARD) and row.peak_mib
    ]
    shares = sorted({row.scored_share for row in shown})
    impls = list(dict.fromkeys(row.impl for row in rows))
    figure, axes = plt.subplots(
        1, max(1, len(shares)), figsize=(14, 5.5), layout="constrained", sharex=True, sharey=True,
        squeeze=False,
    )  # fmt: skip
    for axis, share in zip(axes[0], shares, strict=False):
        for i, (impl, marker) in enumerate(zip(impls, "osD^vPX*" * len(impls), strict=False)):
            for head, filled in ((TRAINED, True), (FROZEN, False)):
                for row in shown:
                    if (row.impl, row.scored_share, row.head) == (impl, share, head):
                        axis.plot(
                            row.ms / 1e3,
                            max(1.0, row.peak_mib or 0.0),
                            marker,
                            color=f"C{i}",
                            fillstyle="full" if filled else "none",
                            markersize=9,
                            label=impl if filled else None,
                        )
        axis.set(xscale="log", yscale="log", xlabel="seconds", title=f"{share:.0%} scored")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3, which="both")
    axes[0, 0].set_ylabel("peak memory above inputs and gradients, MiB")
    handles = dict(
        pair[::-1]
        for axis in axes[0]
        for pair in zip(*axis.get_legend_handles_labels(), strict=True)
    )
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4)
    first = rows[0]
    figure.suptitle(
        f"{model}: {first.batch * first.seq_len} tokens, H = {first.hidden_size}, "
        f"V = {first.vocab_size}, {dtype}, forward + backward; open markers: frozen head\n{machine}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(os.fspath(path), dpi=110)
    plt.close(figure)
