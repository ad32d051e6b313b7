"""AMD machine code (amdgcn assembly of gfx942 and gfx950): instructions, resources, pipes.

A compute unit has four SIMDs of 16 lanes; a wave of 64 threads passes one in 4 cycles. Sources: the
CDNA 3 and CDNA 4 instruction set references and white papers, and LLVM's AMDGPU user guide for the
assembly's metadata. The cycles below are the hardware's as those describe it, not measured.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from .loops import Instruction

WAVES_PER_SIMD = 8
SIMDS = 4  # of a compute unit
SHARED_BYTES = {"gfx942": 64 << 10, "gfx950": 160 << 10}  # LDS of a compute unit

VECTOR_CYCLES = 4.0  # 64 lanes on 16; packed float32 does two operations in it
TRANSCENDENTAL_CYCLES = 16.0  # a quarter of the rate
# LDS gives 128 bytes a clock to the four SIMDs: 2 cycles for 64 lanes of 32 bits, 8 of a SIMD's.
SHARED_CYCLES = 8.0
# The vector L1 gives 64 bytes a clock to the four SIMDs (assumed): 16 of a SIMD's for 32 bits.
MEMORY_CYCLES = 16.0

_INSTRUCTION = re.compile(
    r"^\t(?P<opcode>(?:v|s|ds|global|flat|buffer|scratch)_\w+)(?P<operands>.*)"
)
_LABEL = re.compile(r"^(\.LBB\w+):")
_GLOBAL = re.compile(r"^(?:global|flat|buffer)_(load|store)_(\w+)$")
_TRANSCENDENTAL = re.compile(r"^v_(exp|log|rcp|rcp_iflag|rsq|sqrt|sin|cos)_f(16|32)(_|$)")
_NO_CYCLES = re.compile(r"^s_(waitcnt|nop|barrier|endpgm|c?branch|sleep|sched|setprio|clause)")


class Resources(NamedTuple):
    registers: int  # vector registers of a thread, accumulation registers among them
    stack_bytes: int  # of a thread
    spills: int  # vector registers, to memory; scalar ones go to lanes of vector registers
    waves_by_registers: int  # of a SIMD


def parse(assembly: str) -> tuple[list[Instruction], Resources]:
    """Return the instructions of an assembly text with one kernel, and what it takes.

    Raises:
        ValueError: the text lacks what is looked for.
    """
    resources = Resources(
        registers=_number(assembly, r"^\s+\.vgpr_count:\s+(\d+)"),
        stack_bytes=_number(assembly, r"^\s+\.private_segment_fixed_size:\s+(\d+)"),
        spills=_number(assembly, r"^\s+\.vgpr_spill_count:\s+(\d+)"),
        waves_by_registers=_number(assembly, r"^; Occupancy: (\d+)"),
    )
    matches: list[re.Match[str]] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(matches)
        elif instruction := _INSTRUCTION.match(line):
            matches.append(instruction)
    if not any(m["opcode"] == "s_endpgm" for m in matches):
        raise ValueError("assembly: looked for instructions that end in s_endpgm, found none")
    return [_instruction(m, labels) for m in matches], resources


def _number(assembly: str, pattern: str) -> int:
    found = re.findall(pattern, assembly, re.MULTILINE)
    if len(found) != 1:
        raise ValueError(f"assembly: looked for one line of {pattern!r}, found {len(found)}")
    return int(found[0])


def _instruction(match: re.Match[str], labels: Mapping[str, int]) -> Instruction:
    opcode = match["opcode"]
    operands = match["operands"].split(";")[0].strip()
    target = None
    if opcode == "s_branch" or opcode.startswith("s_cbranch"):
        if operands not in labels:
            raise ValueError(f"assembly: looked for the label of {opcode} {operands}")
        target = labels[operands]
    ends = opcode in ("s_branch", "s_endpgm", "s_setpc_b64")
    return Instruction(opcode, operands, target, falls_through=not ends)


def occupancy(
    target: str, *, waves_by_registers: int, shared_bytes: int, num_warps: int
) -> tuple[float, str]:
    """Return the share of a SIMD's eight waves that are resident, and what limits it.

    Args:
        target: "gfx942" or "gfx950".
        waves_by_registers: of a SIMD, as the compiler's "; Occupancy:" line says.
        shared_bytes: of a block; Triton allots it at launch, so the compiler's line leaves it out.
        num_warps: waves of a block.
    Raises:
        ValueError: a target without known limits, or a block that does not fit on one.
    """
    _check_known(target)
    unit_waves = SIMDS * min(waves_by_registers, WAVES_PER_SIMD)
    by_registers = unit_waves // num_warps
    by_shared = SHARED_BYTES[target] // shared_bytes if shared_bytes else by_registers
    blocks = min(by_registers, by_shared)
    register_limit = "registers" if waves_by_registers < WAVES_PER_SIMD else "warps"
    limit = "shared memory" if by_shared < by_registers else register_limit
    if blocks == 0:
        raise ValueError(f"{target} holds no block of {num_warps} waves: too many for its {limit}")
    return blocks * num_warps / (SIMDS * WAVES_PER_SIMD), limit


def _check_known(target: str) -> None:
    if target not in SHARED_BYTES:
        raise ValueError(f"figures are known for {sorted(SHARED_BYTES)}, got {target}")


def global_access(opcode: str) -> tuple[str, int] | None:
    """Return ("load" or "store", bits a thread) of an access to global memory, else None."""
    match = _GLOBAL.match(opcode)
    return None if match is None else (match[1], _access_bits(opcode, match[2]))


def _access_bits(opcode: str, suffix: str) -> int:
    names = {"dword": 32, "ushort": 16, "sshort": 16, "short": 16}
    names |= {"ubyte": 8, "sbyte": 8, "byte": 8}
    for part in suffix.split("_"):  # of "short_d16_hi" or "lds_dwordx4"
        if part in names:
            return names[part]
        if words := re.fullmatch(r"dwordx(\d)", part):
            return 32 * int(words[1])
    raise ValueError(f"assembly: looked for the width of {opcode}")


def reads_memory(instruction: Instruction) -> bool:
    """Whether it reads global memory into vector registers or LDS; scalar loads do not count."""
    access = global_access(instruction.opcode)
    return access is not None and access[0] == "load"


def is_exp2(opcode: str) -> bool:
    return opcode.startswith("v_exp_f32")


def is_barrier(opcode: str) -> bool:
    return opcode.startswith("s_barrier")


def is_nop(opcode: str) -> bool:
    return opcode == "s_nop"


def pipe_cycles(opcode: str, target: str) -> dict[str, float]:
    """Return the cycles of one SIMD's pipes that an instruction of a wave of 64 threads takes.

    Pipes: "valu" the vector ALU, which does everything a v_ instruction does; "mufu" the part of
    that which is transcendental; "salu" the scalar ALU, which a SIMD reaches once in 4 cycles;
    "lds" shared memory and permutations; "lsu" global memory. What only waits or branches gives {}.

    Raises:
        ValueError: another target, or a matrix instruction, of which no rate is known here.
    """
    _check_known(target)
    if "mfma" in opcode:
        raise ValueError(f"no rate is known here for the matrix instruction {opcode}")
    if _NO_CYCLES.match(opcode):
        return {}
    if _TRANSCENDENTAL.match(opcode):
        return {"valu": TRANSCENDENTAL_CYCLES, "mufu": TRANSCENDENTAL_CYCLES}
    if opcode.startswith("v_"):
        return {"valu": VECTOR_CYCLES}
    if opcode.startswith("s_"):
        return {"salu": 4.0}
    if opcode.startswith("ds_"):
        return {"lds": SHARED_CYCLES}
    access = global_access(opcode)
    bits = 32 if access is None else access[1]  # scratch and atomics: a word
    return {"lsu": MEMORY_CYCLES * max(1.0, bits / 32)}
