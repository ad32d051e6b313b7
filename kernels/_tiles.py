"""What two kernels share: the split, the scale of exponents, and device functions."""

import contextlib
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of one split. A constant of the design and not a tuning knob: were it chosen by the batch,
# a row's sums would end elsewhere in another batch, and its log-probability would have other bits.
SPLIT_V = tl.constexpr(16384)

# The lowest peak, and the lowest float32: finite, so that -inf logits never make inf - inf.
LOWEST = tl.constexpr(-(2.0**128 - 2.0**104))
# The largest exponent. Rounding it errs by 32 at most, which a sum of exponentials bears; beyond it
# neighbouring float32 logits are 64 apart, so that only those equal to the peak have a share.
LARGEST_EXPONENT = tl.constexpr(2.0**30)
# What mean_logit's sums are of: u times this, so that they never leave float32.
MEAN_UNIT = tl.constexpr(2.0**-24)


@triton.jit
def tanh(x):
    # The odd polynomial keeps the relative error near 0, where 1 - 2 / (1 + exp(2 x)) cancels.
    # Coefficients: least squares at Chebyshev nodes of x * x on [0, 0.36]; relative error below
    # 8e-8 there.
    y = x * x
    p = -0.0058939453 * y + 0.0207946177
    p = p * y - 0.0537832930
    p = p * y + 0.1333191530
    p = p * y - 0.3333329751
    near_zero = x + x * y * p
    tail = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * tl.abs(x)))
    return tl.where(tl.abs(x) < 0.6, near_zero, tl.where(x < 0, -tail, tail))


@triton.jit
def cap(x, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    # u, with z = u * slope: without a softcap logit_scale is part of the slope, and u the logit
    # itself.
    if HAS_SOFTCAP:
        return softcap * tanh(x * (logit_scale / softcap))
    else:
        return x


# A tile of columns has the shape (R, THREADS, VEC): VEC neighbours a thread, R times. Memory is
# accessed as (R, THREADS * VEC), neighbours in its last dimension: in that shape every version of
# Triton gives a thread VEC neighbours, and to see it as a tile moves nothing. So what is reduced
# over R and VEC stays in a thread.
@triton.jit
def offsets(R: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr):
    # (R, THREADS * VEC): of a tile's columns, in memory.
    r = tl.arange(0, R)[:, None]
    return r * (THREADS * VEC) + tl.arange(0, THREADS * VEC)[None, :]


@triton.jit
def load(ptr, R: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr):
    # A whole tile. Without a mask: a column bound would break 16-byte accesses.
    x = tl.load(ptr + offsets(R, THREADS, VEC))
    return x.to(tl.float32).reshape(R, THREADS, VEC)


@triton.jit
def store(ptr, x):
    R: tl.constexpr = x.shape[0]
    THREADS: tl.constexpr = x.shape[1]
    VEC: tl.constexpr = x.shape[2]
    x = x.to(ptr.dtype.element_ty).reshape(R, THREADS * VEC)
    tl.store(ptr + offsets(R, THREADS, VEC), x)


# The first `size` columns of a tile. Where they are whole groups of VEC neighbours, the mask says
# so and accesses stay 16 bytes wide; a mask that may end anywhere makes them single.
@triton.jit
def load_tail(ptr, size, other, R: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr):
    v = offsets(R, THREADS, VEC)
    size = size.to(tl.int32)
    if size % VEC == 0:
        x = tl.load(ptr + v, mask=v < size // VEC * VEC, other=other)
    else:
        x = tl.load(ptr + v, mask=v < size, other=other)
    return x.to(tl.float32).reshape(R, THREADS, VEC)


@triton.jit
def store_tail(ptr, x, size):
    R: tl.constexpr = x.shape[0]
    THREADS: tl.constexpr = x.shape[1]
    VEC: tl.constexpr = x.shape[2]
    v = offsets(R, THREADS, VEC)
    x = x.to(ptr.dtype.element_ty).reshape(R, THREADS * VEC)
    size = size.to(tl.int32)
    if size % VEC == 0:
        tl.store(ptr + v, x, mask=v < size // VEC * VEC)
    else:
        tl.store(ptr + v, x, mask=v < size)


# What a column is compared with is first made relative to the thread, so that each thread compares
# one number with constants: its own columns as numbers would be 32 registers that live through the
# loop.
@triton.jit
def own_columns(R: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr):
    # (R, 1, VEC): a tile's columns less the first one of the thread.
    r = tl.arange(0, R)[:, None, None]
    return r * (THREADS * VEC) + tl.arange(0, VEC)[None, None, :]


@triton.jit
def from_own(column, THREADS: tl.constexpr, VEC: tl.constexpr):
    # (1, THREADS, 1): a column of the tile less the first one of each thread.
    return column.to(tl.int32) - tl.arange(0, THREADS)[None, :, None] * VEC


@triton.jit
def own_sum(x):
    # (R, THREADS, VEC) -> (THREADS,): of what a thread has itself.
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def own_max(x):
    return tl.max(tl.max(x, 2), 0)


@triton.jit
def starts_a_sequence(cu_seqlens_ptr, num_sequences, token):
    # Whether token is one of cu_seqlens[0..S]: lower bound by bisection, log2(S) loads.
    low = 0
    high = num_sequences
    while low < high:
        middle = (low + high) // 2
        if tl.load(cu_seqlens_ptr + middle).to(tl.int64) < token:
            low = middle + 1
        else:
            high = middle
    return tl.load(cu_seqlens_ptr + low).to(tl.int64) == token


def vector_width(tensor: Tensor) -> int:
    """Neighbouring elements of one access: 16 bytes of them if every row starts at such a boundary
    by its address and strides (multiples of 16), else 1."""
    if tensor.data_ptr() % 16 or any(stride % 16 for stride in tensor.stride()[:-1]):
        return 1
    return 16 // tensor.element_size()


def gpu_target(tensor: Tensor) -> Any:
    """What Triton compiles for on a tensor's device: backend, arch and warp_size; None without a
    GPU (in the interpreter)."""
    try:
        return _gpu_target(triton.runtime.driver.active, tensor.device)
    except RuntimeError:  # "0 active drivers"
        return None


@functools.cache
def _gpu_target(driver: Any, device: torch.device) -> Any:
    return driver.get_current_target()


def warp_size(target: Any) -> int:
    """Threads of a warp: 32, or 64 of an AMD wavefront."""
    return 32 if target is None else int(target.warp_size)


_HERE = contextlib.nullcontext()


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's GPU the current device, on which Triton launches."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _HERE
