"""Second stage: from partials to log-probabilities and sequences; see `kernels/combine.py`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _loops
from ._rows import as_int64, exponent_scale, flags


def combine(
    partials: Tensor,
    target: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor | None,
    reduction: str,
    vocab_size: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    stats: Sequence[str],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return values and lengths (S,), logps (B, T), what `grad` takes of each token (complement,
    reference and share, (B * T,) each), and stats (E, B, T).

    With reduction "none" values and lengths are empty. What is not scored has a logp and stats of
    0.
    """
    batch, seq_len = weights.shape
    num_sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    dtype = weights.dtype
    sizes = (0, 0) if reduction == "none" else (num_sequences, num_sequences)
    values, lengths = (torch.empty(size, dtype=dtype) for size in sizes)
    logps = torch.empty_like(weights)
    complement, reference, share, exponent_scales = (torch.empty_like(target) for _ in range(4))
    token_stats = torch.empty((len(stats), batch, seq_len), dtype=dtype)
    partials = partials.contiguous()
    cu_seqlens = None if cu_seqlens is None else as_int64(cu_seqlens)
    _loops.combine_sequences(
        target.numel(),
        seq_len,
        sizes[0],
        partials.shape[1],
        partials.data_ptr(),
        target.data_ptr(),
        weights.data_ptr(),
        0 if cu_seqlens is None else cu_seqlens.data_ptr(),
        reduction == "mean",
        exponent_scale(temperature, logit_scale, softcap, dtype),
        vocab_size,
        flags(stats),
        values.data_ptr(),
        lengths.data_ptr(),
        logps.data_ptr(),
        tuple(x.data_ptr() for x in (complement, reference, share, exponent_scales)),
        token_stats.data_ptr(),
    )
    return values, lengths, logps, complement, reference, share, token_stats
