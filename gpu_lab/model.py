"""Modelled time of a kernel from bytes, issue slots and pipe cycles; never a measurement.

Each resource alone gives a lower bound; the model says that the largest is the time. Launches,
latency that too few warps fail to hide, and the tail of the last blocks are left out.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Device(NamedTuple):
    name: str
    target: str  # as `codegen.Codegen` names it
    bytes_per_s: float  # of memory, as published
    streaming_efficiency: float  # share of it that a kernel that only streams reaches
    multiprocessors: int  # AMD: compute units
    sub_partitions: int  # of a multiprocessor; AMD: SIMDs
    clock_hz: float  # boost
    warp_size: int
    issue_cycles: float  # of a sub-partition, for one instruction of one warp


# H100 SXM5: NVIDIA's H100 architecture white paper and data sheet: 132 SMs, 3.35 TB/s, and
# 66.9 TFLOP/s of float32, which is 132 * 128 * 2 a clock at 1.98 GHz. 0.90 of the memory's speed is
# what QuACK's softmax and cross-entropy reach there (3.0 TB/s, its authors' figure).
H100 = Device("H100 SXM", "sm_90", 3.35e12, 0.90, 132, 4, 1.98e9, 32, 1.0)
# H200: the same processor with 4.8 TB/s (data sheet); the efficiency is assumed.
H200 = Device("H200", "sm_90", 4.8e12, 0.90, 132, 4, 1.98e9, 32, 1.0)
# B200: 8 TB/s (data sheet); 148 SMs, 1.9 GHz and the efficiency are assumed.
B200 = Device("B200", "sm_100", 8.0e12, 0.90, 148, 4, 1.9e9, 32, 1.0)
# MI300X: data sheet: 304 compute units, 2.1 GHz, 5.3 TB/s; the efficiency is assumed. In each cycle
# a compute unit turns to one of its four SIMDs and issues up to five instructions of its waves,
# each of another kind: 4 cycles of a SIMD over 5. A vector instruction then holds its SIMD for
# 4 cycles, a transcendental one for 16 (see `amdgcn.pipe_cycles`), so issue hardly ever binds.
MI300X = Device("MI300X", "gfx942", 5.3e12, 0.90, 304, 4, 2.1e9, 64, 4 / 5)

DEVICES = (H100, H200, B200, MI300X)

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
    seconds = {"memory": num_bytes / (device.bytes_per_s * device.streaming_efficiency)}
    seconds |= {name: num_logits / 32 * each / cycles_per_s for name, each in cycles.items()}
    binding = max(seconds, key=lambda name: seconds[name])
    return Modelled(seconds[binding], binding, seconds)


# https://github.com/huggingface/trl/issues/7244: the fused log-probability and entropy forward that
# became TRL 1.16's, bfloat16, 8192 tokens of 151936 logits, on one H100; measured by its authors.
PUBLISHED_TRL_MS = 0.89
TRL_TOKENS, TRL_VOCAB_SIZE = 8192, 151936
# Its kernels/logprob_entropy.py for sm_90, tiles of 1024 and 4 warps, read by `codegen` (Triton
# 3.7.1): static counts of the loop. lsu: the sums of a tile, 8 logits a thread, by shuffles.
TRL_INSTRUCTIONS_PER_LOGIT = 24.0
TRL_PIPE_CYCLES = {"fma": 9.4, "fmaheavy": 2.0, "alu": 14.0, "mufu": 9.0, "lsu": 18.5}


def check() -> tuple[float, float]:
    """Return the time of TRL 1.16's forward on an H100, in ms: (modelled, published).

    Issue slots bind, 8 % above memory and 30 % above loads and shuffles. So this tries the clock
    and the issue rate; it says less of the pipes and of memory, and it is one kernel.
    """
    num_logits = TRL_TOKENS * TRL_VOCAB_SIZE
    modelled = modelled_time(
        H100,
        num_bytes=2 * num_logits,
        num_logits=num_logits,
        instructions_per_logit=TRL_INSTRUCTIONS_PER_LOGIT,
        pipe_cycles_per_32_logits=TRL_PIPE_CYCLES,
    )
    return modelled.seconds * 1e3, PUBLISHED_TRL_MS
