"""Second stage: from partials to log-probabilities and sequences; see `kernels/combine.py`."""

import math

import torch
from torch import Tensor

from .._records import LN2, Combined, Partials, Scaling, Stats
from ._rows import exponent_scale

# Tokens handled at a time, so that float64 temporaries do not grow with the batch.
BLOCK_T = 1 << 14


def combine(
    partials: Partials,
    cu_seqlens: Tensor | None,
    reduction: str,
    vocab_size: int,
    scaling: Scaling,
    stats: Stats,
    out: Combined,
) -> None:
    """Write values and lengths, logps, what `grad` takes of each token, and stats."""
    scale = exponent_scale(scaling, partials.weights.dtype)
    sums, target, weights = partials
    flat_weights = weights.flatten()
    weighted_logps = torch.empty_like(flat_weights, dtype=torch.float64)
    complement, reference, share, exponent_scales = out.softmax
    limit = 2.0 ** (59 if weights.dtype == torch.float64 else 30)
    for first in range(0, target.numel(), BLOCK_T):
        here = slice(first, first + BLOCK_T)
        scored = flat_weights[here] != 0
        combined = _combine_tokens(sums[:, :, here], target[here], scale, limit, stats)
        token_logps, complement[here], exponent_scales[here], *rest = combined
        peak_exponent, log2_total, *extras = rest
        # Relative to the peak, where exponents are exact, or to the total of a flat row.
        reference[here] = peak_exponent.where(log2_total < 1, peak_exponent + log2_total)
        is_nobody = log2_total == -math.inf  # nobody but the target is asked about, or all banned
        reference[here] = reference[here].masked_fill(is_nobody, 0.0)
        from_total = reference[here] - peak_exponent - log2_total
        share[here] = from_total.exp2().masked_fill(is_nobody, 0.0)
        out.logps.view(-1)[here] = token_logps.where(scored, 0.0)
        weighted_logps[here] = (token_logps * flat_weights[here]).where(scored, 0.0)
        for stat, extra in zip(out.stats.flatten(1), extras, strict=True):
            stat[here] = extra.where(scored, 0.0)
    if reduction == "none":
        return
    if cu_seqlens is None:
        batch, seq_len = weights.shape
        cu_seqlens = torch.arange(batch + 1, device=weights.device) * seq_len
    lengths = _sequence_sums(flat_weights, cu_seqlens)
    values = _sequence_sums(weighted_logps, cu_seqlens)
    if reduction == "mean":
        num_scored = _sequence_sums(flat_weights != 0, cu_seqlens)
        values /= lengths.where(num_scored > 0, 1.0)
    out.values.copy_(values)
    out.lengths.copy_(lengths)


def _combine_tokens(
    partials: Tensor, target: Tensor, scale: float, limit: float, stats: Stats
) -> list[Tensor]:
    """logp, 1 - exp(logp), scale and log2 of the peak, log2 of the total over it, and stats of
    tokens, (N,) float64 each; anything where not scored."""
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
    # A peak whose product with the scale keeps too few digits is scaled by a power of 2: who
    # is not equal to it has a share below 2 ** -64 then, by either scale.
    exponent = torch.frexp(row_peak.abs()).exponent - math.frexp(limit)[1]
    is_large = ((row_peak * scale).abs() >= limit) & row_peak.isfinite()
    own_scale = torch.ldexp(torch.ones_like(total), -exponent).masked_fill(~is_large, scale)
    top = row_peak * own_scale
    combined = [logp, -logp.expm1(), own_scale, top, total.log2()]
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
    """Sums (S,) of (N,) values in float64, each added in order; padding follows the last one."""
    offsets = cu_seqlens.to(torch.int64)
    covered = values[: offsets[-1]] if len(offsets) > 1 else values[:0]
    return torch.segment_reduce(covered.double(), "sum", offsets=offsets, initial=0)
