"""Second stage: from partials to log-probabilities and sequences; see `kernels/combine.py`."""

import math

import torch
from torch import Tensor

from .._records import LN2, Combined, Partials, RowSoftmax, Scaling, Stats
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
    token_stats = out.stats.flatten(1)
    for first in range(0, target.numel(), BLOCK_T):
        here = slice(first, first + BLOCK_T)
        scored = flat_weights[here] != 0
        written = RowSoftmax(*out.softmax[:, here]), token_stats[:, here]
        logps = _combine_tokens(sums[:, :, here], target[here], scale, stats, *written)
        out.logps.view(-1)[here] = logps.where(scored, 0.0)
        weighted_logps[here] = (logps * flat_weights[here]).where(scored, 0.0)
        token_stats[:, here].masked_fill_(~scored, 0.0)
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
    partials: Tensor,
    target: Tensor,
    scale: float,
    stats: Stats,
    softmax: RowSoftmax,
    token_stats: Tensor,
) -> Tensor:
    """Write what tokens get of partials (C, K, N) to softmax and token_stats (E, N), and return
    their log-probabilities in float64; anything where not scored."""
    peaks, totals, *sums = partials.double()  # (K, N) each
    target = target.double()
    peak = peaks.amax(0)
    offsets = (peaks - peak) * scale
    shrink = offsets.exp2()
    others = (totals * shrink).sum(0)
    log_odds = ((peak - target) * scale + others.log2()) * LN2
    # A target of +inf or NaN would look certain: inf < inf and nan < inf are both false.
    log_odds = log_odds.where(target < math.inf, math.nan)
    logp: Tensor = -(log_odds.clamp(min=0) + log_odds.abs().neg().exp().log1p())  # -softplus

    # The whole row, its target included, is what the gradient divides by.
    row_peak = torch.maximum(peak, target)
    offset = (peak - row_peak) * scale
    row_shrink = offset.exp2()
    target_offset = (target - row_peak) * scale
    e_y = target_offset.exp2()
    total = others * row_shrink + e_y
    log2_total = total.log2()
    # A peak whose product with the scale keeps too few digits is scaled by a power of 2: who
    # is not equal to it has a share below 2 ** -64 then, by either scale.
    digits = 59 if softmax.share.dtype == torch.float64 else 30
    exponent = torch.frexp(row_peak.abs()).exponent - (digits + 1)
    is_large = ((row_peak * scale).abs() >= 2.0**digits) & row_peak.isfinite()
    own_scale = torch.ldexp(torch.ones_like(total), -exponent).masked_fill(~is_large, scale)
    peak_exponent = row_peak * own_scale
    # Relative to the peak, where exponents are exact, or to the total of a flat row.
    reference = peak_exponent.where(log2_total < 1, peak_exponent + log2_total)
    is_nobody = log2_total == -math.inf  # nobody but the target is asked about, or all are banned
    softmax.complement.copy_(-logp.expm1())
    softmax.reference.copy_(reference.masked_fill(is_nobody, 0.0))
    from_total = softmax.reference - peak_exponent - log2_total
    softmax.share.copy_(from_total.exp2().masked_fill(is_nobody, 0.0))
    softmax.exponent_scale.copy_(own_scale)
    for name, channel, stat in zip(stats, sums, token_stats, strict=True):
        if name == "entropy":  # log total - sum of p * (z - peak)
            products = ((channel + offsets * totals) * shrink).sum(0) + offset * others
            products = (products * row_shrink).where(others != 0, 0.0)
            products += (e_y * target_offset).where(e_y != 0, 0.0)
            stat.copy_((log2_total - products / total) * LN2)
        elif name == "mean_logit":
            stat.copy_(channel.sum(0) * (scale * LN2))
        elif name == "top1":
            stat.copy_(channel.amax(0) < target)
        elif name == "log_sum_sq_probs":
            squares = (channel * shrink**2).sum(0) * row_shrink**2 + e_y**2
            stat.copy_((squares.log2() - 2 * log2_total) * LN2)
    return logp


def _sequence_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums (S,) of (N,) values in float64, each added in order; padding follows the last one."""
    offsets = cu_seqlens.to(torch.int64)
    covered = values[: offsets[-1]] if len(offsets) > 1 else values[:0]
    return torch.segment_reduce(covered.double(), "sum", offsets=offsets, initial=0)
