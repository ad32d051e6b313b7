"""Which tokens are scored, and how much each of them counts."""

import torch
from torch import Tensor

from ._records import Tokens


def token_weights(tokens: Tokens, dtype: torch.dtype) -> Tensor:
    """The weight of each token, (B, T) of dtype, 0 where it is not scored."""
    labels, mask, cu_seqlens, shift, ignore_index = tokens
    weights = torch.ones_like(labels, dtype=dtype) if mask is None else mask.to(dtype, copy=True)
    # In int64, as int32 would wrap what is beyond it.
    weights = weights.contiguous().masked_fill_(labels.long() == ignore_index, 0.0)
    if cu_seqlens is not None:
        places = torch.arange(labels.shape[-1], device=labels.device)
        weights.masked_fill_(places >= cu_seqlens[-1], 0.0)  # padding after the last sequence
        if shift:  # nothing predicts the first token of a sequence
            weights.masked_fill_(torch.isin(places, cu_seqlens), 0.0)
    elif shift:
        weights[:, :1] = 0.0
    return weights
