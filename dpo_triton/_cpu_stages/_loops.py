"""What is compiled: loops over rows, in the order of the three stages.

All of it is in this file, because numba's cache on disk looks at no other for changes.

A row goes through `u`, a block of it in float32 (or float64) that stays in the first-level cache:
read from the logits once, then walked for its maximum and for its exponentials. Blocks are filled
up with -inf, so that no loop ends in single elements, and the target's -inf leaves it out of sums.
Sums over a block may be added in any order, that of the blocks and all products are fixed: a row's
bits are its own, whichever thread has it.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic, overload

BLOCK = 1024
LANES = 64  # what a block is filled up to: the most elements that a vectorised loop takes at a time
F32, I16, I32, U16, U32 = np.float32, np.int16, np.int32, np.uint16, np.uint32
# 2 ** x on [-0.5, 0.5]: 1 at 0, coefficients by Remez' exchange, relative error below 9.2e-8.
C1, C2, C3 = F32(0.6931470036506653), F32(0.24022242426872253), F32(0.05550733581185341)
C4, C5 = F32(0.009671512991189957), F32(0.001326472731307149)
# Added to x, it leaves round(x) + 127 in the low bits: the exponent's field of 2 ** round(x).
SHIFTER = F32(1.5 * 2.0**23 + 127.0)
LN2 = float(np.log(2.0))
ENTROPY, MEAN_LOGIT, TOP1, LOG_SUM_SQ_PROBS = 1, 2, 4, 8  # in the order of the partials' channels


def compiled(function: Callable[..., Any]) -> Any:
    """Compiled for the types of its first call, without the GIL, and kept on disk."""
    dispatcher = njit(function, nogil=True, error_model="numpy")
    try:
        dispatcher.enable_caching()
    except RuntimeError:
        warnings.warn(
            "dpo_triton: numba finds no folder to keep compiled code in, so every process compiles "
            "anew, for seconds; set NUMBA_CACHE_DIR to a folder that can be written to",
            stacklevel=2,
        )
    return dispatcher


@intrinsic
def at(_, address, index, like):
    """Pointer to an element of what begins at address, of the type of `like`."""
    pointer = types.CPointer(like)

    def generate(context, builder, signature, args):
        base = builder.inttoptr(args[0], context.get_value_type(pointer))
        return builder.gep(base, [args[1]])

    return pointer(types.int64, types.int64, like), generate


@njit
def view(address, size, like):
    """What begins at address as an array (size,) of the type of `like`."""
    return carray(at(address, 0, like), size)


@intrinsic
def cast_bits(_, x, like):
    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(like))

    return like(x, like), generate


@intrinsic
def fma(_, x, y, z):
    """x * y + z, rounded once, whatever the compiler would make of the plain expression."""

    def generate(context, builder, signature, args):
        return builder.fma(*args)

    return x(x, x, x), generate


@intrinsic
def claim(_, address, step):
    """Add step to the counter at address and return what it was: threads share rows by it."""

    def generate(context, builder, signature, args):
        counter = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, args[1], "monotonic")

    return types.int64(types.int64, types.int64), generate


# Numbers in memory: uint16 stands for bfloat16 and int16 for float16, which NumPy or numba lack.
# In numba the sum, shift or product of two 32-bit integers has 64, hence the casts.


def number(x):
    """An element of the logits as float32, or float64 if it is one."""


def rounded(x, like):
    """x to nearest, ties to even, as an element of the type of `like`."""


@overload(number)
def _number(x):
    if x is types.uint16:
        return lambda x: cast_bits(U32(U32(x) << U32(16)), F32(0))
    if x is types.int16:
        return _float16
    return lambda x: x


def _float16(x):
    magnitude = I32(I32(x) & I32(0x7FFF))
    bits = I32(I32(magnitude << I32(13)) + I32(112 << 23))
    bits = I32(bits | I32(0x7F800000)) if magnitude >= I32(0x7C00) else bits
    value = cast_bits(bits, F32(0))
    value = F32(magnitude) * F32(2.0**-24) if magnitude < I32(0x400) else value
    return -value if I32(x) < I32(0) else value


@overload(rounded)
def _rounded(x, like):
    if like is types.uint16:
        return _to_bfloat16
    if like is types.int16:
        return _to_float16
    return lambda x, like: x


def _to_bfloat16(x, like):
    bits = cast_bits(x, U32(0))
    is_odd = U32(U32(bits >> U32(16)) & U32(1))
    nearest = U32(U32(bits + U32(U32(0x7FFF) + is_odd)) >> U32(16))
    return U16(0x7FC0) if x != x else U16(nearest)


def _to_float16(x, like):
    bits = cast_bits(x, U32(0))
    magnitude = U32(bits & U32(0x7FFFFFFF))
    is_odd = U32(U32(magnitude >> U32(13)) & U32(1))
    nearest = U32(U32(U32(magnitude - U32(112 << 23)) + U32(U32(0xFFF) + is_odd)) >> U32(13))
    # Below 2 ** -14 adding 0.5 rounds to multiples of 2 ** -24.
    small = cast_bits(cast_bits(magnitude, F32(0)) + F32(0.5), U32(0))
    nearest = U32(small - U32(126 << 23)) if magnitude < U32(113 << 23) else nearest
    nearest = U32(0x7C00) if magnitude >= U32(0x477FF000) else nearest
    nearest = U32(0x7E00) if magnitude > U32(0x7F800000) else nearest
    return I16(U32(nearest | U32(U32(bits >> U32(16)) & U32(0x8000))))


def order_key(x):
    """Bits of x as an integer with the order of the numbers; NaN last or first. Its own inverse."""


@overload(order_key)
def _order_key(x):
    if x is types.int32:
        return lambda x: I32(x ^ I32(I32(x >> I32(31)) & I32(0x7FFFFFFF)))
    return lambda x: x ^ ((x >> 63) & 0x7FFFFFFFFFFFFFFF)


def int_like(x):
    """0 as an integer of as many bits as x."""


@overload(int_like)
def _int_like(x):
    return (lambda x: I32(0)) if x is types.float32 else (lambda x: 0)


def exp2(x):
    """2 ** x for x <= 127; float32: 0 below -126.5, NaN stays."""


@overload(exp2)
def _exp2(x):
    if x is types.float64:
        return lambda x: np.exp2(x)

    def exp2_of_float32(x):
        x = F32(-127.0) if x < F32(-127.0) else x
        shifted = x + SHIFTER
        f = x - (shifted - SHIFTER)
        p = fma(fma(fma(fma(fma(C5, f, C4), f, C3), f, C2), f, C1), f, F32(1.0))
        return p * cast_bits(U32(cast_bits(shifted, U32(0)) << U32(23)), F32(0))

    return exp2_of_float32


def tanh(x):
    """As that of kernels/_tiles.py, which says where its coefficients come from."""


@overload(tanh)
def _tanh(x):
    if x is types.float64:
        return lambda x: np.tanh(x)

    def tanh_of_float32(x):
        y = x * x
        p = fma(fma(F32(-0.0058939453), y, F32(0.0207946177)), y, F32(-0.0537832930))
        p = fma(fma(p, y, F32(0.1333191530)), y, F32(-0.3333329751))
        near_zero = fma(x * y, p, x)
        size = abs(x)
        size = F32(10.0) if size > F32(10.0) else size  # tanh is 1 there
        tail = F32(1.0) - F32(2.0) / (F32(1.0) + exp2(size * F32(2.8853900817779268)))
        return near_zero if size < F32(0.6) else (-tail if x < F32(0.0) else tail)

    return tanh_of_float32


@njit
def cap(x, logit_scale, softcap):
    """u of a logit; without a softcap logit_scale is part of the slope of z in u."""
    if softcap is None:
        return x
    return softcap * tanh(x * (logit_scale / softcap))


# A block of a row: u[:size], and -inf up to a multiple of LANES.


@njit
def load(x, size, u, logit_scale, softcap):
    """Fill u from logits x, and return how much of it is filled."""
    for i in range(size):
        u[i] = cap(number(x[i]), logit_scale, softcap)
    filled = (size + LANES - 1) // LANES * LANES
    for i in range(size, filled):
        u[i] = -np.inf
    return filled


@njit
def largest(u, start, stop):
    """Of u[start:stop], by order_key: comparing floats is not vectorised, for their NaN."""
    here = u[start:stop]
    top = order_key(cast_bits(u.dtype.type(-np.inf), int_like(u[0])))
    for i in range(len(here)):
        key = order_key(cast_bits(here[i], int_like(here[i])))
        top = key if key > top else top
    return cast_bits(order_key(top), u[0])


@njit(fastmath={"reassoc"})
def total_of(u, filled, peak, scale):
    """Sum of 2 ** exponent. Exponents are differences from the peak first, exact where they matter
    and never too large, at any size of logits."""
    total = u.dtype.type(0.0)
    for i in range(filled):
        total += exp2((u[i] - peak) * scale)
    return total


@njit(fastmath={"reassoc"})
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


@njit(fastmath={"reassoc"})
def sum_of(u, size):
    total = 0.0
    for i in range(size):
        total += np.float64(u[i])
    return total


# First stage.


@compiled
def token_weights(
    num_tokens, seq_len, shift, ignore_index, labels, mask, cu_seqlens, num_sequences, weights, real
):
    """Write the tokens' weights (N,). The mask has the type of `real`, as weights have.

    Without a mask, or cu_seqlens (S + 1,), their address is 0. Tokens beyond the last sequence are
    not scored.
    """
    labels, weights = view(labels, num_tokens, 0), view(weights, num_tokens, real)
    has_mask, is_packed = mask != 0, cu_seqlens != 0
    mask, ends = view(mask, num_tokens, real), view(cu_seqlens, num_sequences + 1, 0)
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


# Second stage; see kernels/combine.py for the formulas.


@njit
def combine_token(
    n, num_tokens, sums, channel, split, num_splits, x_y, scale, stats, limit, softmax, token_stats
):
    """Write what one scored token gets, and return its log-probability in float64."""
    peak = np.float64(sums[n])
    for k in range(1, num_splits):
        peak = max(peak, np.float64(sums[k * split + n]))
    others, products, squares, logit_sum, rival = 0.0, 0.0, 0.0, 0.0, -np.inf
    for k in range(num_splits):
        place = k * split + n
        offset = (sums[place] - peak) * scale
        shrink = np.exp2(offset)
        total = np.float64(sums[place + channel])
        others += total * shrink
        place += 2 * channel
        if stats & ENTROPY:
            products += (sums[place] + offset * total) * shrink if total != 0.0 else 0.0
            place += channel
        if stats & MEAN_LOGIT:
            logit_sum += sums[place]
            place += channel
        if stats & TOP1:
            rival = max(rival, np.float64(sums[place]))
            place += channel
        if stats & LOG_SUM_SQ_PROBS:
            squares += sums[place] * shrink * shrink

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
        used = 2.0 ** (np.log2(limit) - np.floor(np.log2(abs(row_peak))))
        reference = row_peak * used
    log2_total = np.log2(total)
    softmax[0][n] = (1.0 if log_odds > 0.0 else e) / (1.0 + e)
    if total == 0.0:  # nobody but the target is asked about, or all are banned
        softmax[1][n], softmax[2][n] = 0.0, 0.0
    else:
        softmax[1][n] = reference + log2_total if log2_total >= 1.0 else reference
        softmax[2][n] = np.exp2(softmax[1][n] - reference - log2_total)
    softmax[3][n] = used

    if stats & ENTROPY:  # log total - sum of p * (z - peak)
        products = (products + offset * others) * shrink if others != 0.0 else 0.0
        products += e_y * target_offset if e_y != 0.0 else 0.0
        token_stats[n] = (log2_total - products / total) * LN2
        n += num_tokens
    if stats & MEAN_LOGIT:
        token_stats[n] = logit_sum * scale * LN2
        n += num_tokens
    if stats & TOP1:
        token_stats[n] = 1.0 if rival < x_y else 0.0
        n += num_tokens
    if stats & LOG_SUM_SQ_PROBS:
        squares = squares * shrink * shrink + e_y * e_y
        token_stats[n] = (np.log2(squares) - 2.0 * log2_total) * LN2
    return -(max(log_odds, 0.0) + np.log1p(e))


@compiled
def combine_sequences(
    num_tokens, seq_len, num_sequences, sums, channel, split, num_splits, target, weights,
    cu_seqlens, is_mean, scale, stats, num_stats, values, lengths, logps, softmax, pitch,
    token_stats,
):  # fmt: skip
    """Write all outputs, all of the type of `scale`. sums (C, K, N) go from one channel, and from
    one split, to the next by so many numbers; softmax (4, N) by `pitch`. Where cu_seqlens is 0,
    sequences have seq_len tokens."""
    target, weights = view(target, num_tokens, scale), view(weights, num_tokens, scale)
    values, lengths = view(values, num_sequences, scale), view(lengths, num_sequences, scale)
    logps, sums, token_stats = (
        view(logps, 1, scale),
        view(sums, 1, scale),
        view(token_stats, 1, scale),
    )
    rows = softmax_rows(softmax, pitch, scale)
    is_packed, ends = cu_seqlens != 0, view(cu_seqlens, num_sequences + 1, 0)
    limit = 2.0 ** (30 if target.itemsize == 4 else 59)
    stop = 0
    for s in range(num_sequences + 1):  # after the last one, what belongs to none
        first, stop = stop, num_tokens
        if s < num_sequences:
            stop = ends[s + 1] if is_packed else (s + 1) * seq_len
        value, length, num_scored = 0.0, 0.0, 0
        for n in range(first, stop):
            logp = 0.0
            if weights[n] != 0:
                logp = combine_token(
                    n, num_tokens, sums, channel, split, num_splits, np.float64(target[n]),
                    np.float64(scale), stats, limit, rows, token_stats,
                )  # fmt: skip
                value += logp * weights[n]
                length += weights[n]
                num_scored += 1
            else:
                for e in range(num_stats):
                    token_stats[n + e * num_tokens] = 0.0
            logps[n] = logp
        if s < num_sequences:
            values[s] = value / length if is_mean and num_scored > 0 else value
            lengths[s] = length


@njit
def softmax_rows(address, pitch, like):
    """The rows of a softmax (4, N)."""
    return (
        carray(at(address, 0, like), 1),
        carray(at(address, pitch, like), 1),
        carray(at(address, 2 * pitch, like), 1),
        carray(at(address, 3 * pitch, like), 1),
    )


# Third stage.


@compiled
def grad_rows(
    counter, step, num_tokens, seq_len, shift, first_column, num_columns,
    logits, element, stride_b, stride_t, labels, weights, grad_logps, grad_stride_b, grad_stride_t,
    softmax, pitch, slope, logit_scale, softcap, out, out_stride_b, out_stride_t, fill_zeros,
):  # fmt: skip
    """Write the gradient of the rows of scored tokens, claiming `step` rows at a time, and zeros to
    the others if asked to. Logits have the type of `element`, all others that of `slope`."""
    labels, weights = view(labels, num_tokens, 0), view(weights, num_tokens, slope)
    complement, reference, share, scale = softmax_rows(softmax, pitch, slope)
    u = np.empty(BLOCK, weights.dtype)
    one = weights.dtype.type(1.0)
    while True:
        first = claim(counter, step)
        if first >= num_tokens:
            return
        for row in range(first, min(first + step, num_tokens)):
            n = row + 1 if shift else row
            b, t = row // seq_len, row % seq_len
            place = b * out_stride_b + t * out_stride_t
            if n >= num_tokens or weights[n] == 0:
                if fill_zeros:
                    carray(at(out, place, element), num_columns)[:] = element
                continue
            index = n // seq_len * grad_stride_b + n % seq_len * grad_stride_t
            upstream = carray(at(grad_logps, index, slope), 1)[0]
            coefficient = upstream * weights[n] * slope
            offset = b * stride_b + t * stride_t
            for start in range(0, num_columns, BLOCK):
                size = min(BLOCK, num_columns - start)
                x = carray(at(logits, offset + start, element), size)
                y = labels[n] - first_column - start
                chain = one
                if softcap is not None and 0 <= y < size:  # its own, before u is overwritten
                    chain = chain_of(tanh(number(x[y]) * (logit_scale / softcap)), logit_scale)
                gradient_of_others(
                    x,
                    size,
                    u,
                    scale[n],
                    reference[n],
                    -coefficient * share[n],
                    logit_scale,
                    softcap,
                )
                if 0 <= y < size:
                    u[y] = coefficient * complement[n] * chain
                to = carray(at(out, place + start, element), size)
                for i in range(size):
                    to[i] = rounded(u[i], element)


@njit
def chain_of(tanh_x, logit_scale):
    """du / dx with a softcap."""
    return logit_scale - logit_scale * (tanh_x * tanh_x)


@njit
def gradient_of_others(x, size, u, scale, reference, share, logit_scale, softcap):
    """u[i] = share * 2 ** (scale * u - reference) * du / dx."""
    for i in range(size):
        if softcap is None:
            u[i] = share * exp2(fma(number(x[i]), scale, -reference))
        else:
            th = tanh(number(x[i]) * (logit_scale / softcap))
            p = share * exp2(fma(softcap * th, scale, -reference))
            u[i] = p * chain_of(th, logit_scale)
