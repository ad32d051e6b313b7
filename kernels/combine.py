"""Second stage: from partials to log-probabilities, and from those to one value a sequence.

    r[n]    = log sum over j != y of exp(z[n, j])  -  z[n, y]       the log-odds against the target
    logp[n] = -softplus(r[n])
    value   = sum of weight * logp over the sequence, over the sum of weights for the mean

The first kernel is over tokens, in float32 that keeps the rest of a rounding where digits would go
(`_float32`): a card for games has little float64. The second is over sequences. Splits and tokens
are added in a fixed order, a sequence's from its first token on.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._float32 import (
    LN2,
    LN2_HIGH,
    LN2_LOW,
    LOG2_E,
    exp2,
    log1p,
    rounded_product,
    split_log,
    two_product,
    two_sum,
    whole_power_of_2,
)
from ._launch import launch
from ._tiles import LARGEST_EXPONENT, LOWEST, MEAN_UNIT, gpu_target, on_device, warp_size

BLOCK_T = 64  # tokens of a program, one a thread
BLOCK_K = 4  # splits that a program loads at a time
# Sums of a sequence that are kept apart, one a thread, and the tokens that each takes at a time.
# Constants, like the width of a split: they fix the order of the sums.
LANES = 128
UNROLL = 8


@triton.jit
def _exponent_of(u, peak, scale):
    # scale * (u - peak) <= 0 as a product and its rest. Below -1024 nobody has a share.
    high, low = two_product(u - peak, scale)
    return tl.maximum(high, -1024.0), tl.where(high < -1024.0, 0.0, low)


# One program per block of tokens n, one token a thread.
@triton.jit(
    do_not_specialize=["stride_sums_c", "stride_sums_k", "num_tokens", "num_splits", "vocab_size"]
)
def _combine_kernel(
    sums_ptr,  # (C, K, N) float32: peak, total, then what each stat asked for
    target_ptr,  # (N,) float32
    weights_ptr,  # (N,) float32, 0 where not scored
    logps_ptr,  # (N,) float32, out
    rests_ptr,  # (N,) float32, out: of the rounding of logps
    softmax_ptr,  # (4, N) float32, out: complement, reference, share and exponent_scale
    stats_ptr,  # (E, N) float32, out
    stride_sums_c,
    stride_sums_k,
    num_tokens,
    num_splits,
    vocab_size,
    exponent_scale,
    ENTROPY: tl.constexpr,
    MEAN_LOGIT: tl.constexpr,
    TOP1: tl.constexpr,
    LOG_SUM_SQ_PROBS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = n < num_tokens
    scored = tl.load(weights_ptr + n, mask=inside, other=0.0) != 0.0
    if tl.max(scored.to(tl.int32)) == 0:
        zeros = tl.zeros([BLOCK_T], tl.float32)
        tl.store(logps_ptr + n, zeros, mask=inside)
        for stat in tl.static_range(ENTROPY + MEAN_LOGIT + TOP1 + LOG_SUM_SQ_PROBS):
            tl.store(stats_ptr + stat * num_tokens + n, zeros, mask=inside)
    else:
        scale = tl.cast(exponent_scale, tl.float32)  # the very number that partials used
        target = tl.load(target_ptr + n, mask=scored, other=0.0)

        # Everybody but the target, relative to the largest split.
        peak = tl.full([BLOCK_T], LOWEST, tl.float32)
        others = tl.zeros([BLOCK_T], tl.float32)  # sum of 2 ** exponent
        weighted = tl.zeros([BLOCK_T], tl.float32)  # of 2 ** exponent * exponent
        square_sum = tl.zeros([BLOCK_T], tl.float32)  # of 4 ** exponent
        mean_logit = tl.zeros([BLOCK_T], tl.float32)
        earlier = tl.full([BLOCK_T], -float("inf"), tl.float32)
        channel = tl.cast(stride_sums_c, tl.int64)
        for first in range(0, num_splits, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)[:, None]
            mask = (k < num_splits) & scored[None, :]  # (BLOCK_K, BLOCK_T)
            split_ptr = sums_ptr + k * tl.cast(stride_sums_k, tl.int64) + n[None, :]
            peaks = tl.load(split_ptr, mask=mask, other=LOWEST)
            split_ptr += channel
            totals = tl.load(split_ptr, mask=mask, other=0.0)
            new_peak = tl.maximum(peak, tl.max(peaks, 0))
            drop, drop_rest = _exponent_of(peak, new_peak, scale)
            drops, drops_rest = _exponent_of(peaks, new_peak[None, :], scale)
            shrink, shrinks = exp2(drop, drop_rest), exp2(drops, drops_rest)
            if ENTROPY:
                split_ptr += channel
                products = tl.load(split_ptr, mask=mask, other=0.0) + drops * totals
                weighted = (weighted + drop * others) * shrink + tl.sum(products * shrinks, 0)
            if MEAN_LOGIT:
                split_ptr += channel
                mean_logit += tl.sum(tl.load(split_ptr, mask=mask, other=0.0), 0)
            if TOP1:
                split_ptr += channel
                largest = tl.load(split_ptr, mask=mask, other=-float("inf"))
                earlier = tl.maximum(earlier, tl.max(largest, 0))
            if LOG_SUM_SQ_PROBS:
                split_ptr += channel
                squares = tl.load(split_ptr, mask=mask, other=0.0)
                square_sum = square_sum * shrink * shrink + tl.sum(squares * shrinks * shrinks, 0)
            others = others * shrink + tl.sum(totals * shrinks, 0)
            peak = new_peak

        # Log-odds: (odds + odds_rest) * ln 2 + rest. Halves, whose difference stays in float32.
        half_gap, gap_rest = two_sum(0.5 * peak, -0.5 * target)
        gap, gap_error = two_product(half_gap, 2.0 * scale)
        binades, m = split_log(others)
        log_m, log_m_rest = log1p(m)
        odds, odds_rest = two_sum(gap, binades)
        odds_rest += gap_error + rounded_product(gap_rest, 2.0 * scale)
        # A target of +inf or NaN would look certain: inf < inf and nan < inf are both false.
        odds = tl.where(target < float("inf"), odds, float("nan"))
        odds2, odds2_rest = two_sum(odds, rounded_product(log_m, LOG2_E))
        odds2_rest += odds_rest + log_m_rest * LOG2_E
        others_lead = odds2 > 0.0
        # logp = -softplus(log_odds), and 1 - exp(logp) = sigmoid(log_odds): each exact at its end.
        e = exp2(-tl.abs(odds2), tl.where(others_lead, -odds2_rest, odds2_rest))
        log1p_e, log1p_e_rest = log1p(e)
        nats, nats_rest = two_product(odds, LN2_HIGH)
        nats, nats_error = two_sum(nats, log_m)
        nats_rest += nats_error + odds * LN2_LOW + odds_rest * LN2 + log_m_rest
        # What leaves float32 in base 2 may still be in it in nats.
        is_finite = tl.abs(odds) < float("inf")
        nats = tl.where(is_finite, nats, half_gap * (2.0 * scale * LN2))
        nats_rest = tl.where(is_finite, nats_rest, 0.0)
        loss, loss_rest = two_sum(tl.where(others_lead, nats, 0.0), log1p_e)
        loss_rest += tl.where(others_lead, nats_rest, 0.0) + log1p_e_rest
        loss, loss_rest = two_sum(loss, loss_rest)
        tl.store(logps_ptr + n, tl.where(scored, -loss, 0.0), mask=inside)
        tl.store(rests_ptr + n, -loss_rest, mask=scored)

        # The whole row, its target included, is what the gradient divides by: log2 of the total is
        # row_peak * scale + whole + part.
        row_peak = tl.maximum(peak, target)
        drop, drop_rest = _exponent_of(peak, row_peak, scale)
        y_drop, y_drop_rest = _exponent_of(target, row_peak, scale)
        whole, whole_rest = two_sum(drop, binades)
        whole = tl.where(others_lead, whole, y_drop)
        part = tl.where(others_lead, whole_rest + drop_rest + log_m * LOG2_E, y_drop_rest)
        part += log1p_e * LOG2_E
        # Exponents of the gradient are relative to the peak, where they are exact; in a flat row,
        # of which a peak says little, to the total.
        is_large = ~(tl.abs(row_peak * scale) < LARGEST_EXPONENT)
        row_scale = tl.where(is_large, whole_power_of_2(row_peak), scale)
        peak_exponent, peak_rest = two_product(row_peak, row_scale)
        above = whole + (part + peak_rest)
        is_flat = (above >= 1.0) & ~is_large
        reference = tl.where(is_flat, peak_exponent + above, peak_exponent)
        share, share_rest = two_sum((reference - peak_exponent) - whole, -(part + peak_rest))
        is_nobody = (others == 0.0) & (target == -float("inf"))
        share = tl.where(is_nobody, 0.0, exp2(share, share_rest))
        reference = tl.where(is_nobody, 0.0, reference)
        token_ptr = softmax_ptr + n
        tl.store(token_ptr, tl.where(others_lead, 1.0, e) / (1.0 + e), mask=scored)
        tl.store(token_ptr + num_tokens, reference, mask=scored)
        tl.store(token_ptr + 2 * num_tokens, share, mask=scored)
        tl.store(token_ptr + 3 * num_tokens, row_scale, mask=scored)

        stat_ptr = stats_ptr + n
        shrink, e_y = exp2(drop, drop_rest), exp2(y_drop, y_drop_rest)
        if ENTROPY:  # log total - sum of p * (z - peak)
            products = (weighted + drop * others) * shrink + e_y * y_drop
            entropy = ((whole + part) - products * exp2(-whole, -part)) * LN2
            tl.store(stat_ptr, tl.where(scored, entropy, 0.0), mask=inside)
            stat_ptr += num_tokens
        if MEAN_LOGIT:
            mean_logit = mean_logit / vocab_size / MEAN_UNIT * (scale * LN2)
            tl.store(stat_ptr, tl.where(scored, mean_logit, 0.0), mask=inside)
            stat_ptr += num_tokens
        if TOP1:
            # The first maximum wins a tie, as in torch.argmax.
            loses = (earlier >= target) | ((peak > target) & (others > 0.0))
            tl.store(stat_ptr, tl.where(scored & ~loses, 1.0, 0.0), mask=inside)
            stat_ptr += num_tokens
        if LOG_SUM_SQ_PROBS:
            binades, m = split_log(square_sum * shrink * shrink + e_y * e_y)
            log_m, log_m_rest = log1p(m)
            log_squares = (binades - 2.0 * whole - 2.0 * part) * LN2 + log_m
            tl.store(stat_ptr, tl.where(scored, log_squares, 0.0), mask=inside)


# One program per sequence. Ends are cut to what there is: a wrong one reads nothing outside.
@triton.jit(do_not_specialize=["num_tokens", "seq_len"])
def _sequences_kernel(
    logps_ptr,  # (N,) float32
    rests_ptr,  # (N,) float32, of their rounding
    weights_ptr,  # (N,) float32, 0 where not scored
    cu_seqlens_ptr,  # (S + 1,) int32 or int64, or None: sequences of seq_len tokens
    values_ptr,  # (S,) float32, out
    lengths_ptr,  # (S,) float32, out: sum of weights
    num_tokens,
    seq_len,
    MEAN: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    if cu_seqlens_ptr is not None:
        first = tl.maximum(tl.load(cu_seqlens_ptr + s).to(tl.int64), 0)
        bound = tl.minimum(tl.load(cu_seqlens_ptr + s + 1).to(tl.int64), num_tokens)
    else:
        first = s * seq_len
        bound = first + seq_len
    # Each lane keeps a sum and its rest; lanes are added in float64, of which that is all.
    total = tl.zeros([LANES], tl.float32)
    total_rest = tl.zeros([LANES], tl.float32)
    length = tl.zeros([LANES], tl.float32)
    length_rest = tl.zeros([LANES], tl.float32)
    num_scored = tl.zeros([LANES], tl.int32)
    for start in range(first, bound, UNROLL * LANES):
        for i in tl.static_range(UNROLL):  # their loads do not wait for each other
            n = start + i * LANES + tl.arange(0, LANES)
            weight = tl.load(weights_ptr + n, mask=n < bound, other=0.0)
            scored = weight != 0.0
            logp = tl.load(logps_ptr + n, mask=scored, other=0.0)
            logp_rest = tl.load(rests_ptr + n, mask=scored, other=0.0)
            share, share_rest = two_product(weight, logp)
            total, rest = two_sum(total, share)
            total_rest += rest + share_rest + weight * logp_rest
            length, rest = two_sum(length, weight)
            length_rest += rest
            num_scored += scored.to(tl.int32)
    value = tl.sum(total.to(tl.float64)) + tl.sum(total_rest)
    weight_sum = tl.sum(length.to(tl.float64)) + tl.sum(length_rest)
    if MEAN:
        value = value / tl.where(tl.sum(num_scored) > 0, weight_sum, 1.0)
    tl.store(values_ptr + s, value.to(tl.float32))
    tl.store(lengths_ptr + s, weight_sum.to(tl.float32))


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
    seq_len = weights.shape[1]
    num_tokens, num_sequences = weights.numel(), out.values.shape[0]
    gpu = gpu_target(weights)
    rests = torch.empty_like(target)
    with on_device(weights):
        if num_tokens > 0:
            launch(
                _combine_kernel,
                -(-num_tokens // BLOCK_T),
                (sums, target, weights, out.logps, rests, out.softmax, out.stats),
                (*sums.stride()[:2], num_tokens, sums.shape[1], vocab_size),
                (scaling.exponent_scale,),
                _constants(tuple(stats), gpu),
            )
        if num_sequences > 0:
            ends = None if cu_seqlens is None else cu_seqlens.contiguous()
            launch(
                _sequences_kernel,
                num_sequences,
                (out.logps, rests, weights, ends, out.values, out.lengths),
                (num_tokens, seq_len),
                (),
                _sequence_constants(reduction == "mean", gpu),
            )


@functools.cache
def _constants(stats: tuple[str, ...], target: Any) -> dict[str, Any]:
    return dict(
        ENTROPY="entropy" in stats,
        MEAN_LOGIT="mean_logit" in stats,
        TOP1="top1" in stats,
        LOG_SUM_SQ_PROBS="log_sum_sq_probs" in stats,
        BLOCK_T=BLOCK_T,
        BLOCK_K=BLOCK_K,
        num_warps=BLOCK_T // warp_size(target),
    )


@functools.cache
def _sequence_constants(is_mean: bool, target: Any) -> dict[str, Any]:
    warps = LANES // warp_size(target)
    return dict(MEAN=is_mean, LANES=LANES, UNROLL=UNROLL, num_warps=warps)
