"""First stage: one pass over the logits, from (B, T, V) to a few float32 numbers a token and split.

    z[n, j] = slope * u[n, j]      with a softcap u = softcap * tanh(logit_scale * x / softcap) and
                                   slope = 1 / temperature; else u = x, logit_scale in the slope
    peak    = max over j != y of u[n, j]
    total   = sum over j != y of exp(slope * (u[n, j] - peak))

The target y stays out of the sum: z[n, y] - logsumexp(z[n]) is 0, with a gradient of 0, once the
target leads by 17 nats in float32; the sum of the others keeps its precision at any margin.

An exponent slope * (u - peak) / ln 2 is one multiply-add of u, relative to the rounded product of
the peak. Its rounding is known and undone, up to LARGEST_EXPONENT; beyond that float32 logits are
so far apart that the total is the number of logits that equal the peak.
"""

import functools
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._float32 import rounded_product
from ._launch import launch
from ._narrow import max_and_sum, peak_and_ties
from ._tiles import (
    LARGEST_EXPONENT,
    LOWEST,
    MEAN_UNIT,
    SPLIT_V,
    cap,
    from_own,
    gpu_target,
    load,
    load_tail,
    on_device,
    own_columns,
    own_max,
    own_sum,
    starts_a_sequence,
    vector_width,
    warp_size,
)


@triton.jit
def _fold(
    x,  # (R, THREADS, VEC) float32 logits of the columns from start, -inf from bound on
    start,
    bound,
    y,
    peak,  # (THREADS,) each, like all sums
    total,
    weighted,
    earlier,
    square_sum,
    exponent_scale,
    logit_scale,
    softcap,
    IS_TAIL: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    TOP1: tl.constexpr,
    LOG_SUM_SQ_PROBS: tl.constexpr,
):
    # One tile into the running sums of each thread: no thread waits for another, and with the
    # maximum of a thread's logits, not of each one, there is one exp2 a logit and one a tile.
    R: tl.constexpr = x.shape[0]
    THREADS: tl.constexpr = x.shape[1]
    VEC: tl.constexpr = x.shape[2]
    own = own_columns(R, THREADS, VEC)
    u = cap(x, logit_scale, softcap, HAS_SOFTCAP)
    if IS_TAIL and HAS_SOFTCAP:  # the cap of -inf is finite
        u = tl.where(own < from_own(bound - start, THREADS, VEC), u, -float("inf"))
    if HAS_TARGET:
        y_own = from_own(y - start, THREADS, VEC)
        u = tl.where(own == y_own, -float("inf"), u)
    tile_peak = own_max(u)
    if TOP1 and not HAS_TARGET:
        earlier = tl.where(start < y, tl.maximum(earlier, tile_peak), earlier)
    new_peak = tl.maximum(peak, tile_peak)
    new_offset = rounded_product(new_peak, -exponent_scale)
    drop = new_offset - rounded_product(peak, -exponent_scale)
    shrink = tl.exp2(drop)
    # Rounded once, so exact near the peak, where it matters.
    exponent = tl.fma(u, exponent_scale, new_offset[None, :, None])
    e = tl.exp2(exponent)
    if ENTROPY:  # a banned token's exponent is -inf, and its share 0
        products = e * tl.where(e > 0.0, exponent, 0.0)
        weighted = (weighted + drop * total) * shrink + own_sum(products)
    if LOG_SUM_SQ_PROBS:
        square_sum = square_sum * shrink * shrink + own_sum(e * e)
    total = total * shrink + own_sum(e)
    return new_peak, total, weighted, earlier, square_sum


# One program per token n and split k: token n is scored by logits row n - SHIFT, and split k has
# the columns from k * SPLIT_V on. Programs of one token are neighbours; the first of them stores
# its weight. Sizes are not specialised: a batch of another shape compiles nothing.
@triton.jit(
    do_not_specialize=[
        "stride_logits_b", "stride_logits_t", "stride_sums_c", "stride_sums_k", "seq_len",
        "num_columns", "num_splits", "num_sequences", "ignore_index", "first_column", "vocab_size",
    ]
)  # fmt: skip
def _partials_kernel(
    logits_ptr,  # (B, T, W), W contiguous; B and T strided, since callers slice logits
    labels_ptr,  # (B, T) int32 or int64
    mask_ptr,  # (B, T) any dtype, or None
    cu_seqlens_ptr,  # (S + 1,) int32 or int64, or None
    sums_ptr,  # (C, K, B * T) float32, out: peak, total, then what each stat asks for
    target_ptr,  # (B * T,) float32, out where it is in these columns: u of the target
    weights_ptr,  # (B, T) float32, out: 0 where a token is not scored
    stride_logits_b,
    stride_logits_t,
    stride_sums_c,
    stride_sums_k,
    seq_len,
    num_columns,  # W
    num_splits,
    num_sequences,
    ignore_index,
    first_column,  # the columns are these W of a vocabulary of vocab_size
    vocab_size,
    exponent_scale,  # slope / ln 2
    logit_scale,
    softcap,
    SHIFT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN_LOGIT: tl.constexpr,
    TOP1: tl.constexpr,
    LOG_SUM_SQ_PROBS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    THREADS: tl.constexpr,
    VEC: tl.constexpr,
):
    split = tl.program_id(0) % num_splits
    token = tl.program_id(0) // num_splits
    n = token.to(tl.int64)  # B * T * V passes 2**31
    y = tl.load(labels_ptr + n).to(tl.int64)
    weight = 1.0
    if mask_ptr is not None:
        weight = tl.load(mask_ptr + n).to(tl.float32)
    weight = tl.where(y == ignore_index, 0.0, weight)
    if cu_seqlens_ptr is not None:  # what comes after the last sequence is padding
        packed_end = tl.load(cu_seqlens_ptr + num_sequences)
        weight = tl.where(n < packed_end, weight, 0.0)
    if SHIFT:  # nothing predicts the first token of a sequence
        if cu_seqlens_ptr is not None:
            is_first = (token == 0) | starts_a_sequence(cu_seqlens_ptr, num_sequences, n)
        else:
            is_first = token % seq_len == 0
        weight = tl.where(is_first, 0.0, weight)
    if split == 0:
        tl.store(weights_ptr + n, weight)

    if weight != 0.0:
        exponent_scale = tl.cast(exponent_scale, tl.float32)
        row = token - 1 if SHIFT else token
        b = (row // seq_len).to(tl.int64)  # divided in 32 bits: 64 take a function of their own
        t = (row % seq_len).to(tl.int64)
        row_start = b * stride_logits_b + t * stride_logits_t
        row_ptr = logits_ptr + tl.multiple_of(row_start, VEC)
        # Else NaN, never a stray read. As unsigned numbers, negative ones are beyond all others.
        in_vocabulary = y.to(tl.uint64) < tl.cast(vocab_size, tl.uint64)
        column = tl.where(in_vocabulary, y - first_column, -1).to(tl.int32)  # the target's
        is_here = column.to(tl.uint32) < tl.cast(num_columns, tl.uint32)
        if split == 0:
            x_y = tl.load(row_ptr + column, mask=is_here, other=0.0).to(tl.float32)
            u_y = cap(x_y, logit_scale, softcap, HAS_SOFTCAP)
            u_y = tl.where(in_vocabulary, u_y, float("nan"))
            tl.store(target_ptr + n, u_y, mask=is_here | ~in_vocabulary)

        R: tl.constexpr = BLOCK_V // (THREADS * VEC)
        TAIL_R: tl.constexpr = 8 // VEC  # what is left of a tile goes in narrow ones
        limit = tl.minimum(LARGEST_EXPONENT.value / exponent_scale, -LOWEST)  # of peaks
        peak = tl.zeros([THREADS], tl.float32) - limit
        total = tl.zeros([THREADS], tl.float32)
        weighted = tl.zeros([THREADS], tl.float32)  # sum of 2 ** exponent * exponent: the entropy's
        logit_sum = tl.zeros([THREADS], tl.float32)  # sum of u * MEAN_UNIT, target included
        earlier = tl.full([THREADS], -float("inf"), tl.float32)  # max of u over j < column
        square_sum = tl.zeros([THREADS], tl.float32)  # sum of 4 ** exponent
        first = split * SPLIT_V
        bound = tl.minimum(first + SPLIT_V, num_columns)
        # Full tiles load without a mask: a column bound would break their 16-byte loads.
        tail = first + (bound - first) // BLOCK_V * BLOCK_V
        for start in range(first, tail, BLOCK_V):
            x = load(row_ptr + start, R, THREADS, VEC)
            if MEAN_LOGIT:
                logit_sum += own_sum(cap(x, logit_scale, softcap, HAS_SOFTCAP) * MEAN_UNIT)
            # Two whole branches: one that only changed u would copy the tile in every iteration.
            if (column >= start) & (column < start + BLOCK_V):
                if TOP1:
                    here, _ = max_and_sum(
                        row_ptr, start, column, logit_scale, softcap, HAS_SOFTCAP, THREADS, VEC
                    )
                    earlier = tl.maximum(earlier, here)
                peak, total, weighted, earlier, square_sum = _fold(
                    x, start, bound, column, peak, total, weighted, earlier, square_sum,
                    exponent_scale, logit_scale, softcap, False, True,
                    HAS_SOFTCAP, ENTROPY, TOP1, LOG_SUM_SQ_PROBS,
                )  # fmt: skip
            else:
                peak, total, weighted, earlier, square_sum = _fold(
                    x, start, bound, column, peak, total, weighted, earlier, square_sum,
                    exponent_scale, logit_scale, softcap, False, False,
                    HAS_SOFTCAP, ENTROPY, TOP1, LOG_SUM_SQ_PROBS,
                )  # fmt: skip
        for start in range(tail, bound, TAIL_R * THREADS * VEC):
            x = load_tail(row_ptr + start, bound - start, -float("inf"), TAIL_R, THREADS, VEC)
            peak, total, weighted, earlier, square_sum = _fold(
                x, start, bound, column, peak, total, weighted, earlier, square_sum,
                exponent_scale, logit_scale, softcap, True, True,
                HAS_SOFTCAP, ENTROPY, TOP1, LOG_SUM_SQ_PROBS,
            )  # fmt: skip
        if tail < bound:
            if TOP1:
                end = tl.minimum(column, bound)
                here, _ = max_and_sum(
                    row_ptr, tail, end, logit_scale, softcap, HAS_SOFTCAP, THREADS, VEC
                )
                earlier = tl.maximum(earlier, here)
            if MEAN_LOGIT:
                _, tail_sum = max_and_sum(
                    row_ptr, tail, bound, logit_scale, softcap, HAS_SOFTCAP, THREADS, VEC
                )
                logit_sum += tail_sum

        split_peak = tl.max(peak)
        if (split_peak > -limit) & (split_peak <= limit):
            # All threads' sums, relative to the split's peak. Theirs are relative to rounded
            # products, and that of the split's peak and the scale exceeds the exact one by error.
            split_exponent = rounded_product(split_peak, exponent_scale)
            error = -tl.fma(split_peak, exponent_scale, -split_exponent)
            drop = rounded_product(peak, exponent_scale) - split_exponent + error
            shrink = tl.exp2(drop)
            split_total = tl.sum(total * shrink)
            split_weighted = 0.0
            split_square_sum = 0.0
            if ENTROPY:
                split_weighted = tl.sum((weighted + drop * total) * shrink)
            if LOG_SUM_SQ_PROBS:
                split_square_sum = tl.sum(square_sum * shrink * shrink)
        else:  # banned whole, or out of reach
            split_peak, split_total = peak_and_ties(
                row_ptr, first, bound, column, logit_scale, softcap, HAS_SOFTCAP, THREADS, VEC
            )
            split_weighted = 0.0
            split_square_sum = split_total
        out_ptr = sums_ptr + split * stride_sums_k + n
        channel = tl.cast(stride_sums_c, tl.int64)
        tl.store(out_ptr, split_peak)
        tl.store(out_ptr + channel, split_total)
        out_ptr += 2 * channel
        if ENTROPY:
            tl.store(out_ptr, split_weighted)
            out_ptr += channel
        if MEAN_LOGIT:
            tl.store(out_ptr, tl.sum(logit_sum))
            out_ptr += channel
        if TOP1:
            tl.store(out_ptr, tl.max(earlier))
            out_ptr += channel
        if LOG_SUM_SQ_PROBS:
            tl.store(out_ptr, split_square_sum)


def num_splits(num_columns: int) -> int:
    """Entries of the partials for each token."""
    return -(-num_columns // int(SPLIT_V.value))


def partials(
    logits: Tensor,
    tokens: Any,  # a Tokens
    columns: Any,  # a Columns
    scaling: Any,  # a Scaling
    stats: Sequence[str],
    out: Any,  # a Partials
) -> None:
    """Write the partials of float32: sums (C, K, B * T), target (B * T,) and weights (B, T).

    logits (B, T, W) are some columns of a vocabulary; what they have beyond `columns.width` is
    padding. The partials of other columns have their place beside these. C is 2 (peak, total) and
    one more for each of `stats`; K the splits of SPLIT_V columns. The sums of `out` may have any
    strides but for tokens. A target is written where it is in these columns, and NaN where its
    label is outside of the vocabulary. Of a token that is not scored only the weight, 0, is
    written; none is after the end of cu_seqlens.
    """
    labels, mask, cu_seqlens, shift, ignore_index = tokens
    num_tokens = labels.numel()
    if num_tokens == 0:
        return
    splits = num_splits(columns.width)
    has_softcap = scaling.softcap is not None
    with on_device(logits):
        launch(
            _partials_kernel,
            num_tokens * splits,
            (
                logits,
                labels.contiguous(),
                None if mask is None else mask.contiguous(),
                None if cu_seqlens is None else cu_seqlens.contiguous(),
                *out,
            ),
            (
                *logits.stride()[:2],
                *out.sums.stride()[:2],
                labels.shape[1],
                columns.width,
                splits,
                0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
                ignore_index,
                columns.first,
                columns.vocab_size,
            ),
            (scaling.exponent_scale, scaling.logit_scale, scaling.softcap or 0.0),
            _constants(shift, has_softcap, tuple(stats), vector_width(logits), gpu_target(logits)),
        )


@functools.cache
def _constants(
    shift: bool, has_softcap: bool, stats: tuple[str, ...], vec: int, target: Any
) -> dict[str, Any]:
    return dict(
        SHIFT=shift,
        HAS_SOFTCAP=has_softcap,
        ENTROPY="entropy" in stats,
        MEAN_LOGIT="mean_logit" in stats,
        TOP1="top1" in stats,
        LOG_SUM_SQ_PROBS="log_sum_sq_probs" in stats,
        **launch_config(vec, has_softcap, target),
    )


def launch_config(vec: int, has_softcap: bool, target: Any) -> dict[str, int]:
    """Columns of a tile, threads, neighbouring logits of a load, and warps.

    Few threads, so that the work around the loop is shared by the 256 logits that each of them gets
    of a split. They take 32 of them at a time; 16 where a logit takes more registers (float32,
    single loads), 8 with a softcap's tanh: so many that half of a multiprocessor's warps fit. The
    stats have no say, since they must not change a value.
    """
    block = 512 if has_softcap else 2048 if vec == 8 else 1024
    config = dict(BLOCK_V=block, THREADS=64, VEC=vec, num_warps=64 // warp_size(target))
    if target is not None and target.backend == "cuda" and target.arch // 10 == 8:
        config["maxnreg"] = 64  # with all stats the assembler for Ampere and Ada takes 71
    return config
