"""Second stage: from partials to log-probabilities and sequences; see `kernels/combine.py`."""

from collections.abc import Sequence

from torch import Tensor

from .._records import Combined, Partials, Scaling
from . import _loops
from ._rows import exponent_scale, flags, int64


def combine(
    partials: Partials,
    cu_seqlens: Tensor | None,
    reduction: str,
    vocab_size: int,
    scaling: Scaling,
    stats: Sequence[str],
    out: Combined,
) -> None:
    """Write values and lengths, logps, what `grad` takes of each token, and stats."""
    sums, target, weights = partials
    cu_seqlens = None if cu_seqlens is None else int64(cu_seqlens)
    _loops.combine_sequences(
        weights.numel(), weights.shape[1], out.values.shape[0],
        sums.data_ptr(), sums.stride(0), sums.stride(1), sums.shape[1],
        target.data_ptr(), weights.data_ptr(),
        0 if cu_seqlens is None else cu_seqlens.data_ptr(), reduction == "mean",
        exponent_scale(scaling, weights.dtype), flags(stats), len(stats),
        out.values.data_ptr(), out.lengths.data_ptr(), out.logps.data_ptr(),
        out.softmax.data_ptr(), out.softmax.stride(0), out.stats.data_ptr(),
    )  # fmt: skip
