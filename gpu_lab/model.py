"""Modelled time of a kernel from what it moves and executes; never a measurement.

`modelled_time` is of a kernel that streams: each resource alone gives a lower bound, the largest is
the time. `launch_seconds` is of any launch: it adds what a short one is made of, which is the
launch itself, blocks that do not fill the card, float64, and chains of dependent instructions.
"""

from collections.abc import Mapping
from typing import NamedTuple

from .clock import LATENCY
from .devices import Device
from .machine import WARP, Counts

# Seconds from the end of one kernel of a stream to the first instruction of the next, and at its
# end until all stores are seen: assumed, as timelines of eager PyTorch show.
LAUNCH_SECONDS = 2.0e-6
# Cycles of a load that no cache has, at an SM: 466 (A100), 541 (RTX 4090), 479 (H100): Luo et al.
# 2024, arXiv:2402.13499, from memory.
DRAM_CYCLES = 500.0

# What a pipe of `Codegen.pipe_cycles` is called in a modelled time.
RESOURCES = {
    "fma": "fp32",
    "fmaheavy": "integer multiply",
    "alu": "integer",
    "mufu": "special functions",
    "xu": "conversions",
    "lsu": "load/store",
    "valu": "vector ALU",
    "salu": "scalar ALU",
    "lds": "shared memory",
}


class Modelled(NamedTuple):
    seconds: float
    binding: str  # the resource that takes longest
    all_seconds: dict[str, float]  # the lower bound of each: "memory", "issue slots", RESOURCES


def modelled_time(
    device: Device,
    *,
    num_bytes: float,
    num_logits: float,
    instructions_per_logit: float,
    pipe_cycles_per_32_logits: Mapping[str, float],
) -> Modelled:
    """Model the time of a kernel that streams logits.

    Args:
        num_bytes: that cross the memory bus, in both directions.
        num_logits: that the kernel consumes.
        instructions_per_logit: of a thread (`Codegen.instructions_per_logit`).
        pipe_cycles_per_32_logits: of one sub-partition, by pipe (`Codegen.pipe_cycles`); both are
            of machine code for `device.target`.
    Raises:
        ValueError: a negative figure, or a pipe without a name in RESOURCES.
    """
    figures = (num_bytes, num_logits, instructions_per_logit, *pipe_cycles_per_32_logits.values())
    if min(figures) < 0:
        raise ValueError(f"bytes, logits, instructions and cycles must not be negative: {figures}")
    unknown = sorted(set(pipe_cycles_per_32_logits) - set(RESOURCES))
    if unknown:
        raise ValueError(f"pipes must be of {sorted(RESOURCES)}, got {unknown}")
    issue_cycles = instructions_per_logit * 32 / device.warp_size * device.issue_cycles
    cycles = {"issue slots": issue_cycles} | {
        RESOURCES[pipe]: each for pipe, each in pipe_cycles_per_32_logits.items()
    }
    cycles_per_s = device.multiprocessors * device.sub_partitions * device.clock_hz
    seconds = {"memory": device.memory_seconds(num_bytes)}
    seconds |= {name: num_logits / 32 * each / cycles_per_s for name, each in cycles.items()}
    binding = max(seconds, key=lambda name: seconds[name])
    return Modelled(seconds[binding], binding, seconds)


def is_float64(opcode: str) -> bool:
    """Whether a PTX instruction takes a float64 unit: not those that only move or change bits."""
    name, *types = opcode.split(".")
    return "f64" in types and name not in ("mov", "selp", "neg", "abs")


def launch_seconds(
    device: Device,
    counts: Counts,
    *,
    num_blocks: int,
    blocks_per_multiprocessor: int,
    num_bytes: float,
) -> dict[str, float]:
    """Return what each part of a launch's time would take alone; `whole` says how they add up.

    Args:
        counts: of an emulated launch of blocks like these, with its longest chain.
        num_blocks: of the launch, which may have more than those counted.
        blocks_per_multiprocessor: that are resident together.
        num_bytes: that cross the memory bus.
    """
    busiest = -(-num_blocks // device.multiprocessors)  # blocks of the busiest multiprocessor
    executed = counts.instructions
    float64 = sum(n for opcode, n in executed.items() if is_float64(opcode))
    issued = sum(n for opcode, n in executed.items() if not opcode.startswith(("mov", "cvta")))
    per_block = busiest / counts.num_blocks / device.clock_hz
    waves = -(-num_blocks // (device.multiprocessors * blocks_per_multiprocessor))
    latency = LATENCY | {"float64": device.float64_latency}
    chain = sum(latency[name] * n for name, n in counts.longest_chain.items()) + DRAM_CYCLES
    return {
        "launch": LAUNCH_SECONDS,
        "memory": device.memory_seconds(num_bytes),
        "issue slots": per_block * issued * device.issue_cycles / device.sub_partitions,
        "float64": per_block * float64 * WARP / device.float64_lanes,
        "dependent instructions": waves * chain / device.clock_hz,
    }


def whole(parts: Mapping[str, float]) -> float:
    """The launch, and then what takes longest."""
    return parts["launch"] + max(s for name, s in parts.items() if name != "launch")
