"""The longest chain of dependent instructions that a block executes: what no second block hides.

Each warp issues in order, one instruction a cycle; an instruction waits for its operands, a barrier
for all warps of its block. What is kept for each warp and register is not a time but how many
instructions of which class lie on the chain that it ends: a device's latencies turn that into time.
"""

from collections.abc import Sequence

import numpy as np

from .ptx import Address, Instruction, Not, Operand, Register, Vector

# Class -> cycles until the result is there, by which chains are compared while a kernel runs. A
# device has its own for global memory and float64 (`devices`); the others hardly differ. Jia et al.
# 2018 (arXiv:1804.06826) and Luo et al. 2024 (arXiv:2402.13499) measured such figures.
LATENCY = {
    "issue": 1.0,
    "arithmetic": 4.0,
    "special": 18.0,  # exponentials, reciprocals, conversions
    "float64": 16.0,
    "shared": 28.0,  # shared memory and shuffles
    "global": 270.0,  # as from the second-level cache
    "barrier": 20.0,
}
CLASSES = tuple(LATENCY)
SPECIAL = {"ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "cvt"}
FLOAT64_DIVISION = 10  # dependent instructions that div.rn.f64 becomes, about
NOT_ISSUED = {"mov", "cvta"}  # the assembler renames registers instead


def class_of(instruction: Instruction) -> str:
    """The class of an instruction's result."""
    name, parts = instruction.parts[0], instruction.parts
    if name in ("ld", "atom") and "global" in parts:
        return "global"
    if name in ("ld", "st", "shfl", "atom", "red") and "param" not in parts:
        return "shared"
    if parts[-1] == "f64" or "f64" in parts[1:2]:
        return "float64"
    return "special" if name in SPECIAL else "arithmetic"


def registers(operand: Operand) -> list[str]:
    if isinstance(operand, Register):
        return [operand.name]
    if isinstance(operand, Not):
        return registers(operand.register)
    if isinstance(operand, Address):
        return registers(operand.base)
    if isinstance(operand, Vector):
        return [name for element in operand.elements for name in registers(element)]
    return []


class Clock:
    """Chains of the warps that run together."""

    def __init__(self, num_warps: int, warps_of_block: int) -> None:
        self.warps_of_block = warps_of_block
        self.cycles = np.array([LATENCY[name] for name in CLASSES])
        self.now = np.zeros((num_warps, len(CLASSES)))  # on the chain to the last issue
        self.ready: dict[str, np.ndarray] = {}  # register -> the same for its value

    def step(self, instruction: Instruction, warps: np.ndarray) -> None:
        """These warps execute an instruction."""
        name = instruction.parts[0]
        writes = name not in ("st", "red", "bra", "ret", "exit", "bar")
        targets = registers(instruction.operands[0]) if writes and instruction.operands else []
        sources = instruction.operands[1:] if writes else instruction.operands
        names = [register for operand in sources for register in registers(operand)]
        if instruction.guard is not None:
            names += registers(instruction.guard)
        chain = self.now[warps]
        if name in NOT_ISSUED:
            chain = np.zeros_like(chain)
        for register in names:
            if (ready := self.ready.get(register)) is not None:
                other = ready[warps]
                later = other @ self.cycles > chain @ self.cycles
                chain = np.where(later[:, None], other, chain)
        if name not in NOT_ISSUED:
            chain[:, 0] += 1
            self.now[warps] = chain
        for register in targets:
            ready = self.ready.setdefault(register, np.zeros_like(self.now))
            ready[warps] = chain
            if name not in NOT_ISSUED:
                kind = class_of(instruction)
                times = FLOAT64_DIVISION if (name, kind) == ("div", "float64") else 1
                ready[warps, CLASSES.index(kind)] += times

    def meet(self, blocks: Sequence[int] | np.ndarray) -> None:
        """All warps of these blocks have reached a barrier."""
        now = self.now.reshape(-1, self.warps_of_block, len(CLASSES))
        for block in blocks:
            last = now[block, (now[block] @ self.cycles).argmax()].copy()
            last[CLASSES.index("barrier")] += 1
            now[block] = last

    def longest(self) -> dict[str, float]:
        """Class -> instructions on the longest chain of all warps."""
        last = self.now[(self.now @ self.cycles).argmax()]
        return {name: float(n) for name, n in zip(CLASSES, last, strict=True) if n}
