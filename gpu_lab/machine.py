"""Runs a PTX program on CPU tensors: all threads of some blocks at once, in NumPy.

What it checks: every global access is aligned and inside a tensor's view; every shared access is
inside the block's memory, after a write, and apart from other warps' by a barrier; a shuffle reads
lanes that take part; every thread reaches every barrier; registers that were not written hold
NaN. What it does not show: timing, the assembler's own work (SASS), the last bit of approximate
instructions, and memory order between blocks.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from .clock import LATENCY, Clock
from .instructions import OPERATIONS
from .memory import NUMPY, UNSIGNED, GlobalMemory, SharedMemory
from .ptx import Address, Immediate, Name, Not, Operand, Program, Register, Special

WARP = 32
MAX_LANES = 4096  # that run together: enough to hide the cost of a NumPy call, few enough to cache
Schedule = Literal["lockstep", "warps"]

# What a register holds that was not written: NaN as a float of any width. A kernel may read such a
# one (lanes that only fill a shuffle do); its result must not depend on it.
UNWRITTEN = 0x7FF77FF77FF77FF7
CONTROL_FLOW = ("bra", "ret", "exit", "bar")


class Counts(NamedTuple):
    """What one launch executed, summed over its warps and lanes."""

    kernel: str
    num_blocks: int
    num_threads: int  # of a block
    instructions: Counter[str]  # opcode -> warps that executed it
    lanes: Counter[tuple[str, int]]  # ("load" | "store" | "atomic", bytes) -> lanes
    bytes_loaded: int  # from global memory, by every lane: repeated reads count again
    bytes_stored: int
    distinct: Counter[str]  # "load", ... -> bytes; a word that lanes access together counts once
    longest_chain: dict[str, float]  # `clock.CLASSES` -> instructions, of the slowest block

    def executed(self, kind: str) -> int:
        """Warps that executed an opcode such as ex2, whatever its suffixes."""
        return sum(n for opcode, n in self.instructions.items() if opcode.split(".")[0] == kind)


def run(
    program: Program,
    grid: Sequence[int],
    arguments: Sequence[Tensor | int | float],
    shared_bytes: int,
    schedule: Schedule = "lockstep",
    seed: int = 0,
    follows_chains: bool = False,
) -> Counts:
    """Run every block of the grid; tensors are read and written in place.

    Args:
        arguments: in the order of the program's parameters; those it has beyond them are 0.
        schedule: "lockstep" runs all threads together; "warps" runs one warp of each block, drawn
            at random, until it has to wait: warps are as far apart as barriers let them be.
        follows_chains: find the longest chain of dependent instructions, which takes its time.

    Raises:
        MemoryError: an access that a GPU would not allow, or would answer differently each time.
        RuntimeError: threads that wait for ever, a shuffle from a thread that does not take part.
        NotImplementedError: an instruction that is not known here.
    """
    memory = GlobalMemory(a for a in arguments if isinstance(a, Tensor))
    parameters = [_bits(a, t) for a, t in zip(arguments, program.param_types, strict=False)]
    parameters += [np.uint64(0)] * (len(program.param_types) - len(parameters))
    machine = Machine(program, grid, parameters, memory, shared_bytes, schedule, seed)
    chains: list[dict[str, float]] = [{}]
    num_blocks = int(np.prod(grid))
    together = max(1, MAX_LANES // program.num_threads)
    with np.errstate(all="ignore"):
        for first in range(0, num_blocks, together):
            blocks = np.arange(first, min(first + together, num_blocks))
            warps = len(blocks) * program.num_threads // WARP
            machine.clock = Clock(warps, warps // len(blocks)) if follows_chains else None
            machine.run_blocks(blocks)
            if machine.clock is not None:
                chains.append(machine.clock.longest())
    return Counts(
        program.name, num_blocks, program.num_threads, machine.executed, memory.lanes,
        memory.num_bytes("load"), memory.num_bytes("store"), memory.distinct,
        max(chains, key=lambda chain: sum(LATENCY[name] * n for name, n in chain.items())),
    )  # fmt: skip


def _bits(argument: Tensor | int | float, param_type: str) -> np.generic:
    """The bit pattern of an argument, as the parameter's declared type holds it."""
    if isinstance(argument, Tensor):
        return np.uint64(argument.data_ptr())
    kind = NUMPY[param_type]
    if param_type[0] == "f":
        return np.array(argument, kind).view(UNSIGNED[np.dtype(kind).itemsize])[()]
    width = np.dtype(kind).itemsize
    return UNSIGNED[width](int(argument) & ((1 << 8 * width) - 1))


class Machine:
    """Registers and program counters of the threads that run together."""

    def __init__(
        self,
        program: Program,
        grid: Sequence[int],
        parameters: list[np.generic],
        memory: GlobalMemory,
        shared_bytes: int,
        schedule: Schedule,
        seed: int,
    ) -> None:
        self.program = program
        self.grid = (*grid, 1, 1)[:3]
        self.parameters = parameters
        self.memory = memory
        self.shared_bytes = shared_bytes
        self.schedule = schedule
        self.random = np.random.default_rng(seed)
        self.clock: Clock | None = None
        self.executed: Counter[str] = Counter()
        self.block_starts = program.block_starts
        self.steps = []
        for instruction in program.instructions:
            operation = OPERATIONS.get(instruction.parts[0])
            if operation is None and instruction.parts[0] not in CONTROL_FLOW:
                raise NotImplementedError(f"unknown instruction: {instruction.text}")
            self.steps.append((instruction, operation))

    def run_blocks(self, blocks: np.ndarray) -> None:
        num_threads = self.program.num_threads
        self.num_lanes = len(blocks) * num_threads
        thread = np.tile(np.arange(num_threads), len(blocks))
        block = np.repeat(blocks, num_threads)
        self.block = np.repeat(np.arange(len(blocks)), num_threads)
        self.warp = np.arange(self.num_lanes, dtype=np.int32) // WARP
        self.lane = thread % WARP
        width, height, depth = self.grid
        self.special = {
            "%tid.x": thread, "%tid.y": 0, "%tid.z": 0, "%laneid": self.lane,
            "%ntid.x": num_threads, "%ntid.y": 1, "%ntid.z": 1,
            "%ctaid.x": block % width, "%ctaid.y": block // width % height,
            "%ctaid.z": block // (width * height),
            "%nctaid.x": width, "%nctaid.y": height, "%nctaid.z": depth,
        }  # fmt: skip
        self.registers: dict[str, np.ndarray] = {}
        self.shared = SharedMemory(len(blocks), self.shared_bytes)
        self.pc = np.zeros(self.num_lanes, np.int64)
        self.waits = np.zeros(self.num_lanes, np.bool_)
        running = np.zeros(len(blocks), np.int64)  # "warps": the one that runs in each block
        end = len(self.steps)
        while (live := self.pc < end).any():
            ready = live & ~self.waits
            if not ready.any():
                self._meet()
                continue
            if self.schedule == "warps":
                ready &= self._one_warp_a_block(ready, running)
            first = int(self.pc[ready].min())  # who is behind goes first, and so meets the others
            self._run_straight(first, ready & (self.pc == first))

    def _one_warp_a_block(self, ready: np.ndarray, running: np.ndarray) -> np.ndarray:
        """The threads of one warp in each block: the one that runs, until it waits or ends."""
        can_run = ready.reshape(len(running), -1, WARP).any(2)
        blocked = ~can_run[np.arange(len(running)), running]
        order = self.random.permutation(can_run.shape[1])
        running[blocked] = order[can_run[blocked][:, order].argmax(1)]
        chosen = np.arange(can_run.shape[1]) == running[:, None]
        return np.repeat(chosen.ravel(), WARP)

    def _meet(self) -> None:
        """Open the barriers at which all threads of a block wait."""
        num_threads = self.program.num_threads
        waits = self.waits.reshape(-1, num_threads)
        complete = waits.all(1)
        if not complete.any():
            missing = int((~waits[waits.any(1)]).sum(1)[0])
            raise RuntimeError(f"{missing} of {num_threads} threads ended without the barrier")
        places = np.where(waits, self.pc.reshape(-1, num_threads), -1)[complete]
        if (places != places[:, :1]).any():
            raise RuntimeError("threads of a block wait at different barriers")
        self.shared.pass_barrier(np.flatnonzero(complete))
        if self.clock is not None:
            self.clock.meet(np.flatnonzero(complete))
        waits[complete] = False

    def _run_straight(self, index: int, mask: np.ndarray) -> None:
        """From one instruction until threads may part, meet, wait or end."""
        everybody = bool(mask.all())
        warps = np.flatnonzero(mask.reshape(-1, WARP).any(1))
        num_warps = warps.size
        while index < len(self.steps):
            instruction, operation = self.steps[index]
            self.executed[instruction.opcode] += num_warps
            if self.clock is not None:
                self.clock.step(instruction, warps)
            active = None if everybody else mask
            if instruction.guard is not None:
                guard = self.read_predicate(instruction.guard) ^ instruction.negated
                guard = np.broadcast_to(guard, self.num_lanes)
                active = guard if everybody else mask & guard
            index += 1
            kind = instruction.parts[0]
            if kind == "bra":
                target = instruction.operands[0]
                assert isinstance(target, Name)
                self.pc[mask] = index
                self.pc[mask if active is None else active] = self.program.labels[target.name]
                return
            if kind in ("ret", "exit"):
                self.pc[mask] = index
                self.pc[mask if active is None else active] = len(self.steps)
                return
            if kind == "bar":
                is_known = instruction.opcode == "bar.sync" and instruction.guard is None
                if not is_known or instruction.operands[0] != Immediate(0, False):
                    raise NotImplementedError(f"unknown instruction: {instruction.text}")
                self.pc[mask] = index
                self.waits |= mask
                return
            if operation is not None and (active is None or active.any()):
                operation(self, instruction, active)
            if index in self.block_starts:
                break
        self.pc[mask] = index

    def read(self, operand: Operand, kind: str) -> np.ndarray:
        """The operand as an array (or one number, where all threads agree) of a PTX type."""
        dtype = np.dtype(NUMPY[kind])
        unsigned = UNSIGNED[dtype.itemsize]
        if isinstance(operand, Register):
            value = self.registers.get(operand.name)
            if value is None:
                value = np.array(UNWRITTEN & ((1 << operand.bits) - 1), UNSIGNED[operand.bits // 8])
            if value.dtype.itemsize != dtype.itemsize:
                value = value.astype(unsigned)  # the low bits, or zeros above
            return value.view(dtype)
        if isinstance(operand, Special):
            if operand.name not in self.special:
                raise NotImplementedError(f"unknown register {operand.name}")
            return np.asarray(self.special[operand.name]).astype(unsigned).view(dtype)
        if isinstance(operand, Immediate):
            bits = operand.bits & ((1 << 8 * dtype.itemsize) - 1)
            return np.array(bits, unsigned).view(dtype)
        raise TypeError(f"{operand} is no value")

    def read_predicate(self, operand: Operand) -> np.ndarray:
        if isinstance(operand, Not):
            return ~self.read_predicate(operand.register)
        if isinstance(operand, Immediate):
            return np.array(bool(operand.bits))
        assert isinstance(operand, Register)
        if (value := self.registers.get(operand.name)) is None:
            raise RuntimeError(f"predicate {operand.name} is read before it is written")
        return value

    def write(self, operand: Operand, value: np.ndarray, active: np.ndarray | None) -> None:
        """Into a register, for the active threads (None: all); a narrower integer is extended."""
        if operand == Name("_"):
            return
        assert isinstance(operand, Register), operand
        value = np.asarray(value)
        if operand.bits == 1:
            assert value.dtype == np.bool_
        else:
            width = operand.bits // 8
            if value.dtype.itemsize != width:
                assert value.dtype.kind in "iu", f"{value.dtype} into {operand}"
                value = value.astype(np.dtype(f"{value.dtype.kind}{width}"))
            value = value.view(UNSIGNED[width])
        if active is not None:
            before = self.registers.get(operand.name)
            if before is None:
                before = np.array(UNWRITTEN & ((1 << operand.bits) - 1)).astype(value.dtype)
            value = np.where(active, value, before)
        self.registers[operand.name] = value

    def addresses(self, operand: Operand, active: np.ndarray | None) -> np.ndarray:
        """The address of every active thread, in bytes."""
        assert isinstance(operand, Address), operand
        wide = isinstance(operand.base, Register) and operand.base.bits == 64
        base = self.read(operand.base, "s64" if wide else "s32").astype(np.int64)
        return self.spread(base + operand.offset, active)

    def spread(self, value: np.ndarray, active: np.ndarray | None) -> np.ndarray:
        """One number for every active thread."""
        whole = np.broadcast_to(value, self.num_lanes)
        return whole if active is None else whole[active]

    def gather(self, values: list[np.ndarray], active: np.ndarray | None) -> list[np.ndarray]:
        """The inverse of `spread`: zeros for threads that are not active."""
        if active is None:
            return values
        wholes = [np.zeros(self.num_lanes, value.dtype) for value in values]
        for whole, value in zip(wholes, values, strict=True):
            whole[active] = value
        return wholes

    def parameter(self, operand: Operand) -> np.ndarray:
        assert isinstance(operand, Name), operand
        return np.asarray(self.parameters[int(operand.name.rsplit("_", 1)[1])])
