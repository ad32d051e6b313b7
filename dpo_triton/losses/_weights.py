"""Weights of tokens (LD-DPO) and of pairs (WPO), and which sequences of a batch make a pair."""

from typing import Literal

import torch
from torch import Tensor

from ._terms import check_number

Layout = Literal["concat", "interleaved"]


def split_pairs(values: Tensor, layout: Layout = "concat") -> tuple[Tensor, Tensor]:
    """Chosen and rejected of (2B, ...): two tensors (B, ...).

    "concat" is all chosen, then all rejected, in the same order; "interleaved" is chosen, rejected,
    chosen, rejected.
    """
    if layout not in ("concat", "interleaved"):
        raise ValueError(f'layout must be "concat" or "interleaved", got {layout!r}')
    if len(values) % 2:
        raise ValueError(
            f"a batch of pairs has an even number of sequences, got {len(values)}; "
            "each chosen answer needs its rejected one"
        )
    if layout == "interleaved":
        return values[0::2], values[1::2]
    return values[: len(values) // 2], values[len(values) // 2 :]


def ld_dpo_mask(
    mask: Tensor,
    ld_alpha: float,
    *,
    layout: Layout = "concat",
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Token weights of LD-DPO: what an answer has beyond its pair's shorter one counts ld_alpha.

    With them as `mask`, `fused_seq_logprob` gives LD-DPO's log-probabilities.

    Args:
        mask: (2B, T), or (N,) with cu_seqlens; a token counts where it is not 0.
        ld_alpha: in [0, 1]; 1 changes nothing.
        layout: which sequences make a pair, see `split_pairs`.
        shift: the first token of a sequence is not scored, and so not counted.
        cu_seqlens: (2B + 1,) running sum of the lengths of packed sequences.

    Returns:
        Shape of mask, floating: mask times 1 or ld_alpha.

    Source: Liu et al. 2024, arXiv:2409.06411.
    """
    ld_alpha = check_number("ld_alpha", ld_alpha)
    if not 0 <= ld_alpha <= 1:
        raise ValueError(
            f"ld_alpha must be in [0, 1], got {ld_alpha}; 1 is DPO, 0 drops what is longer"
        )
    bounds = _bounds(mask, cu_seqlens)
    sequence = _sequence_of_token(bounds, mask.numel())  # (N,)
    counts = mask.flatten() != 0
    if shift:
        counts = counts & ~_is_first(sequence)
    counted = torch.cat([bounds.new_zeros(1), counts.cumsum(0)])  # (N + 1,) up to each token
    before = counted[bounds.clamp(max=mask.numel())]  # (2B + 1,)
    chosen_lengths, rejected_lengths = split_pairs(before.diff(), layout)
    shared = torch.minimum(chosen_lengths, rejected_lengths)
    shared = shared.repeat(2) if layout == "concat" else shared.repeat_interleave(2)
    is_shared = counted[1:] - before[sequence] <= shared[sequence]
    weights = mask.to(torch.promote_types(mask.dtype, torch.float32))
    return torch.where(is_shared.view_as(mask), weights, ld_alpha * weights)


def wpo_weights(
    token_logps: Tensor,
    log_sum_sq_probs: Tensor,
    mask: Tensor,
    *,
    layout: Layout = "concat",
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Pair weights of WPO: how likely the policy itself is to write both answers, (B,), detached.

    The product over the two answers of `exp(mean_t(token_logps - log_sum_sq_probs))`, 1 for an
    empty answer.

    Args:
        token_logps, log_sum_sq_probs: (2B, T), or (N,) with cu_seqlens: the stats of these names of
            `fused_seq_logprob`, 0 where not scored.
        mask: of the same shape, the weights of the mean; 0 where not scored.
        layout, shift, cu_seqlens: as in `ld_dpo_mask`.

    Source: Zhou et al. 2024, arXiv:2406.11827, eq. 2, aligned by sum_v p_v ** 2.
    """
    aligned = (token_logps - log_sum_sq_probs).detach()
    means = token_means(aligned, mask, shift=shift, cu_seqlens=cu_seqlens)
    chosen, rejected = split_pairs(means, layout)
    return torch.exp(chosen + rejected)


def token_means(
    per_token: Tensor, mask: Tensor, *, shift: bool = False, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Mean of each sequence's tokens, weighted by mask, (2B,); 0 for a sequence without weight."""
    bounds = _bounds(mask, cu_seqlens)
    weights = mask.flatten().to(torch.float64)
    if shift:
        weights = weights.masked_fill(_is_first(_sequence_of_token(bounds, mask.numel())), 0)
    sums, totals = (
        torch.segment_reduce(values, "sum", offsets=bounds, unsafe=True)
        for values in (weights * per_token.flatten(), weights)
    )
    return (sums / torch.where(totals == 0, 1.0, totals)).to(per_token.dtype)


def _bounds(mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """cu_seqlens; a padded batch is packed sequences of T tokens each."""
    expected_ndim = 2 if cu_seqlens is None else 1
    if not isinstance(mask, Tensor) or mask.ndim != expected_ndim:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"mask must be a torch.Tensor (2B, T), or (N,) with cu_seqlens, got {got}"
            f"{'' if cu_seqlens is None else ' with cu_seqlens'}"
        )
    if cu_seqlens is not None:
        return cu_seqlens.long()
    return torch.arange(mask.shape[0] + 1, device=mask.device) * mask.shape[1]


def _sequence_of_token(bounds: Tensor, num_tokens: int) -> Tensor:
    tokens = torch.arange(num_tokens, device=bounds.device)
    sequence = torch.searchsorted(bounds[1:], tokens, right=True)
    return sequence.clamp(max=len(bounds) - 2)  # bounds that fall short get their error later


def _is_first(sequence: Tensor) -> Tensor:
    return sequence.diff(prepend=sequence.new_full((1,), -1)) != 0
