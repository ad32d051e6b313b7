"""What two kernels share: the split, the scale of exponents, and device functions."""

import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of one split. A constant of the design and not a tuning knob: were it chosen by the batch,
# a row's sums would end elsewhere in another batch, and its log-probability would have other bits.
SPLIT_V = 16384

LN2 = tl.constexpr(0.6931471805599453)
# The lowest peak. Finite, so that a tile of -inf logits never makes inf - inf, and far enough from
# the end of float32 that the difference of two exponents cannot overflow; a power of 2, so that its
# product with the scale of exponents is exact.
LOWEST = tl.constexpr(-(2.0**100))


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


@triton.jit
def exponent_error(peak, exponent_scale):
    # Tiles subtract the rounded product of peak and scale: by how much it exceeds the exact one.
    return -tl.fma(peak, exponent_scale, -(peak * exponent_scale))


@triton.jit
def log1p(x):
    # log(1 + x) for 0 <= x <= 1 in float64: dividing by (1 + x) - 1 undoes the rounding of 1 + x.
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def one_minus_exp(x):
    # -expm1(x) for x <= 0 in float64, by the same trick: (1 - y) times x / log(y), y the rounded
    # exp(x).
    y = tl.exp(x)
    rounds_to_one = y == 1.0
    vanishes = y == 0.0
    safe = tl.where(rounds_to_one | vanishes, 0.5, y)
    return tl.where(rounds_to_one, -x, tl.where(vanishes, 1.0, (1.0 - safe) * (x / tl.log(safe))))


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


def exponent_scale(temperature: float, logit_scale: float, softcap: float | None) -> float:
    """Slope of z in u, over ln 2: temperature, scale and the base of exp2 in one multiplication."""
    return (1.0 if softcap is not None else logit_scale) / temperature / math.log(2.0)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's GPU the current device, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
