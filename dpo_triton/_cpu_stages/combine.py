"""Second stage: from partials to log-probabilities and sequences; see `kernels/combine.py`."""

import numpy as np
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

from .._records import LN2, Combined, Partials, Scaling, Stats
from ._compiled import compiled, inner
from ._numbers import softmax_rows, view
from ._rows import ENTROPY, LOG_SUM_SQ_PROBS, MEAN_LOGIT, TOP1, flags, int64, numbers


@inner
def combine_token(n, sums, x_y, scale, stats, limit, softmax, token_stats):
    """Write what one scored token gets of sums (C, K, N) to softmax (4, N) and token_stats (E, N),
    and return its log-probability in float64."""
    num_splits = sums.shape[1]
    peak = np.float64(sums[0, 0, n])
    for k in range(1, num_splits):
        peak = max(peak, np.float64(sums[0, k, n]))
    others, products, squares, logit_sum, rival = 0.0, 0.0, 0.0, 0.0, -np.inf
    for k in range(num_splits):
        offset = (sums[0, k, n] - peak) * scale
        shrink = np.exp2(offset)
        total = np.float64(sums[1, k, n])
        others += total * shrink
        if stats is not None:
            channel = 2
            if stats & ENTROPY:
                product = sums[channel, k, n] + offset * total
                products += product * shrink if total != 0.0 else 0.0
                channel += 1
            if stats & MEAN_LOGIT:
                logit_sum += sums[channel, k, n]
                channel += 1
            if stats & TOP1:
                rival = max(rival, np.float64(sums[channel, k, n]))
                channel += 1
            if stats & LOG_SUM_SQ_PROBS:
                squares += sums[channel, k, n] * shrink * shrink

    log_odds = ((peak - x_y) * scale + np.log2(others)) * LN2
    if not x_y < np.inf:  # would look certain: inf < inf and nan < inf are both false
        log_odds = np.nan
    e = np.exp(-abs(log_odds))

    # The whole row, its target included, is what the gradient divides by.
    row_peak = max(peak, x_y)
    offset, target_offset = (peak - row_peak) * scale, (x_y - row_peak) * scale
    shrink, e_y = np.exp2(offset), np.exp2(target_offset)
    total = others * shrink + e_y
    # Exponents of the gradient are relative to the peak, where they are exact, or to the total of a
    # flat row. A peak whose product with the scale keeps too few digits for that is scaled by a
    # power of 2 instead: who is not equal to it has a share below 2 ** -64 then, by either scale.
    used, reference = scale, row_peak * scale
    if limit <= abs(reference) and abs(row_peak) < np.inf:
        used = np.exp2(np.log2(limit) - np.floor(np.log2(abs(row_peak))))
        reference = row_peak * used
    log2_total = np.log2(total)
    softmax[0][n] = (1.0 if log_odds > 0.0 else e) / (1.0 + e)
    if total == 0.0:  # nobody but the target is asked about, or all are banned
        softmax[1][n], softmax[2][n] = 0.0, 0.0
    else:
        softmax[1][n] = reference + log2_total if log2_total >= 1.0 else reference
        softmax[2][n] = np.exp2(softmax[1][n] - reference - log2_total)
    softmax[3][n] = used

    if stats is not None:
        stat = 0
        if stats & ENTROPY:  # log total - sum of p * (z - peak)
            products = (products + offset * others) * shrink if others != 0.0 else 0.0
            products += e_y * target_offset if e_y != 0.0 else 0.0
            token_stats[stat, n] = (log2_total - products / total) * LN2
            stat += 1
        if stats & MEAN_LOGIT:
            token_stats[stat, n] = logit_sum * scale * LN2
            stat += 1
        if stats & TOP1:
            token_stats[stat, n] = 1.0 if rival < x_y else 0.0
            stat += 1
        if stats & LOG_SUM_SQ_PROBS:
            squares = squares * shrink * shrink + e_y * e_y
            token_stats[stat, n] = (np.log2(squares) - 2.0 * log2_total) * LN2
    return -(max(log_odds, 0.0) + np.log1p(e))


@compiled
def combine_sequences(
    num_tokens, seq_len, num_sequences, sums, pitch_c, pitch_k, num_splits, target, weights,
    cu_seqlens, is_mean, scale, stats, num_stats, values, lengths, logps, softmax, pitch,
    token_stats,
):  # fmt: skip
    """Write all outputs, all of the type of `scale`. sums (C, K, N) go from one channel, and from
    one split, to the next by so many numbers; softmax (4, N) by `pitch`. Where cu_seqlens is 0,
    sequences have seq_len tokens."""
    target, weights = view(target, num_tokens, scale), view(weights, num_tokens, scale)
    values, lengths = view(values, num_sequences, scale), view(lengths, num_sequences, scale)
    logps = view(logps, num_tokens, scale)
    size, shape = target.itemsize, (2 + num_stats, num_splits, num_tokens)
    sums = as_strided(view(sums, 1, scale), shape, (pitch_c * size, pitch_k * size, size))
    token_stats = view(token_stats, (num_stats, num_tokens), scale)
    rows = softmax_rows(softmax, pitch, scale)
    is_packed, ends = cu_seqlens != 0, view(cu_seqlens, num_sequences + 1, 0)
    limit = np.exp2(30.0 if size == 4 else 59.0)
    stop = 0
    for s in range(num_sequences + 1):  # after the last one, what belongs to none
        first, stop = stop, num_tokens
        if s < num_sequences:
            stop = ends[s + 1] if is_packed else (s + 1) * seq_len
        value, length, num_scored = 0.0, 0.0, 0
        for n in range(first, stop):
            logp = 0.0
            if weights[n] != 0:
                x_y = np.float64(target[n])
                logp = combine_token(
                    n, sums, x_y, np.float64(scale), stats, limit, rows, token_stats
                )
                value += logp * weights[n]
                length += weights[n]
                num_scored += 1
            else:
                token_stats[:, n] = 0.0
            logps[n] = logp
        if s < num_sequences:
            values[s] = value / length if is_mean and num_scored > 0 else value
            lengths[s] = length


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
    sums, target, weights = partials
    cu_seqlens = None if cu_seqlens is None else int64(cu_seqlens)
    combine_sequences(
        weights.numel(), weights.shape[1], out.values.shape[0],
        sums.data_ptr(), sums.stride(0), sums.stride(1), sums.shape[1],
        target.data_ptr(), weights.data_ptr(),
        0 if cu_seqlens is None else cu_seqlens.data_ptr(), reduction == "mean",
        numbers(scaling, weights.dtype).exponent_scale, flags(stats), len(stats),
        out.values.data_ptr(), out.lengths.data_ptr(), out.logps.data_ptr(),
        out.softmax.data_ptr(), out.softmax.stride(0), out.stats.data_ptr(),
    )  # fmt: skip
