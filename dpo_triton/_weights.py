"""Which tokens are scored, how much each of them counts, and what they are summed in."""

import torch
from torch import Tensor


def token_weights(
    labels: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    shift: bool,
    ignore_index: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight of each token, (B, T) of dtype, 0 where it is not scored."""
    weights = torch.ones_like(labels, dtype=dtype) if mask is None else mask.to(dtype, copy=True)
    weights = weights.contiguous().masked_fill_(labels == ignore_index, 0.0)
    if shift and cu_seqlens is not None:  # nothing predicts the first token of a sequence
        weights[0, cu_seqlens[:-1][cu_seqlens.diff() > 0].long()] = 0.0
    elif shift:
        weights[:, :1] = 0.0
    return weights


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of weights, partials and results, for logits or products of dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32
