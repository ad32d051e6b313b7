"""Bits and predicates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..ptx import Immediate, Instruction
from ._numbers import FLOATS, flush, join
from ._operation import Active, operation

if TYPE_CHECKING:
    from ..machine import Machine

LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@operation("and or xor not")
def logic(m: Machine, i: Instruction, active: Active) -> None:
    target, *sources = i.operands
    if i.type == "pred":
        values = [m.read_predicate(source) for source in sources]
    else:
        values = [m.read(source, i.type) for source in sources]
    m.write(target, ~values[0] if i.parts[0] == "not" else LOGIC[i.parts[0]](*values), active)


@operation("shl shr")
def shift(m: Machine, i: Instruction, active: Active) -> None:
    target, x, distance = i.operands
    x, distance = m.read(x, i.type), m.read(distance, "u32")
    bits = 8 * x.dtype.itemsize
    function = np.left_shift if i.parts[0] == "shl" else np.right_shift
    shifted = function(x, np.minimum(distance, bits - 1).astype(x.dtype))
    beyond = np.right_shift(x, x.dtype.type(bits - 1)) if i.type[0] == "s" else np.zeros_like(x)
    m.write(target, np.where(distance >= bits, beyond, shifted).astype(x.dtype), active)


@operation("bfe")
def extract(m: Machine, i: Instruction, active: Active) -> None:
    """A field of bits, extended by its own sign for the signed types."""
    target, x, first, length = i.operands
    if not (isinstance(first, Immediate) and isinstance(length, Immediate) and length.bits > 0):
        raise NotImplementedError(f"unknown instruction: {i.text}")
    x = m.read(x, i.type)
    bits = 8 * x.dtype.itemsize
    above = x.dtype.type(bits - first.bits - length.bits)
    m.write(target, (x << above) >> x.dtype.type(bits - length.bits), active)


@operation("prmt")
def permute(m: Machine, i: Instruction, active: Active) -> None:
    """Each of four selectors picks one of eight bytes, or (its bit 3) repeats that byte's sign."""
    target, low, high, selector = i.operands
    both = join([m.read(low, "b32"), m.read(high, "b32")], np.uint64)
    selector, result = m.read(selector, "b32"), np.uint32(0)
    for k in range(4):
        pick = (selector >> np.uint32(4 * k)) & np.uint32(15)
        byte = (both >> ((pick & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        byte = np.where(pick & np.uint32(8), sign, byte).astype(np.uint32)
        result = result | (byte << np.uint32(8 * k))
    m.write(target, result, active)


COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
UNORDERED = {f"{name}u": name for name in COMPARE}  # true where either is NaN
UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


@operation("setp", " ".join([*COMPARE, *UNORDERED, *UNSIGNED_NAMES, "nan", "num", "ftz"]))
def compare(m: Machine, i: Instruction, active: Active) -> None:
    target, x, y = i.operands
    x, y, name = m.read(x, i.type), m.read(y, i.type), i.parts[1]
    if "ftz" in i.parts:
        x, y = flush(x), flush(y)
    either_nan = np.isnan(x) | np.isnan(y) if i.type in FLOATS else np.zeros((), np.bool_)
    if name in ("nan", "num"):
        result = either_nan if name == "nan" else ~either_nan
    elif name in UNORDERED:
        result = COMPARE[UNORDERED[name]](x, y) | either_nan
    else:
        result = COMPARE[UNSIGNED_NAMES.get(name, name)](x, y) & ~either_nan
    m.write(target, result, active)


@operation("selp")
def select(m: Machine, i: Instruction, active: Active) -> None:
    target, x, y, condition = i.operands
    chosen = np.where(m.read_predicate(condition), m.read(x, i.type), m.read(y, i.type))
    m.write(target, chosen, active)
