"""Second stage: from partials to log-probabilities, and from those to one value a sequence.

    r[n]    = log sum over j != y of exp(z[n, j])  -  z[n, y]       the log-odds against the target
    logp[n] = -softplus(r[n])
    value   = sum of weight * logp over the sequence, over the sum of weights for the mean

Everything is per token here, so it is computed in float64: what rounding is left is that of the
float32 sums of exponentials, and one at the end. Splits and tokens are added in a fixed order.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._tiles import LN2, LOWEST, log1p, on_device, warp_size


# One program per sequence walks its tokens in blocks, and each token's splits in order.
@triton.jit(
    do_not_specialize=[
        "num_tokens", "seq_len", "vocab_size", "num_splits", "stride_sums_c", "stride_sums_k",
    ]
)  # fmt: skip
def _combine_kernel(
    sums_ptr,  # (C, K, N) float32: peak, total, then what each stat asked for
    target_ptr,  # (N,) float32
    weights_ptr,  # (N,) float32, 0 where not scored
    cu_seqlens_ptr,  # (S + 1,) int32 or int64, or None: sequences of seq_len tokens
    values_ptr,  # (S,) float32, out
    lengths_ptr,  # (S,) float32, out: sum of weights
    logps_ptr,  # (N,) float32, out
    softmax_ptr,  # (4, N) float32, out: complement, reference, share and exponent_scale
    stats_ptr,  # (E, N) float32, out
    stride_sums_c,
    stride_sums_k,
    num_tokens,
    seq_len,
    vocab_size,
    num_splits,
    exponent_scale,
    PACKED: tl.constexpr,
    REDUCTION: tl.constexpr,  # "mean", "sum", or "none": sequences are then only blocks of tokens
    ENTROPY: tl.constexpr,
    MEAN_LOGIT: tl.constexpr,
    TOP1: tl.constexpr,
    LOG_SUM_SQ_PROBS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    if PACKED:
        first = tl.load(cu_seqlens_ptr + s).to(tl.int64)
        bound = tl.load(cu_seqlens_ptr + s + 1).to(tl.int64)
    else:
        first = s * seq_len
        bound = tl.minimum(first + seq_len, num_tokens)
    scale = tl.cast(exponent_scale, tl.float32).to(tl.float64)  # the very number that partials used
    channel = tl.cast(stride_sums_c, tl.int64)

    weighted_logps = tl.zeros([BLOCK_T], tl.float64)
    weight_sum = tl.zeros([BLOCK_T], tl.float64)
    num_scored = tl.zeros([BLOCK_T], tl.int32)
    for start in range(first, bound, BLOCK_T):
        n = start + tl.arange(0, BLOCK_T)
        inside = n < bound
        weight = tl.load(weights_ptr + n, mask=inside, other=0.0)
        scored = weight != 0.0
        target = tl.load(target_ptr + n, mask=scored, other=0.0)

        # Everybody but the target, relative to the largest split.
        peak = tl.full([BLOCK_T], LOWEST, tl.float32)
        for k in range(num_splits):
            split_ptr = sums_ptr + k * stride_sums_k + n
            peak = tl.maximum(peak, tl.load(split_ptr, mask=scored, other=LOWEST))
        others = tl.zeros([BLOCK_T], tl.float64)
        weighted = tl.zeros([BLOCK_T], tl.float64)
        logit_sum = tl.zeros([BLOCK_T], tl.float64)
        earlier = tl.full([BLOCK_T], -float("inf"), tl.float32)
        square_sum = tl.zeros([BLOCK_T], tl.float64)
        for k in range(num_splits):
            split_ptr = sums_ptr + k * stride_sums_k + n
            split_peak = tl.load(split_ptr, mask=scored, other=0.0).to(tl.float64)
            offset = (split_peak - peak) * scale
            shrink = tl.exp2(offset)
            split_ptr += channel
            total = tl.load(split_ptr, mask=scored, other=0.0).to(tl.float64)
            others += total * shrink
            if ENTROPY:
                split_ptr += channel
                products = tl.load(split_ptr, mask=scored, other=0.0).to(tl.float64)
                weighted += (products + offset * total) * shrink
            if MEAN_LOGIT:
                split_ptr += channel
                logit_sum += tl.load(split_ptr, mask=scored, other=0.0).to(tl.float64)
            if TOP1:
                split_ptr += channel
                largest = tl.load(split_ptr, mask=scored, other=-float("inf"))
                earlier = tl.maximum(earlier, largest)
            if LOG_SUM_SQ_PROBS:
                split_ptr += channel
                squares = tl.load(split_ptr, mask=scored, other=0.0).to(tl.float64)
                square_sum += squares * shrink * shrink

        gap = peak.to(tl.float64) - target
        log_odds = (gap * scale + tl.log2(others)) * LN2
        # A target of +inf or NaN would look certain: inf < inf and nan < inf are both false.
        log_odds = tl.where(target < float("inf"), log_odds, float("nan"))
        # logp = -softplus(log_odds), and 1 - exp(logp) = sigmoid(log_odds): each exact at its end.
        e = tl.exp(-tl.abs(log_odds))
        logp = tl.where(scored, -(tl.maximum(log_odds, 0.0) + log1p(e)), 0.0)
        complement = tl.where(log_odds > 0.0, 1.0, e) / (1.0 + e)
        tl.store(logps_ptr + n, logp.to(tl.float32), mask=inside)
        tl.store(softmax_ptr + n, complement.to(tl.float32), mask=scored)
        weighted_logps += tl.where(scored, logp * weight, 0.0)
        weight_sum += weight
        num_scored += scored.to(tl.int32)

        # The whole row, its target included, is what the gradient divides by.
        row_peak = tl.maximum(peak, target)
        offset = (peak.to(tl.float64) - row_peak) * scale
        shrink = tl.exp2(offset)
        target_offset = (target.to(tl.float64) - row_peak) * scale
        e_y = tl.exp2(target_offset)
        total = others * shrink + e_y
        # Exponents of the gradient are relative to the peak, where they are exact; in a flat row,
        # of which a peak says little, to the total. Below LOWEST nobody but the target has a share.
        peak_exponent = (row_peak.to(tl.float64) * scale).to(tl.float32)
        log2_total = row_peak.to(tl.float64) * scale + tl.log2(total)
        is_flat = log2_total - peak_exponent >= 1.0
        reference = tl.where(is_flat, log2_total, peak_exponent).to(tl.float32)
        share = tl.exp2(reference.to(tl.float64) - log2_total)
        row_ptr = softmax_ptr + num_tokens + n
        tl.store(row_ptr, tl.where(total == 0.0, 0.0, reference), mask=scored)
        row_ptr += num_tokens
        tl.store(row_ptr, tl.where(total == 0.0, 0.0, share).to(tl.float32), mask=scored)
        tl.store(row_ptr + num_tokens, tl.cast(exponent_scale, tl.float32), mask=scored)

        stat_ptr = stats_ptr + n
        if ENTROPY:  # log total - sum of p * (z - peak)
            products = tl.where(e_y > 0.0, e_y * target_offset, 0.0)
            products += tl.where(others > 0.0, (weighted + offset * others) * shrink, others)
            entropy = tl.where(scored, (tl.log2(total) - products / total) * LN2, 0.0)
            tl.store(stat_ptr, entropy.to(tl.float32), mask=inside)
            stat_ptr += num_tokens
        if MEAN_LOGIT:
            mean_logit = tl.where(scored, logit_sum * scale * LN2 / vocab_size, 0.0)
            tl.store(stat_ptr, mean_logit.to(tl.float32), mask=inside)
            stat_ptr += num_tokens
        if TOP1:
            # The first maximum wins a tie, as in torch.argmax.
            loses = (earlier >= target) | ((peak > target) & (peak > LOWEST))
            tl.store(stat_ptr, tl.where(scored & ~loses, 1.0, 0.0), mask=inside)
            stat_ptr += num_tokens
        if LOG_SUM_SQ_PROBS:
            square_sum = square_sum * shrink * shrink + e_y * e_y
            log_squares = (tl.log2(square_sum) - 2.0 * tl.log2(total)) * LN2
            tl.store(stat_ptr, tl.where(scored, log_squares, 0.0).to(tl.float32), mask=inside)

    if REDUCTION != "none":
        value = tl.sum(weighted_logps)
        length = tl.sum(weight_sum)
        if REDUCTION == "mean":
            value = value / tl.where(tl.sum(num_scored) > 0, length, 1.0)
        tl.store(values_ptr + s, value.to(tl.float32))
        tl.store(lengths_ptr + s, length.to(tl.float32))


def combine(
    partials: Any,  # a Partials
    cu_seqlens: Tensor | None,
    reduction: str,
    vocab_size: int,
    scaling: Any,  # a Scaling
    stats: Sequence[str],
    out: Any,  # a Combined
) -> None:
    """Write float32 values and lengths (S,), logps (B, T), what `grad` takes of each token, and
    stats (E, B, T).

    With reduction "none" values and lengths are empty. What is not scored has a logp and stats of
    0.
    """
    sums, target, weights = partials
    batch, seq_len = weights.shape
    num_tokens = batch * seq_len
    if reduction == "none":
        cu_seqlens, num_programs, seq_len = None, triton.cdiv(num_tokens, BLOCK_T), BLOCK_T
    else:
        num_programs = out.values.shape[0]
    if num_programs == 0:
        return
    with on_device(weights):
        _combine_kernel[(num_programs,)](
            sums,
            target,
            weights,
            None if cu_seqlens is None else cu_seqlens.contiguous(),
            *out,
            *sums.stride()[:2],
            num_tokens,
            seq_len,
            vocab_size,
            sums.shape[1],
            scaling.exponent_scale,
            PACKED=cu_seqlens is not None,
            REDUCTION=reduction,
            ENTROPY="entropy" in stats,
            MEAN_LOGIT="mean_logit" in stats,
            TOP1="top1" in stats,
            LOG_SUM_SQ_PROBS="log_sum_sq_probs" in stats,
            BLOCK_T=BLOCK_T,
            num_warps=BLOCK_T // warp_size(),
        )


# Tokens a program handles at a time. A constant, like SPLIT_V: it fixes the order of the sums.
BLOCK_T = 512
