"""Numbers as the loops read, compute and write them.

A row goes through `u`, a block of it in float32 (or float64) that stays in the first-level cache.
uint16 stands for bfloat16 and int16 for float16, which NumPy or numba lack. In numba the sum, shift
or product of two 32-bit integers has 64 bits, hence the casts.
"""

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic, overload

from ._compiled import inner

BLOCK = 1024
LANES = 64  # what a block is filled up to: the most elements that a vectorised loop takes at a time
F32, I16, I32, U16, U32 = np.float32, np.int16, np.int32, np.uint16, np.uint32
# 2 ** x on [-0.5, 0.5]: 1 at 0, coefficients by Remez' exchange, relative error below 9.2e-8.
C1, C2, C3 = F32(0.6931470036506653), F32(0.24022242426872253), F32(0.05550733581185341)
C4, C5 = F32(0.009671512991189957), F32(0.001326472731307149)
# Added to x, it leaves round(x) + 127 in the low bits: the exponent's field of 2 ** round(x).
SHIFTER = F32(1.5 * 2.0**23 + 127.0)


@intrinsic
def at(_, address, index, like):
    """Pointer to an element of what begins at address, of the type of `like`."""
    pointer = types.CPointer(like)

    def generate(context, builder, signature, args):
        base = builder.inttoptr(args[0], context.get_value_type(pointer))
        return builder.gep(base, [args[1]])

    return pointer(types.int64, types.int64, like), generate


@inner
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
    return lambda x: lifted_exp2(x, F32(0.0))


def exp2_and_subnormals(x):
    """exp2 for x <= 103; float32: with the numbers below 2 ** -126."""


@overload(exp2_and_subnormals)
def _exp2_and_subnormals(x):
    if x is types.float64:
        return lambda x: np.exp2(x)
    return lambda x: lifted_exp2(x, F32(24.0)) * F32(2.0**-24)


@inner
def lifted_exp2(x, lift):
    """2 ** (x + lift) of float32, 0 for a sum below -126.5."""
    x = F32(-127.0) - lift if x < F32(-127.0) - lift else x
    shifted = x + (SHIFTER + lift)
    f = x - (shifted - (SHIFTER + lift))
    p = fma(fma(fma(fma(fma(C5, f, C4), f, C3), f, C2), f, C1), f, F32(1.0))
    return p * cast_bits(U32(cast_bits(shifted, U32(0)) << U32(23)), F32(0))


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


@inner
def cap(x, logit_scale, softcap):
    """u of a logit; without a softcap logit_scale is part of the slope of z in u."""
    if softcap is None:
        return x
    return softcap * tanh(x * (logit_scale / softcap))


@inner
def softmax_rows(address, pitch, like):
    """The rows of a softmax (4, N)."""
    return (
        carray(at(address, 0, like), 1),
        carray(at(address, pitch, like), 1),
        carray(at(address, 2 * pitch, like), 1),
        carray(at(address, 3 * pitch, like), 1),
    )
