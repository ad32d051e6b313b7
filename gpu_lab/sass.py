"""NVIDIA machine code (SASS): a cubin's instructions, resources, access widths and pipes.

Sources: the CUDA C++ Programming Guide, "Compute Capabilities" (technical specifications for each
capability) and "Arithmetic Instructions" (throughput of native arithmetic instructions, results
per clock and multiprocessor). Which pipe an opcode takes is not in the guide: it follows from the
rates, and from the pipes that Nsight Compute names.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import triton

from .loops import Instruction

Known = TypeVar("Known")


class Limits(NamedTuple):
    """What one multiprocessor holds at most."""

    warps: int
    registers: int  # of 32 bits
    shared_bytes: int
    blocks: int


LIMITS = {
    "sm_80": Limits(64, 65536, 164 << 10, 32),
    "sm_86": Limits(48, 65536, 100 << 10, 16),
    "sm_89": Limits(48, 65536, 100 << 10, 24),
    "sm_90": Limits(64, 65536, 228 << 10, 32),
    "sm_100": Limits(64, 65536, 228 << 10, 32),
    "sm_120": Limits(48, 65536, 100 << 10, 24),
}

RESERVED_SHARED_BYTES = 1024  # the system's own, in every block, from compute capability 8.0 on
REGISTERS_UNIT = 256  # a warp's registers are allocated in such steps
WARPS_UNIT = 4  # and warps in fours, one a sub-partition

# Lanes a clock and multiprocessor, where they are not the same on every target.
FP32_LANES = {target: 64 if target == "sm_80" else 128 for target in LIMITS}

FMA_PIPE = {"FADD", "FMUL", "FFMA"}
PACKED_FMA_PIPE = {"FADD2", "FMUL2", "FFMA2"}  # two float32 a lane
HEAVY_FMA_PIPE = {"IMAD", "HFMA2", "HADD2", "HMUL2"}  # half of the lanes of the FMA pipe
MOVES_DATA = {
    *("LDG", "STG", "LDGSTS", "LD", "ST", "LDS", "STS", "LDSM", "STSM", "LDL", "STL"),
    *("ATOM", "ATOMG", "ATOMS", "RED"),
}
SHUFFLES = {"SHFL"}
CONVERTS = {"F2F", "F2I", "I2F", "I2FP", "FRND", "REDUX", "CREDUX"}  # and warp reductions
ISSUE_SLOT_ONLY = {
    *("BRA", "BSSY", "BSYNC", "BREAK", "EXIT", "WARPSYNC", "NOP", "BAR", "DEPBAR", "LDGDEPBAR"),
    *("RET", "CALL", "ERRBAR", "MEMBAR", "YIELD", "FENCE", "CCTL", "ACQBULK"),
    *("R2UR", "S2R", "S2UR", "CS2R", "LDC", "LDCU", "ULDC"),  # constants and special registers
}

_INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+\s+)?"
    r"(?P<opcode>[A-Z][A-Z0-9_.]*)(?P<operands>[^;]*);"
)
_LABEL = re.compile(r"^(\.L_x_\d+):")
_BRANCH_TARGET = re.compile(r"`\((\.L_x_\d+)\)$")


class Resources(NamedTuple):
    registers: int  # a thread
    stack_bytes: int  # a thread


@cache  # 0.2 s, and a kernel serves many configurations
def disassemble(cubin: bytes) -> tuple[list[Instruction], Resources]:
    """Return the instructions of a cubin with one kernel, and what a thread of it takes.

    Raises:
        ValueError: the tools' output lacks what is looked for.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = _run("nvdisasm", "-c", file.name)
        usage = _run("cuobjdump", "-res-usage", file.name)
    return parse_listing(listing), parse_usage(usage)


def parse_listing(listing: str) -> list[Instruction]:
    """Return the instructions of `nvdisasm -c`."""
    sections = re.findall(r"^\s+\.section\s+\.text\.(\S+?),", listing, re.MULTILINE)
    if len(sections) != 1:
        raise ValueError(f"nvdisasm: looked for one .text section, found {sections}")
    matches: list[re.Match[str]] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(matches)
        elif instruction := _INSTRUCTION.match(line):
            matches.append(instruction)
    if not any(m["opcode"] == "EXIT" for m in matches):
        raise ValueError("nvdisasm: looked for instructions that end in EXIT, found none")
    return [_instruction(m, labels) for m in matches]


def _instruction(match: re.Match[str], labels: Mapping[str, int]) -> Instruction:
    opcode, operands = match["opcode"], match["operands"].strip()
    kind = base(opcode)
    if kind in ("BRX", "JMX"):
        raise ValueError(f"nvdisasm: an indirect branch, {opcode} {operands}: no loops to be found")
    target = None
    conditional = match["guard"] is not None
    if kind in ("BRA", "JMP"):
        label = _BRANCH_TARGET.search(operands)
        if label is None or label[1] not in labels:
            raise ValueError(f"nvdisasm: looked for a label in {opcode} {operands}")
        target = labels[label[1]]
        conditional |= label.start() > 0  # BRA.U UP0, `(.L_x_1)
    ends = kind in ("BRA", "JMP", "EXIT", "RET")
    return Instruction(opcode, operands, target, falls_through=conditional or not ends)


def parse_usage(usage: str) -> Resources:
    """Return what `cuobjdump -res-usage` says; its LOCAL is 0 even where registers spill."""
    functions = re.findall(r"REG:(\d+)\s+STACK:(\d+)", usage)
    if len(functions) != 1:
        raise ValueError(f"cuobjdump: looked for REG and STACK of one kernel in {usage!r}")
    registers, stack_bytes = map(int, functions[0])
    return Resources(registers, stack_bytes)


def occupancy(
    target: str, *, registers: int, shared_bytes: int, num_warps: int
) -> tuple[float, str]:
    """Return the share of a multiprocessor's warps that are resident, and what limits it.

    Args:
        target: "sm_90" and its like.
        registers: of a thread.
        shared_bytes: of a block, without what the system reserves.
        num_warps: of a block.
    Raises:
        ValueError: a target without known limits, or a block that does not fit on one.
    """
    limits = _known(LIMITS, target)
    warp_registers = -(-registers * 32 // REGISTERS_UNIT) * REGISTERS_UNIT
    warps_by_registers = limits.registers // warp_registers // WARPS_UNIT * WARPS_UNIT
    blocks = {  # of equals the first is named
        "warps": limits.warps // num_warps,
        "blocks": limits.blocks,
        "registers": warps_by_registers // num_warps,
        "shared memory": limits.shared_bytes // (shared_bytes + RESERVED_SHARED_BYTES),
    }
    limit = min(blocks, key=lambda resource: blocks[resource])
    if blocks[limit] == 0:
        raise ValueError(f"{target} holds no block of {num_warps} warps: too many for its {limit}")
    return blocks[limit] * num_warps / limits.warps, limit


def base(opcode: str) -> str:
    """LDG of LDG.E.128."""
    return opcode.split(".")[0]


def global_access(opcode: str) -> tuple[str, int] | None:
    """Return ("load" or "store", bits a thread) of an access to global memory, else None."""
    kind = {"LDG": "load", "LDGSTS": "load", "STG": "store"}.get(base(opcode))
    return None if kind is None else (kind, _access_bits(opcode))


def reads_memory(instruction: Instruction) -> bool:
    """Whether it reads global memory: by LDG, an asynchronous copy or the tensor memory unit."""
    return base(instruction.opcode) in ("LDG", "LDGSTS", "UBLKCP", "UTMALDG")


def is_spill(opcode: str) -> bool:
    """Whether it loads or stores local memory."""
    return base(opcode) in ("LDL", "STL")


def is_exp2(opcode: str) -> bool:
    return opcode.startswith("MUFU.EX2")


def is_barrier(opcode: str) -> bool:
    return base(opcode) == "BAR"


def is_nop(opcode: str) -> bool:
    return base(opcode) == "NOP"


def _access_bits(opcode: str) -> int:
    bits = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    return next((bits[part] for part in opcode.split(".") if part in bits), 32)


def pipe_cycles(opcode: str, target: str) -> dict[str, float]:
    """Return the cycles of one sub-partition's pipes that a warp instruction takes.

    A rate of r lanes a clock and multiprocessor is r / 4 in a sub-partition: 32 / (r / 4) = 128 / r
    cycles. Pipes: "fma" float32 arithmetic; "fmaheavy" the half of it that multiplies integers and
    halves; "alu" integers, logic, comparisons, minima, packing; "mufu" exp2 and its kin; "xu"
    conversions and warp reductions; "lsu" memory, shared memory and shuffles. What takes an issue
    slot and no more gives {}, and an opcode unknown here counts as "alu".

    Raises:
        ValueError: a tensor instruction, of which no rate is known here.
    """
    fp32 = 128 / _known(FP32_LANES, target)
    kind = base(opcode)
    if kind.endswith("MMA") and kind != "FFMA":
        raise ValueError(f"no rate is known here for the tensor instruction {opcode}")
    if kind in ISSUE_SLOT_ONLY or kind.startswith("U"):  # U: the uniform datapath, a lane a warp
        return {}
    if kind in FMA_PIPE:
        return {"fma": fp32}
    if kind in PACKED_FMA_PIPE:
        return {"fma": 2 * fp32}
    if kind in HEAVY_FMA_PIPE:  # 64 lanes
        return {"fma": fp32, "fmaheavy": 2.0}
    if kind == "MUFU":  # 16 lanes
        return {"mufu": 8.0}
    if kind in CONVERTS:  # 16 lanes: the least of the guide's rows, and of its targets
        return {"xu": 8.0}
    if kind in SHUFFLES:  # 32 lanes
        return {"lsu": 4.0}
    if kind in MOVES_DATA:  # 128 bytes a clock and multiprocessor: 32 lanes of 32 bits
        return {"lsu": 4.0 * max(1.0, _access_bits(opcode) / 32)}
    return {"alu": 2.0}  # 64 lanes


def _known(table: Mapping[str, Known], target: str) -> Known:
    if target not in table:
        raise ValueError(f"figures are known for {sorted(table)}, got {target}")
    return table[target]


def _run(tool: str, *arguments: str) -> str:
    """Run a tool that Triton brings with it."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    done = subprocess.run([path, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(f"{tool} failed with {done.returncode}: {done.stderr.strip()}")
    return done.stdout
