"""What the compiler made of a kernel: read from the machine code, no GPU or driver needed.

The counts are static: of the instructions in the machine code, each once, whatever runs. Those of a
loop stand for its iterations: the whole body is an upper bound, what every iteration passes (`hot`)
a lower one; they differ by what branches inside the loop skip, such as the tile of the target.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget

from . import amdgcn, sass
from .driver import Kernel
from .loops import Instruction, Loop, streaming_loop


class _Vendor(NamedTuple):
    """How to read an opcode."""

    global_access: Callable[[str], tuple[str, int] | None]
    is_exp2: Callable[[str], bool]
    is_barrier: Callable[[str], bool]
    is_nop: Callable[[str], bool]
    pipe_cycles: Callable[[str, str], dict[str, float]]


NVIDIA = _Vendor(sass.global_access, sass.is_exp2, sass.is_barrier, sass.is_nop, sass.pipe_cycles)
AMD = _Vendor(
    amdgcn.global_access, amdgcn.is_exp2, amdgcn.is_barrier, amdgcn.is_nop, amdgcn.pipe_cycles
)


class Codegen(NamedTuple):
    target: str  # "sm_90", "gfx942"
    num_warps: int  # of a program; waves on AMD
    warp_size: int
    registers: int  # of a thread
    stack_bytes: int  # of a thread
    spills: int  # NVIDIA: loads and stores of local memory; AMD: registers spilled
    shared_bytes: int  # of a program
    occupancy: float  # share of the multiprocessor's warps resident, 0 to 1
    occupancy_limit: str  # "registers", "shared memory", "warps" or "blocks"
    access_bits: dict[str, Counter[int]]  # "load", "store": global accesses by bits a thread
    num_instructions: int  # of the kernel, without NOP
    has_loop: bool  # False: no loop reads global memory, and the whole kernel stands for it
    loop_instructions: Counter[str]  # of the streaming loop, by opcode with its suffixes
    hot_loop_instructions: Counter[str]  # of those, what every iteration passes
    shortest_loop_instructions: Counter[str]  # of those, the shortest way round

    @property
    def blocks(self) -> int:
        """Programs that a multiprocessor holds together."""
        is_nvidia = self.target.startswith("sm_")
        most = sass.LIMITS[self.target].warps if is_nvidia else amdgcn.SIMDS * amdgcn.WAVES_PER_SIMD
        return round(self.occupancy * most / self.num_warps)

    @property
    def barriers_in_loop(self) -> int:
        return _count(self.loop_instructions, self._vendor.is_barrier)

    @property
    def loop_load_bytes(self) -> int:
        """Bytes that every iteration of the loop loads from global memory, all threads together.

        Over the bytes of a logit it is the number of logits that an iteration consumes, where the
        loop loads nothing else and no branch skips a load: a tile, or several where the compiler
        unrolled the loop.
        """
        bits = sum(
            access[1] * n
            for opcode, n in self.hot_loop_instructions.items()
            if (access := self._vendor.global_access(opcode)) and access[0] == "load"
        )
        return bits // 8 * self.num_warps * self.warp_size

    def instructions_per_logit(self, logits_per_iteration: float, *, hot: bool = False) -> float:
        """Machine instructions of a thread for each logit that it consumes in the loop.

        Args:
            logits_per_iteration: of a whole program, in one iteration of the machine's loop: its
                tile, times the unrolling if there is any (see `loop_load_bytes`).
            hot: count only what every iteration passes.
        """
        return self._loop(hot).total() / self._logits_per_thread(logits_per_iteration)

    def exp2_per_logit(self, logits_per_iteration: float, *, hot: bool = False) -> float:
        """MUFU.EX2 (AMD: v_exp_f32) of a thread for each logit that it consumes in the loop."""
        count = _count(self._loop(hot), self._vendor.is_exp2)
        return count / self._logits_per_thread(logits_per_iteration)

    def pipe_cycles(self, logits_per_iteration: float, *, hot: bool = False) -> dict[str, float]:
        """Cycles of one sub-partition (AMD: SIMD) for 32 logits, by pipe.

        The pipes, and where their rates come from: `sass.pipe_cycles`, `amdgcn.pipe_cycles`.
        """
        logits_per_warp = self._logits_per_thread(logits_per_iteration) * self.warp_size
        cycles: dict[str, float] = {}
        for opcode, n in self._loop(hot).items():
            for pipe, each in self._vendor.pipe_cycles(opcode, self.target).items():
                cycles[pipe] = cycles.get(pipe, 0.0) + each * n * 32 / logits_per_warp
        return cycles

    def of_shortest_way(self) -> "Codegen":
        """The same kernel with the shortest way round its loop as the loop.

        Of two branches, one for the tile of the target and one for all other tiles, it takes the
        latter: what nearly every iteration executes, where `hot` leaves out both.
        """
        return self._replace(loop_instructions=self.shortest_loop_instructions)

    @property
    def _vendor(self) -> _Vendor:
        return NVIDIA if self.target.startswith("sm_") else AMD

    def _loop(self, hot: bool) -> Counter[str]:
        return self.hot_loop_instructions if hot else self.loop_instructions

    def _logits_per_thread(self, logits_per_iteration: float) -> float:
        if logits_per_iteration <= 0:
            raise ValueError(f"logits_per_iteration must be positive, got {logits_per_iteration}")
        return logits_per_iteration / (self.num_warps * self.warp_size)


def inspect(compiled: Any, target: GPUTarget) -> Codegen:
    """Read the machine code of a kernel.

    Args:
        compiled: `triton.compiler.CompiledKernel`, as `triton.compile` returned it for `target`.
        target: "cuda" with sm 80, 86, 89, 90, 100 or 120, or "hip" with gfx942 or gfx950.
    Raises:
        ValueError: another target, or machine code that lacks what is looked for.
    """
    launch = dict(num_warps=compiled.metadata.num_warps, shared_bytes=compiled.metadata.shared)
    if target.backend == "cuda":
        name, vendor, reads_memory = f"sm_{target.arch}", NVIDIA, sass.reads_memory
        program, (registers, stack_bytes) = sass.disassemble(_stage(compiled, "cubin"))
        spills = sum(sass.is_spill(i.opcode) for i in program)
        occupancy, limit = sass.occupancy(name, registers=registers, **launch)
    elif target.backend == "hip":
        name, vendor, reads_memory = str(target.arch), AMD, amdgcn.reads_memory
        program, used = amdgcn.parse(_stage(compiled, "amdgcn"))
        registers, stack_bytes, spills, waves_by_registers = used
        occupancy, limit = amdgcn.occupancy(name, waves_by_registers=waves_by_registers, **launch)
    else:
        raise ValueError(f"machine code is read for cuda and hip, got {target.backend}")
    program_loop = streaming_loop(program, reads_memory)
    loop = program_loop or Loop(body=program, hot=program, shortest=program)
    return Codegen(
        target=name,
        warp_size=target.warp_size,
        registers=registers,
        stack_bytes=stack_bytes,
        spills=spills,
        occupancy=occupancy,
        occupancy_limit=limit,
        access_bits=_access_bits(program, vendor),
        num_instructions=_opcodes(program, vendor).total(),
        has_loop=program_loop is not None,
        loop_instructions=_opcodes(loop.body, vendor),
        hot_loop_instructions=_opcodes(loop.hot, vendor),
        shortest_loop_instructions=_opcodes(loop.shortest, vendor),
        **launch,
    )


def _stage(compiled: Any, stage: str) -> Any:
    if stage not in compiled.asm:
        raise ValueError(f"looked for {stage} in a compiled kernel, found {sorted(compiled.asm)}")
    return compiled.asm[stage]


def _opcodes(program: Iterable[Instruction], vendor: _Vendor) -> Counter[str]:
    return Counter(i.opcode for i in program if not vendor.is_nop(i.opcode))


def _access_bits(program: Iterable[Instruction], vendor: _Vendor) -> dict[str, Counter[int]]:
    widths: dict[str, Counter[int]] = {"load": Counter(), "store": Counter()}
    for instruction in program:
        if access := vendor.global_access(instruction.opcode):
            kind, bits = access
            widths[kind][bits] += 1
    return widths


def _count(opcodes: Counter[str], predicate: Callable[[str], bool]) -> int:
    return sum(n for opcode, n in opcodes.items() if predicate(opcode))


def inspect_kernel(kernel: Kernel) -> Codegen:
    """Read the machine code of a kernel that `driver.emulate` saw."""
    asm = {
        name: file.read_bytes() if name in ("cubin", "hsaco") else file.read_text()
        for name, file in kernel.asm.items()
    }
    compiled = SimpleNamespace(asm=asm, metadata=kernel.metadata)
    return inspect(compiled, kernel.metadata.target)
