"""Memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..memory import NUMPY, UNSIGNED
from ..ptx import Instruction
from ._numbers import elements, join
from ._operation import Active, operation

if TYPE_CHECKING:
    from ..machine import Machine

CACHE_HINTS = "global shared cta v2 v4 v8 nc ca cg cs cv wb wt relaxed acquire release gpu sys " \
    "L1 L2 no_allocate evict_first evict_last evict_normal L2::cache_hint"  # fmt: skip


@operation("ld", f"param {CACHE_HINTS}")
def load(m: Machine, i: Instruction, active: Active) -> None:
    target, source = i.operands[:2]
    dtype = np.dtype(NUMPY[i.type])
    if i.parts[1] == "param":
        bits = m.parameter(source)
        m.write(target, bits.astype(UNSIGNED[dtype.itemsize]).view(dtype), active)
        return
    targets = elements(target)
    address = m.addresses(source, active)
    if i.parts[1] == "global":
        words = m.memory.load(address, dtype.itemsize, len(targets), i.text)
    elif i.parts[1] == "shared":
        block, warp = m.spread(m.block, active), m.spread(m.warp, active)
        words = m.shared.load(block, warp, address, dtype.itemsize, len(targets), i.text)
    else:
        raise NotImplementedError(f"unknown instruction: {i.text}")
    for element, word in zip(targets, m.gather(words, active), strict=True):
        m.write(element, word.view(dtype), active)


@operation("st", CACHE_HINTS)
def store(m: Machine, i: Instruction, active: Active) -> None:
    target, source = i.operands[:2]
    kind = f"b{i.type[1:]}"
    values = [np.ascontiguousarray(m.spread(m.read(e, kind), active)) for e in elements(source)]
    address = m.addresses(target, active)
    if i.parts[1] == "global":
        m.memory.store(address, values, i.text)
    elif i.parts[1] == "shared":
        m.shared.store(m.spread(m.block, active), m.spread(m.warp, active), address, values, i.text)
    else:
        raise NotImplementedError(f"unknown instruction: {i.text}")


@operation("red atom", "global relaxed acq_rel gpu sys add")
def reduce_in_memory(m: Machine, i: Instruction, active: Active) -> None:
    """Additions whose result nobody takes: what was there before depends on the order."""
    *result, target, source = i.operands
    if "add" not in i.parts or any(r != result[0] for r in result):
        raise NotImplementedError(f"unknown instruction: {i.text}")
    values = np.ascontiguousarray(m.spread(m.read(source, i.type), active))
    m.memory.add(m.addresses(target, active), values, i.text)


# Matrices of 8 rows of 16 bytes in shared memory; lane 8 q + r holds the address of row r of matrix
# q, and lane l gets (or gives) word l % 4 of row l // 4; transposed, column l // 4 of two rows.


def _matrix_words(m: Machine, i: Instruction, address: np.ndarray, q: int) -> list[np.ndarray]:
    first_lane = np.arange(m.num_lanes) - m.lane + 8 * q
    if "trans" not in i.parts:
        return [address[first_lane + m.lane // 4] + 4 * (m.lane % 4)]
    rows = [first_lane + 2 * (m.lane % 4) + k for k in range(2)]
    return [address[row] + 2 * (m.lane // 4) for row in rows]


@operation("ldmatrix stmatrix", "sync aligned m8n8 x1 x2 x4 trans shared cta")
def move_matrix(m: Machine, i: Instruction, active: Active) -> None:
    if active is not None and not np.array_equal(active, np.repeat(active[::32], 32)):
        raise RuntimeError(f"some lanes of a warp do not take part: {i.text}")
    is_load = i.parts[0] == "ldmatrix"
    registers, place = i.operands if is_load else i.operands[::-1]
    address = np.zeros(m.num_lanes, np.int64)
    address[slice(None) if active is None else active] = m.addresses(place, active)
    block, warp = m.spread(m.block, active), m.spread(m.warp, active)
    size = 2 if "trans" in i.parts else 4
    for q, register in enumerate(elements(registers)):
        places = [m.spread(where, active) for where in _matrix_words(m, i, address, q)]
        if is_load:
            words = [m.shared.load(block, warp, where, size, 1, i.text)[0] for where in places]
            m.write(register, join(m.gather(words, active), np.uint32), active)
            continue
        whole = m.spread(m.read(register, "b32"), active)
        for k, where in enumerate(places):
            word = (whole >> np.uint32(16 * k)).astype(UNSIGNED[size])
            m.shared.store(block, warp, where, [word], i.text)
