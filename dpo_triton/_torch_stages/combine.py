"""Second stage: from partials to log-probabilities and sequences; see `kernels/combine.py`."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._rows import LN2, exponent_scale

# Tokens handled at a time, so that float64 temporaries do not grow with the batch.
BLOCK_T = 1 << 14


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
    scale = exponent_scale(temperature, logit_scale, softcap, weights.dtype)
    flat_weights = weights.flatten()
    logps = torch.empty_like(weights)
    weighted_logps = torch.empty_like(target, dtype=torch.float64)
    complement, reference, share = (torch.empty_like(target) for _ in range(3))
    token_stats = weights.new_empty((len(stats), *weights.shape))
    for first in range(0, target.numel(), BLOCK_T):
        here = slice(first, first + BLOCK_T)
        scored = flat_weights[here] != 0
        combined = _combine_tokens(partials[:, :, here], target[here], scale, vocab_size, stats)
        token_logps, complement[here], peak_exponent, log2_total, *extras = combined
        # Relative to the peak, where exponents are exact, or to the total of a flat row (here also
        # one whose peak was guessed poorly).
        reference[here] = peak_exponent.where(log2_total - peak_exponent < 1, log2_total)
        share[here] = (reference[here] - log2_total).exp2()
        logps.view(-1)[here] = token_logps.where(scored, 0.0)
        weighted_logps[here] = (token_logps * flat_weights[here]).where(scored, 0.0)
        for out, extra in zip(token_stats.flatten(1), extras, strict=True):
            out[here] = extra.where(scored, 0.0)

    of_tokens = (logps, complement, reference, share, token_stats)
    if reduction == "none":
        return weights.new_empty(0), weights.new_empty(0), *of_tokens
    if cu_seqlens is None:
        batch, seq_len = weights.shape
        cu_seqlens = torch.arange(batch + 1, device=weights.device) * seq_len
    lengths = _sequence_sums(flat_weights, cu_seqlens)
    values = _sequence_sums(weighted_logps, cu_seqlens)
    if reduction == "mean":
        num_scored = _sequence_sums(flat_weights != 0, cu_seqlens)
        values /= lengths.where(num_scored > 0, 1.0)
    return values.to(weights.dtype), lengths.to(weights.dtype), *of_tokens


def _combine_tokens(
    partials: Tensor, target: Tensor, scale: float, vocab_size: int, stats: Sequence[str]
) -> list[Tensor]:
    """logp, 1 - exp(logp), log2 of the peak's exp(z) and of their total, stats of tokens, (N,)
    float64 each; anything where not scored."""
    peaks, totals, *sums = partials.double()  # (K, N) each
    target = target.double()
    peak = peaks.amax(0)
    offsets = (peaks - peak) * scale
    shrink = offsets.exp2()
    others = (totals * shrink).sum(0)
    log_odds = ((peak - target) * scale + others.log2()) * LN2
    # A target of +inf or NaN would look certain: inf < inf and nan < inf are both false.
    log_odds = log_odds.where(target < math.inf, math.nan)
    logp = -(log_odds.clamp(min=0) + log_odds.abs().neg().exp().log1p())  # -softplus

    # The whole row, its target included, is what the gradient divides by.
    row_peak = torch.maximum(peak, target)
    offset = (peak - row_peak) * scale
    row_shrink = offset.exp2()
    target_offset = (target - row_peak) * scale
    e_y = target_offset.exp2()
    total = others * row_shrink + e_y
    combined = [logp, -logp.expm1(), row_peak * scale, row_peak * scale + total.log2()]
    for name, channel in zip(stats, sums, strict=True):
        if name == "entropy":  # log total - sum of p * (z - peak)
            products = ((channel + offsets * totals) * shrink).sum(0) + offset * others
            products = (products * row_shrink).where(others != 0, 0.0)
            products += (e_y * target_offset).where(e_y != 0, 0.0)
            combined.append((total.log2() - products / total) * LN2)
        elif name == "mean_logit":
            combined.append(channel.sum(0) * (scale * LN2))
        elif name == "top1":
            combined.append((channel.amax(0) < target).double())
        elif name == "log_sum_sq_probs":
            squares = (channel * shrink**2).sum(0) * row_shrink**2 + e_y**2
            combined.append((squares.log2() - 2 * total.log2()) * LN2)
    return combined


def _sequence_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums (S,) of (N,) values in float64, each added in order."""
    return torch.segment_reduce(
        values.double(), "sum", offsets=cu_seqlens.to(torch.int64), initial=0
    )
