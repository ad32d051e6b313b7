"""Moves and conversions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..memory import NUMPY, UNSIGNED
from ..ptx import Instruction, Vector
from ._numbers import FLOATS, flush, from_bfloat16, join, to_bfloat16
from ._operation import Active, operation

if TYPE_CHECKING:
    from ..machine import Machine


@operation("mov")
def move(m: Machine, i: Instruction, active: Active) -> None:
    target, source = i.operands
    if isinstance(source, Vector):
        dtype = UNSIGNED[int(i.type[1:]) // 8]
        kind = f"b{int(i.type[1:]) // len(source.elements)}"
        m.write(target, join([m.read(e, kind) for e in source.elements], dtype), active)
    elif isinstance(target, Vector):
        whole = m.read(source, i.type)
        bits = int(i.type[1:]) // len(target.elements)
        for k, element in enumerate(target.elements):
            part = (whole >> whole.dtype.type(bits * k)).astype(UNSIGNED[bits // 8])
            m.write(element, part, active)
    elif i.type == "pred":
        m.write(target, m.read_predicate(source), active)
    else:
        m.write(target, m.read(source, i.type), active)


ROUND = {"rni": np.rint, "rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc}


@operation("cvt", "rn rz ftz sat rni rmi rpi rzi f16 f32 f64 bf16 bf16x2 f16x2 "
           "u8 u16 u32 u64 s8 s16 s32 s64")  # fmt: skip
def convert(m: Machine, i: Instruction, active: Active) -> None:
    to, source = i.parts[-2:]
    target, *operands = i.operands
    if "rz" in i.parts or ("sat" in i.parts and to in FLOATS):
        raise NotImplementedError(f"unknown instruction: {i.text}")
    if to in ("bf16x2", "f16x2"):  # the first source is the upper half
        narrow = to_bfloat16 if to == "bf16x2" else (lambda x: x.astype(np.float16))
        high, low = (narrow(m.read(o, "f32")) for o in operands)
        m.write(target, join([low, high], np.uint32), active)
        return
    if source == "bf16":
        x = from_bfloat16(m.read(operands[0], "b16"))
    else:
        x = m.read(operands[0], source)
    if "ftz" in i.parts:
        x = flush(x)
    rounding = next((ROUND[part] for part in i.parts if part in ROUND), None)
    if to == "bf16":
        result = to_bfloat16(x)
    elif to in FLOATS:
        result = (x if rounding is None else rounding(x)).astype(NUMPY[to])
    else:
        dtype = np.dtype(NUMPY[to])
        if source in (*FLOATS, "bf16"):  # out of range: the nearest integer; NaN: 0
            limits = np.iinfo(dtype)
            whole = np.nan_to_num(rounding(x).astype(np.float64), nan=0.0)
            clipped = np.clip(whole, float(limits.min), float(limits.max))
            result = np.where(
                clipped >= float(limits.max), dtype.type(limits.max), clipped.astype(dtype)
            )
        else:
            result = x.astype(dtype)
    m.write(target, result, active)
