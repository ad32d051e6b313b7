"""First stage: one pass over the scored rows; see `kernels/partials.py` for the mathematics."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_scored_labels
from .._weights import sum_dtype
from . import _loops
from ._rows import ELEMENTS, REAL, as_int64, exponent_scale, flags
from ._threads import share_rows


def num_splits(num_columns: int) -> int:
    """Entries of the partials for each token: a row is summed as a whole."""
    return 1


def partials(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    shift: bool,
    ignore_index: int,
    first_column: int,
    vocab_size: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    stats: Sequence[str],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return partials (C, 1, B * T), target (B * T,) and weights (B, T), float32 or float64 like
    the logits, which are the columns from first_column on of a vocabulary of vocab_size.

    C is 2 (peak, total) and one more for each of `stats`. The target is -inf where it is not in
    these columns.
    """
    batch, seq_len, num_columns = logits.shape
    num_tokens = batch * seq_len
    dtype = sum_dtype(logits.dtype)
    weights = torch.empty((batch, seq_len), dtype=dtype)
    target = torch.empty(num_tokens, dtype=dtype)
    partials = torch.empty((2 + len(stats), 1, num_tokens), dtype=dtype)
    labels64 = as_int64(labels)
    mask = None if mask is None else mask.to(dtype).contiguous()
    cu_seqlens = None if cu_seqlens is None else as_int64(cu_seqlens)
    real = REAL[dtype]
    _, num_outside = _loops.token_weights(
        num_tokens,
        seq_len,
        shift,
        ignore_index,
        vocab_size,
        labels64.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        0 if cu_seqlens is None else cu_seqlens.data_ptr(),
        0 if cu_seqlens is None else len(cu_seqlens) - 1,
        weights.data_ptr(),
        real(0),
    )
    if num_outside > 0:
        check_scored_labels(labels, weights, vocab_size, cu_seqlens is not None)
    share_rows(
        _loops.fold_rows,
        num_tokens,
        num_columns,
        seq_len,
        num_columns,
        shift,
        first_column,
        vocab_size,
        logits.data_ptr(),
        ELEMENTS[logits.dtype],
        *logits.stride()[:2],
        labels64.data_ptr(),
        weights.data_ptr(),
        exponent_scale(temperature, logit_scale, softcap, dtype),
        real(logit_scale),
        None if softcap is None else real(softcap),
        flags(stats) if stats else None,
        target.data_ptr(),
        partials.data_ptr(),
    )
    return partials, target, weights
