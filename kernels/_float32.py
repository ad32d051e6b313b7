"""Device functions in float32 whose rounding is known: a number is a sum of two, high and low.

The compiler fuses plain products into sums: where the rounding of a product or of a sum matters,
it is written here, so that neither is fused into anything else.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LN2_HIGH = tl.constexpr(0.693147182464599609375)  # ln 2 in float32
LN2_LOW = tl.constexpr(-1.904654299957768e-09)  # and what that leaves
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def rounded_product(x, y):
    # x * y, rounded whatever is added to it: an exponent must not be relative to anything but the
    # number that was subtracted from it.
    return tl.fma(x, y, 0.0)


@triton.jit
def two_product(x, y):
    # x * y as its rounding and the rest, which is 0 beside infinity.
    high = rounded_product(x, y)
    return high, tl.where(tl.abs(high) < float("inf"), tl.fma(x, y, -high), 0.0)


@triton.jit
def two_sum(x, y):
    # x + y likewise (Knuth).
    high = x + y
    y_part = high - x
    low = (x - (high - y_part)) + (y - y_part)
    return high, tl.where(tl.abs(high) < float("inf"), low, 0.0)


@triton.jit
def exp2(high, low):
    # 2 ** (high + low), within a rounding and a half, for a sum below 128.
    low = tl.where(high < -200.0, 0.0, low)
    high = tl.where(high < -200.0, -200.0, high)  # NaN stays
    n = tl.floor(high + low + 0.5)
    f = ((high - n) + low) * LN2
    # The series of exp, where |f| <= 0.35: what is cut off is below 2 ** -29.
    p = f * (1.0 / 5040.0) + 1.0 / 720.0
    p = p * f + 1.0 / 120.0
    p = p * f + 1.0 / 24.0
    p = p * f + 1.0 / 6.0
    p = p * f + 0.5
    p = p * f + 1.0
    p = p * f + 1.0
    # 2 ** n in two factors: one alone would leave float32 before the result does.
    half = n.to(tl.int32) >> 1
    return p * _power_of_2(half) * _power_of_2(n.to(tl.int32) - half)


@triton.jit
def _power_of_2(n):
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def log1p(x):
    # log(1 + x) for -0.3 <= x <= 1 as its rounding and the rest: 2 atanh(s), s = x / (2 + x).
    d = 2.0 + x
    s = x / d
    rest = tl.fma(-s, d, x) - s * (x - (d - 2.0))  # of the division: d * (x / (2 + x) - s)
    y = s * s
    # The series of atanh, where |s| <= 1 / 3: what is cut off is below 2 ** -29.
    p = y * (1.0 / 15.0) + 1.0 / 13.0
    p = p * y + 1.0 / 11.0
    p = p * y + 1.0 / 9.0
    p = p * y + 1.0 / 7.0
    p = p * y + 1.0 / 5.0
    p = p * y + 1.0 / 3.0
    return two_sum(2.0 * s, 2.0 * (rest / d + s * y * p))


@triton.jit
def split_log(x):
    # log x = k * ln 2 + log1p(m) for x >= 0: a whole number k, -inf of 0, and |m| < 0.42.
    bits = x.to(tl.int32, bitcast=True) - 0x3F3504F3  # from sqrt(1 / 2) on, in steps of a binade
    k = bits >> 23
    m = x * _power_of_2(-k)
    return tl.where(x == 0.0, -float("inf"), k.to(tl.float32)), tl.where(x == 0.0, 0.0, m - 1.0)


@triton.jit
def whole_power_of_2(x):
    # 2 ** n such that 2 ** 30 <= |x| * 2 ** n < 2 ** 31, for |x| from 2 ** -96 on; exact products.
    exponent = x.to(tl.int32, bitcast=True) >> 23 & 0xFF
    return ((284 - exponent) << 23).to(tl.float32, bitcast=True)
