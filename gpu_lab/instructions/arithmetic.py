"""Arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..memory import NUMPY
from ..ptx import Instruction, Operand
from ._numbers import FLOATS, flush, fma, from_bfloat16, join, split
from ._operation import Active, operation

if TYPE_CHECKING:
    from ..machine import Machine

WIDE = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
ARITHMETIC = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": fma,
    "max": np.fmax, "min": np.fmin,
}  # fmt: skip


@operation("add sub mul fma max min", "rn ftz lo hi wide NaN f32")
def arithmetic(m: Machine, i: Instruction, active: Active) -> None:
    kind, function = i.type, ARITHMETIC[i.parts[0]]
    target, *sources = i.operands
    if kind == "f32x2" and i.parts[0] in ("add", "sub", "mul", "fma"):
        pairs = [split(m.read(source, "b64")) for source in sources]
        m.write(
            target, join([function(*half) for half in zip(*pairs, strict=True)], np.uint64), active
        )
        return
    if "f32" in i.parts[:-1] and i.parts[0] in (
        "add",
        "sub",
    ):  # a narrow first source, then float32
        first = (
            from_bfloat16(m.read(sources[0], "b16")) if kind == "bf16" else m.read(sources[0], kind)
        )
        m.write(target, function(first.astype(np.float32), m.read(sources[1], "f32")), active)
        return
    if kind not in NUMPY or "f32" in i.parts[:-1]:
        raise NotImplementedError(f"unknown instruction: {i.text}")
    if i.parts[0] == "mul" and kind not in FLOATS:
        m.write(target, product(m, i, *sources), active)
        return
    values = [m.read(source, kind) for source in sources]
    if "ftz" in i.parts:
        values = [flush(value) for value in values]
    if "NaN" in i.parts:
        function = {"max": np.maximum, "min": np.minimum}[i.parts[0]]
    result = function(*values[:2]) if i.parts[0] != "fma" else function(*values)
    for third in values[2:] if i.parts[0] in ("max", "min") else ():
        result = function(result, third)
    m.write(target, flush(result) if "ftz" in i.parts else result, active)


def product(m: Machine, i: Instruction, x: Operand, y: Operand) -> np.ndarray:
    kind = i.type
    if "lo" in i.parts:
        return m.read(x, kind) * m.read(y, kind)
    wide = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{2 * int(kind[1:]) // 8}")
    whole = m.read(x, kind).astype(wide) * m.read(y, kind).astype(wide)
    if "wide" in i.parts:
        return whole
    if "hi" in i.parts and kind in WIDE:
        return (whole >> wide.type(int(kind[1:]))).astype(m.read(x, kind).dtype)
    raise NotImplementedError(f"unknown instruction: {i.text}")


@operation("mad", "lo wide hi")
def multiply_add(m: Machine, i: Instruction, active: Active) -> None:
    target, x, y, z = i.operands
    addend = m.read(z, WIDE[i.type] if "wide" in i.parts else i.type)
    m.write(target, product(m, i, x, y) + addend, active)


@operation("div rem", "rn full approx ftz")
def divide(m: Machine, i: Instruction, active: Active) -> None:
    target, x, y = i.operands
    x, y = m.read(x, i.type), m.read(y, i.type)
    if i.type in FLOATS:
        result = x / y
    else:  # towards zero, as in C
        divisor = np.where(y == 0, y.dtype.type(1), y)
        remainder = np.fmod(x, divisor)
        result = (x - remainder) // divisor if i.parts[0] == "div" else remainder
        result = np.where(y == 0, ~x.dtype.type(0), result)
    m.write(target, flush(result) if "ftz" in i.parts else result, active)


def reciprocal(x: np.ndarray) -> np.ndarray:
    """rcp.approx.ftz.f64 gives the upper half of the bits only."""
    if x.dtype == np.float32:
        return np.float32(1) / x
    tiny = np.abs(x) < np.finfo(np.float64).tiny
    exact = 1.0 / np.where(tiny, np.copysign(0.0, x), x)
    return (exact.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)


UNARY = {
    "ex2": np.exp2, "lg2": np.log2, "rcp": reciprocal, "sqrt": np.sqrt, "tanh": np.tanh,
    "rsqrt": lambda x: x.dtype.type(1) / np.sqrt(x), "neg": np.negative, "abs": np.abs,
}  # fmt: skip


@operation("ex2 lg2 rcp sqrt rsqrt tanh neg abs", "approx rn ftz")
def unary(m: Machine, i: Instruction, active: Active) -> None:
    x = m.read(i.operands[1], i.type)
    ftz = "ftz" in i.parts and i.type == "f32"
    result = UNARY[i.parts[0]](flush(x) if ftz else x)
    m.write(i.operands[0], flush(result) if ftz else result, active)
