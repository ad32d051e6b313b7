"""Numbers as registers have them: float32 and bfloat16, and words side by side."""

import numpy as np

from ..memory import UNSIGNED
from ..ptx import Operand, Vector

SMALLEST_NORMAL = np.float32(2.0**-126)
FLOATS = ("f16", "f32", "f64")


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 numbers become zeros of the same sign (.ftz)."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of bfloat16, to nearest even; NaN is 0x7fff as on a GPU."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z rounded once; in float64 with the 64 bits of an extended mantissa, not 106."""
    wide = np.float64 if x.dtype == np.float32 else np.longdouble
    return (x.astype(wide) * y.astype(wide) + z.astype(wide)).astype(x.dtype)


def join(words: list[np.ndarray], dtype: type) -> np.ndarray:
    """Words side by side in a wider one, the first in the low bits."""
    words = [np.asarray(word) for word in words]
    bits = 8 * words[0].dtype.itemsize
    unsigned = [word.view(UNSIGNED[word.dtype.itemsize]).astype(dtype) for word in words]
    result = unsigned[0]
    for k, word in enumerate(unsigned[1:], 1):
        result = result | (word << dtype(bits * k))
    return result


def split(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """64 bits to two float32, the low half first."""
    low = words.astype(np.uint32).view(np.float32)
    return low, (words >> np.uint64(32)).astype(np.uint32).view(np.float32)


def elements(operand: Operand) -> tuple[Operand, ...]:
    return operand.elements if isinstance(operand, Vector) else (operand,)
