"""First stage: one pass over the scored rows; see `kernels/partials.py` for the mathematics.

A block of a row is read from the logits once, then walked for its maximum and its exponentials. It
is filled up with -inf, so that no loop ends in single elements, and the target's -inf leaves it out
of sums. Sums over a block may be added in any order, that of the blocks and all products are fixed:
a row's bits are its own, whichever thread has it.
"""

import numpy as np
from numba import carray
from torch import Tensor

from .._records import Columns, Partials, Scaling, Stats, Tokens
from ._compiled import compiled, inner
from ._numbers import (
    BLOCK,
    LANES,
    at,
    cap,
    cast_bits,
    claim,
    exp2,
    int_like,
    number,
    order_key,
    view,
)
from ._rows import (
    ELEMENTS,
    ENTROPY,
    LOG_SUM_SQ_PROBS,
    MEAN_LOGIT,
    TOP1,
    contiguous,
    flags,
    int64,
    numbers,
)
from ._threads import share_rows

# A block of a row: u[:size], and -inf up to a multiple of LANES.


@inner
def load(x, size, u, logit_scale, softcap):
    """Fill u from logits x, and return how much of it is filled."""
    for i in range(size):
        u[i] = cap(number(x[i]), logit_scale, softcap)
    filled = (size + LANES - 1) // LANES * LANES
    for i in range(size, filled):
        u[i] = -np.inf
    return filled


@inner
def largest(u, start, stop):
    """Of u[start:stop], by order_key: comparing floats is not vectorised, for their NaN."""
    here = u[start:stop]
    top = order_key(cast_bits(u.dtype.type(-np.inf), int_like(u[0])))
    for i in range(len(here)):
        key = order_key(cast_bits(here[i], int_like(here[i])))
        top = key if key > top else top
    return cast_bits(order_key(top), u[0])


@inner(fastmath={"reassoc"})
def total_of(u, filled, peak, scale):
    """Sum of 2 ** exponent. Exponents are differences from the peak first, exact where they matter
    and never too large, at any size of logits."""
    total = u.dtype.type(0.0)
    for i in range(filled):
        total += exp2((u[i] - peak) * scale)
    return total


@inner(fastmath={"reassoc"})
def products_of(u, filled, peak, scale):
    """Sums of 2 ** exponent * exponent, where a banned token's is 0, and of 4 ** exponent."""
    products, squares = u.dtype.type(0.0), u.dtype.type(0.0)
    lowest = u.dtype.type(-1.0e4)
    for i in range(filled):
        exponent = (u[i] - peak) * scale
        e = exp2(exponent)
        products += e * (lowest if exponent < lowest else exponent)
        squares += e * e
    return products, squares


@inner(fastmath={"reassoc"})
def sum_of(u, size):
    total = 0.0
    for i in range(size):
        total += np.float64(u[i])
    return total


@compiled
def token_weights(
    num_tokens, seq_len, shift, ignore_index, labels, mask, cu_seqlens, num_sequences, weights, like
):
    """Write the tokens' weights (N,). The mask has the type of `like`, as weights have.

    Without a mask, or cu_seqlens (S + 1,), their address is 0. Tokens beyond the last sequence are
    not scored.
    """
    labels, weights = view(labels, num_tokens, 0), view(weights, num_tokens, like)
    has_mask, is_packed = mask != 0, cu_seqlens != 0
    mask, ends = view(mask, num_tokens, like), view(cu_seqlens, num_sequences + 1, 0)
    zero, one = weights.dtype.type(0.0), weights.dtype.type(1.0)
    sequence, stop = 0, 0
    for n in range(num_tokens):
        is_first = n % seq_len == 0
        if is_packed:
            is_first = n == stop
            while sequence < num_sequences and n >= stop:
                sequence += 1
                stop = ends[sequence]
        is_scored = labels[n] != ignore_index and not (shift and is_first)
        is_scored = is_scored and (n < stop or not is_packed)
        weights[n] = (mask[n] if has_mask else one) if is_scored else zero


@compiled
def fold_rows(
    counter, step, num_tokens, seq_len, shift, first_column, num_columns, vocab_size,
    logits, element, stride_b, stride_t, labels, weights, target, sums, channel,
    scale, logit_scale, softcap, stats,
):  # fmt: skip
    """Write target (N,) and sums (C, 1, N) of scored tokens, claiming `step` of them at a time.

    Logits have the type of `element`, all others that of `scale`; from one channel of sums to the
    next are `channel` numbers. softcap may be None, and stats, flags of what else is asked for.
    """
    labels, weights = view(labels, num_tokens, 0), view(weights, num_tokens, scale)
    target, sums = view(target, num_tokens, scale), view(sums, 1, scale)
    u = np.empty(BLOCK, target.dtype)
    lowest = target.dtype.type(np.finfo(target.dtype).min)
    minus_inf = target.dtype.type(-np.inf)
    while True:
        first = claim(counter, step)
        if first >= num_tokens:
            return
        for n in range(first, min(first + step, num_tokens)):
            if weights[n] == 0:
                continue
            row = n - 1 if shift else n
            offset = row // seq_len * stride_b + row % seq_len * stride_t
            y = labels[n] - first_column
            if 0 <= y < num_columns:
                x_y = number(carray(at(logits, offset + y, element), 1)[0])
                target[n] = cap(x_y, logit_scale, softcap)
            peak, total = lowest, 0.0  # finite, so that a block of -inf makes no inf - inf
            products, logit_sum, squares = 0.0, 0.0, 0.0
            earlier, later = minus_inf, minus_inf  # the largest before the target, and after
            for start in range(0, num_columns, BLOCK):
                size = min(BLOCK, num_columns - start)
                x = carray(at(logits, offset + start, element), size)
                filled = load(x, size, u, logit_scale, softcap)
                place = y - start
                if stats is not None:
                    logit_sum += sum_of(u, size)
                if 0 <= place < size:
                    u[place] = minus_inf
                new_peak = max(largest(u, 0, filled), peak)
                drop = (np.float64(peak) - new_peak) * scale
                shrink = np.exp2(drop)
                if stats is not None:
                    of_block, squares_of_block = products_of(u, filled, new_peak, scale)
                    moved = (products + drop * total) * shrink if total > 0 else 0.0
                    products = moved + of_block
                    squares = squares * shrink * shrink + squares_of_block
                    split = min(max(place, 0), size)
                    earlier = max(earlier, largest(u, 0, split))
                    later = max(later, largest(u, split, size))
                total = total * shrink + total_of(u, filled, new_peak, scale)
                peak = new_peak
            sums[n], sums[n + channel] = peak, total
            if stats is not None:
                place = n + 2 * channel
                if stats & ENTROPY:
                    sums[place] = products
                    place += channel
                if stats & MEAN_LOGIT:  # of the whole vocabulary: a sum could be too large
                    sums[place] = logit_sum / vocab_size
                    place += channel
                if stats & TOP1:  # the target is the first maximum if it is larger than this
                    sums[place] = max(earlier, np.nextafter(later, minus_inf))
                    place += channel
                if stats & LOG_SUM_SQ_PROBS:
                    sums[place] = squares


def partials(
    logits: Tensor, tokens: Tokens, columns: Columns, scaling: Scaling, stats: Stats, out: Partials
) -> None:
    """Write the partials, K = 1, of float32, or float64 like the logits."""
    sums, target, weights = out
    dtype, num_tokens, seq_len = weights.dtype, weights.numel(), weights.shape[1]
    labels, mask, cu_seqlens = int64(tokens.labels), tokens.mask, tokens.cu_seqlens
    mask = None if mask is None else contiguous(mask, dtype)
    cu_seqlens = None if cu_seqlens is None else int64(cu_seqlens)
    of_scaling = numbers(scaling, dtype)
    token_weights(
        num_tokens, seq_len, tokens.shift, tokens.ignore_index, labels.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        0 if cu_seqlens is None else cu_seqlens.data_ptr(),
        0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        weights.data_ptr(), ELEMENTS[dtype],
    )  # fmt: skip
    share_rows(
        fold_rows, num_tokens, columns.width,
        seq_len, tokens.shift, *columns, logits.data_ptr(), ELEMENTS[logits.dtype],
        *logits.stride()[:2], labels.data_ptr(), weights.data_ptr(), target.data_ptr(),
        sums.data_ptr(), sums.stride(0), of_scaling.exponent_scale, *of_scaling.of_cap,
        flags(stats),
    )  # fmt: skip
