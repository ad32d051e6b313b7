"""Walks in narrow tiles over some columns of a split.

What is done seldom, or to a part of a tile, takes no registers from the loop over whole tiles.
"""

import triton
import triton.language as tl

from ._tiles import LOWEST, MEAN_UNIT, cap, from_own, load_tail, own_columns, own_max, own_sum


# Per thread, the largest u of the columns from start up to end, and the sum of u * MEAN_UNIT.
@triton.jit
def max_and_sum(
    row_ptr,
    start,
    end,
    logit_scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    THREADS: tl.constexpr,
    VEC: tl.constexpr,
):
    largest = tl.full([THREADS], -float("inf"), tl.float32)
    total = tl.zeros([THREADS], tl.float32)
    for first in range(start, end, THREADS * VEC):
        x = load_tail(row_ptr + first, end - first, 0.0, 1, THREADS, VEC)
        u = cap(x, logit_scale, softcap, HAS_SOFTCAP)
        total += own_sum(u * MEAN_UNIT)
        inside = own_columns(1, THREADS, VEC) < from_own(end - first, THREADS, VEC)
        largest = tl.maximum(largest, own_max(tl.where(inside, u, -float("inf"))))
    return largest, total


# The largest u of the columns from start up to end but y, and how many logits equal it.
@triton.jit
def peak_and_ties(
    row_ptr,
    start,
    end,
    y,
    logit_scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    THREADS: tl.constexpr,
    VEC: tl.constexpr,
):
    peak = tl.full([THREADS], LOWEST, tl.float32)
    ties = tl.zeros([THREADS], tl.float32)
    own = own_columns(1, THREADS, VEC)
    for first in range(start, end, THREADS * VEC):
        x = load_tail(row_ptr + first, end - first, 0.0, 1, THREADS, VEC)
        u = cap(x, logit_scale, softcap, HAS_SOFTCAP)
        is_other = own != from_own(y - first, THREADS, VEC)
        is_other &= own < from_own(end - first, THREADS, VEC)
        u = tl.where(is_other, u, -float("inf"))
        new_peak = tl.maximum(peak, own_max(u))
        below = u - new_peak[None, :, None]  # NaN of NaN and +inf, which stays
        ties *= tl.where(new_peak > peak, 0.0, 1.0)
        ties += own_sum(tl.where(below < 0.0, 0.0, 1.0 + below))
        peak = new_peak
    largest = tl.max(peak)
    return largest, tl.sum(ties * tl.where(peak < largest, 0.0, 1.0))
