"""First stage: one pass over the scored rows; see `kernels/partials.py` for the mathematics."""

from collections.abc import Sequence

from torch import Tensor

from .._records import Columns, Partials, Scaling, Tokens
from . import _loops
from ._rows import ELEMENTS, cap_numbers, exponent_scale, flags, int64, real
from ._threads import share_rows


def num_splits(num_columns: int) -> int:
    """Entries of the partials for each token: a row is summed as a whole."""
    return 1


def partials(
    logits: Tensor,
    tokens: Tokens,
    columns: Columns,
    scaling: Scaling,
    stats: Sequence[str],
    out: Partials,
) -> None:
    """Write the partials, K = 1, of float32, or float64 like the logits."""
    sums, target, weights = out
    dtype, num_tokens, seq_len = weights.dtype, weights.numel(), weights.shape[1]
    labels, mask, cu_seqlens = int64(tokens.labels), tokens.mask, tokens.cu_seqlens
    mask = None if mask is None else mask.to(dtype).contiguous()
    cu_seqlens = None if cu_seqlens is None else int64(cu_seqlens)
    _loops.token_weights(
        num_tokens, seq_len, tokens.shift, tokens.ignore_index, labels.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        0 if cu_seqlens is None else cu_seqlens.data_ptr(),
        0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        weights.data_ptr(), real(0.0, dtype),
    )  # fmt: skip
    share_rows(
        _loops.fold_rows, num_tokens, columns.width,
        seq_len, tokens.shift, *columns, logits.data_ptr(), ELEMENTS[logits.dtype],
        *logits.stride()[:2], labels.data_ptr(), weights.data_ptr(), target.data_ptr(),
        sums.data_ptr(), sums.stride(0), exponent_scale(scaling, dtype),
        *cap_numbers(scaling, dtype), flags(stats) if stats else None,
    )  # fmt: skip
