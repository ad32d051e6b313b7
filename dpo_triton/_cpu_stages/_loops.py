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


@njit
def views(addresses, size, like):
    a, b, c, d = addresses
    return view(a, size, like), view(b, size, like), view(c, size, like), view(d, size, like)


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


@njit
def num_stats(stats):
    if stats is None:
        return 0
    return (stats & 1) + (stats >> 1 & 1) + (stats >> 2 & 1) + (stats >> 3 & 1)


# First stage.


@compiled
def token_weights(
    num_tokens, seq_len, shift, ignore_index, vocab_size,
    labels, mask, cu_seqlens, num_sequences, weights, real,
):  # fmt: skip
    """Write the tokens' weights (N,); return the numbers of scored tokens and of labels outside.

    The mask has the type of `real`. Without a mask, or cu_seqlens (S + 1,), their address is 0.
    Tokens beyond the last sequence are not scored.
    """
    labels, weights = view(labels, num_tokens, 0), view(weights, num_tokens, real)
    zero, one = weights.dtype.type(0.0), weights.dtype.type(1.0)
    has_mask, is_packed = mask != 0, cu_seqlens != 0
    mask, cu_seqlens = view(mask, num_tokens, real), view(cu_seqlens, num_sequences + 1, 0)
    num_scored, num_outside = 0, 0
    sequence, stop = 0, 0
    for n in range(num_tokens):
        weight = mask[n] if has_mask else one
        is_first = n % seq_len == 0
        if is_packed:
            is_first = False
            while sequence < num_sequences and n >= stop:
                sequence += 1
                is_first = True
                stop = cu_seqlens[sequence]
            if n >= stop:
                weight = zero
        if labels[n] == ignore_index or (shift and is_first):
            weight = zero
        weights[n] = weight
        if weight != 0:
            num_scored += 1
            if labels[n] < 0 or labels[n] >= vocab_size:
                num_outside += 1
    return num_scored, num_outside


@compiled
def fold_rows(
    counter, step, num_tokens, seq_len, num_columns, shift, first_column, vocab_size,
    logits, element, stride_b, stride_t, labels, weights,
    scale, logit_scale, softcap, stats, target, partials,
):  # fmt: skip
    """Write target (N,) and partials (C, N) of scored tokens, claiming `step` of them at a time.

    Logits have the type of `element`, all others that of `scale`. softcap may be None, and stats,
    flags of what else is asked for.
    """
    labels, weights = view(labels, num_tokens, 0), view(weights, num_tokens, scale)
    target = view(target, num_tokens, scale)
    num_channels = 2 + num_stats(stats)
    partials = view(partials, num_channels * num_tokens, scale).reshape(num_channels, num_tokens)
    u = np.empty(BLOCK, target.dtype)
    lowest = target.dtype.type(np.finfo(target.dtype).min)
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
            is_here = 0 <= y < num_columns
            target[n] = -np.inf
            if is_here:
                x_y = number(carray(at(logits, offset + y, element), 1)[0])
                target[n] = cap(x_y, logit_scale, softcap)

            peak, total = lowest, 0.0  # finite, so that a block of -inf makes no inf - inf
            products, logit_sum, squares = 0.0, 0.0, 0.0
            earlier, later = target.dtype.type(-np.inf), target.dtype.type(-np.inf)
            for start in range(0, num_columns, BLOCK):
                size = min(BLOCK, num_columns - start)
                x = carray(at(logits, offset + start, element), size)
                filled = load(x, size, u, logit_scale, softcap)
                place = y - start
                if stats is not None:
                    logit_sum += sum_of(u, size)
                if 0 <= place < size:
                    u[place] = -np.inf
                block_peak = max(largest(u, 0, filled), peak)
                shrink = np.exp2((np.float64(peak) - block_peak) * scale)
                block_total = total_of(u, filled, block_peak, scale)
                if stats is not None:
                    drop = (np.float64(peak) - block_peak) * scale
                    of_block, squares_of_block = products_of(u, filled, block_peak, scale)
                    moved = (products + drop * total) * shrink if total > 0 else 0.0
                    products = moved + of_block
                    squares = squares * shrink * shrink + squares_of_block
                    split = min(max(place, 0), size)
                    earlier = max(earlier, largest(u, 0, split))
                    later = max(later, largest(u, split, size))
                total = total * shrink + block_total
                peak = block_peak
            partials[0, n] = peak
            partials[1, n] = total
            if stats is not None:
                channel = 2
                if stats & ENTROPY:
                    partials[channel, n] = products
                    channel += 1
                if stats & MEAN_LOGIT:  # of the whole vocabulary: a sum could be too large
                    partials[channel, n] = logit_sum / vocab_size
                    channel += 1
                if stats & TOP1:  # the target is the first maximum if it is larger than this
                    below = np.nextafter(later, target.dtype.type(-np.inf))
                    partials[channel, n] = max(earlier, below)
                    channel += 1
                if stats & LOG_SUM_SQ_PROBS:
                    partials[channel, n] = squares


# Second stage.


@njit
def combine_token(n, partials, target, scale, vocab_size, stats, logps, of_grad, token_stats):
    """Write what one scored token gets, and return its log-probability in float64.

    See kernels/combine.py for the formulas.
    """
    num_splits = partials.shape[1]
    x_y = np.float64(target[n])
    peak = np.float64(partials[0, 0, n])
    for k in range(1, num_splits):
        peak = max(peak, np.float64(partials[0, k, n]))
    others, products, squares = 0.0, 0.0, 0.0
    logit_sum, rival = 0.0, -np.inf
    for k in range(num_splits):
        offset = (partials[0, k, n] - peak) * scale
        shrink = np.exp2(offset) if offset != 0.0 else 1.0
        total = np.float64(partials[1, k, n])
        others += total * shrink
        channel = 2
        if stats & ENTROPY:
            if total != 0.0:
                products += (partials[channel, k, n] + offset * total) * shrink
            channel += 1
        if stats & MEAN_LOGIT:
            logit_sum += partials[channel, k, n]
            channel += 1
        if stats & TOP1:
            rival = max(rival, np.float64(partials[channel, k, n]))
            channel += 1
        if stats & LOG_SUM_SQ_PROBS:
            squares += partials[channel, k, n] * shrink * shrink

    log_odds = ((peak - x_y) * scale + np.log2(others)) * LN2
    if not x_y < np.inf:  # would look certain: inf < inf and nan < inf are both false
        log_odds = np.nan
    e = np.exp(-abs(log_odds))
    logp = -(max(log_odds, 0.0) + np.log1p(e))
    logps[n] = logp

    # The whole row, its target included, is what the gradient divides by.
    row_peak = max(peak, x_y)
    offset, target_offset = (peak - row_peak) * scale, (x_y - row_peak) * scale
    row_shrink, e_y = np.exp2(offset), np.exp2(target_offset)
    total = others * row_shrink + e_y
    complement, reference, share, exponent_scale = of_grad
    # Exponents are relative to the peak, where they are exact, or to the total of a flat row. A
    # peak whose product with the scale has too few digits left for that is scaled by a power of 2
    # instead: all that is not equal to it has a share below 2 ** -64 then, by either scale.
    exponent_scale[n] = scale
    top = row_peak * scale
    limit = 2.0**59 if reference.itemsize == 8 else 2.0**30
    if limit <= abs(top) < np.inf:
        exponent_scale[n] = 2.0 ** (np.ceil(np.log2(limit)) - np.floor(np.log2(abs(row_peak))))
        top = row_peak * exponent_scale[n]
    log2_total = top + np.log2(total)
    reference[n] = top
    if log2_total - reference[n] >= 1.0:
        reference[n] = log2_total
    share[n] = np.exp2(reference[n] - log2_total)
    complement[n] = (1.0 if log_odds > 0.0 else e) / (1.0 + e)

    channel = 0
    if stats & ENTROPY:  # log total - sum of p * (z - peak)
        products = (products + offset * others) * row_shrink if others != 0.0 else 0.0
        products += e_y * target_offset if e_y != 0.0 else 0.0
        token_stats[channel, n] = (np.log2(total) - products / total) * LN2
        channel += 1
    if stats & MEAN_LOGIT:
        token_stats[channel, n] = logit_sum * scale * LN2
        channel += 1
    if stats & TOP1:
        token_stats[channel, n] = 1.0 if rival < x_y else 0.0
        channel += 1
    if stats & LOG_SUM_SQ_PROBS:
        squares = squares * row_shrink * row_shrink + e_y * e_y
        token_stats[channel, n] = (np.log2(squares) - 2.0 * np.log2(total)) * LN2
    return logp


@compiled
def combine_sequences(
    num_tokens, seq_len, num_sequences, num_splits, partials, target, weights, cu_seqlens,
    is_mean, scale, vocab_size, stats, values, lengths, logps, of_grad, token_stats,
):  # fmt: skip
    """Write all outputs, all of the type of `scale`. Where cu_seqlens is 0, sequences have seq_len
    tokens."""
    size, num_extras = num_splits * num_tokens, num_stats(stats)
    partials = view(partials, (2 + num_extras) * size, scale)
    partials = partials.reshape(2 + num_extras, num_splits, num_tokens)
    token_stats = view(token_stats, num_extras * num_tokens, scale).reshape(num_extras, num_tokens)
    target, weights = view(target, num_tokens, scale), view(weights, num_tokens, scale)
    values, lengths = view(values, num_sequences, scale), view(lengths, num_sequences, scale)
    logps, is_packed = view(logps, num_tokens, scale), cu_seqlens != 0
    of_grad = views(of_grad, num_tokens, scale)
    cu_seqlens = view(cu_seqlens, num_sequences + 1, 0)
    stop = 0
    for s in range(num_sequences + 1):  # after the last one, what belongs to none
        first = stop
        stop = num_tokens
        if s < num_sequences:
            stop = cu_seqlens[s + 1] if is_packed else (s + 1) * seq_len
        value, length, num_scored = 0.0, 0.0, 0
        for n in range(first, stop):
            if weights[n] == 0:
                logps[n] = 0
                token_stats[:, n] = 0
                continue
            logp = combine_token(
                n,
                partials,
                target,
                np.float64(scale),
                vocab_size,
                stats,
                logps,
                of_grad,
                token_stats,
            )
            value += logp * weights[n]
            length += weights[n]
            num_scored += 1
        if s < num_sequences:
            values[s] = value / length if is_mean and num_scored > 0 else value
            lengths[s] = length


# Third stage.


@njit
def fill_gradient(x, size, u, scale, reference, share, logit_scale, softcap):
    """u[i] = share * 2 ** (scale * u - reference), times du / dx = logit_scale * (1 - tanh ** 2)
    with a softcap."""
    for i in range(size):
        if softcap is None:
            u[i] = share * exp2(fma(number(x[i]), scale, -reference))
        else:
            th = tanh(number(x[i]) * (logit_scale / softcap))
            p = share * exp2(fma(softcap * th, scale, -reference))
            u[i] = p * (logit_scale * (u.dtype.type(1.0) - th * th))


@compiled
def grad_rows(
    counter, step, num_tokens, seq_len, num_columns, shift, first_column,
    logits, element, stride_b, stride_t, labels, weights, grad_logps, grad_stride_b, grad_stride_t,
    of_grad, slope, logit_scale, softcap, out, out_stride_b, out_stride_t, fill_zeros,
):  # fmt: skip
    """Write the gradient of the rows of scored tokens, claiming `step` rows at a time, and zeros to
    the others if asked to. Logits have the type of `element`, all others that of `slope`."""
    labels, weights = view(labels, num_tokens, 0), view(weights, num_tokens, slope)
    complement, reference, share, exponent_scale = views(of_grad, num_tokens, slope)
    u = np.empty(BLOCK, reference.dtype)
    while True:
        first = claim(counter, step)
        if first >= num_tokens:
            return
        for row in range(first, min(first + step, num_tokens)):
            n = row + 1 if shift else row
            b, t = row // seq_len, row % seq_len
            place = b * out_stride_b + t * out_stride_t
            is_scored = n < num_tokens and weights[n] != 0
            if not is_scored:
                if fill_zeros:
                    carray(at(out, place, element), num_columns)[:] = element
                continue
            index = n // seq_len * grad_stride_b + n % seq_len * grad_stride_t
            upstream = carray(at(grad_logps, index, slope), 1)[0]
            coefficient = upstream * weights[n] * slope
            offset = b * stride_b + t * stride_t
            y = labels[n] - first_column
            for start in range(0, num_columns, BLOCK):
                size = min(BLOCK, num_columns - start)
                x = carray(at(logits, offset + start, element), size)
                fill_gradient(
                    x, size, u, exponent_scale[n], reference[n], -coefficient * share[n],
                    logit_scale, softcap,
                )  # fmt: skip
                if 0 <= y - start < size:
                    u[y - start] = coefficient * complement[n]
                    if softcap is not None:
                        th = tanh(number(x[y - start]) * (logit_scale / softcap))
                        u[y - start] *= logit_scale * (reference.dtype.type(1.0) - th * th)
                to = carray(at(out, place + start, element), size)
                for i in range(size):
                    to[i] = rounded(u[i], element)
