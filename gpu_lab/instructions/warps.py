"""Between the threads of a warp."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..ptx import Immediate, Instruction
from ._operation import Active, operation

if TYPE_CHECKING:
    from ..machine import Machine


@operation("shfl", "sync bfly idx up down")
def shuffle(m: Machine, i: Instruction, active: Active) -> None:
    """Read a register of another lane (PTX ISA 9.7.9.6): clamp and segment come packed."""
    target, *is_inside, source, distance, clamp, _ = i.operands
    assert isinstance(clamp, Immediate)
    segment, limit = (clamp.bits >> 8) & 31, clamp.bits & 31
    first = m.lane & segment
    last = first | (limit & ~segment)
    k = m.read(distance, "s32").astype(np.int64)
    other = {
        "bfly": m.lane ^ k,
        "idx": first | (k & ~segment & 31),
        "up": m.lane - k,
        "down": m.lane + k,
    }[i.parts[2]]
    inside = other >= first if i.parts[2] == "up" else other <= last
    other = np.where(inside, other, m.lane) + (np.arange(m.num_lanes) - m.lane)
    if active is not None and not active[other][active].all():
        raise RuntimeError(f"a lane reads from one that does not take part: {i.text}")
    value = np.broadcast_to(m.read(source, "b32"), m.num_lanes)
    m.write(target, value[other], active)
    for predicate in is_inside:
        m.write(predicate, inside, active)


REDUCE = {
    "add": np.add, "max": np.fmax, "min": np.fmin, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip


@operation("redux", "sync add max min and or xor NaN")
def reduce_warp(m: Machine, i: Instruction, active: Active) -> None:
    target, source, _ = i.operands
    warps = np.broadcast_to(m.read(source, i.type), m.num_lanes).reshape(-1, 32)
    takes_part = np.ones_like(warps, np.bool_) if active is None else active.reshape(-1, 32)
    if (takes_part.any(1) & ~takes_part.all(1)).any():
        raise RuntimeError(f"some lanes of a warp do not take part: {i.text}")
    function = REDUCE[i.parts[2]]
    if "NaN" in i.parts:
        function = {"max": np.maximum, "min": np.minimum}[i.parts[2]]
    reduced = function.reduce(warps, axis=1, dtype=warps.dtype)
    m.write(target, np.repeat(reduced, 32), active)
