"""Published times of small Triton kernels, beside what the time model gives.

A row normalisation stands for those of others: read a row, reduce it, write it. It is compiled here
and counted in the emulator. Published times are medians between two events (triton.testing.do_bench
and its like): they hold 3 us and more that are not the kernel's, which is most of a small one.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .devices import FEW_LANES_LATENCY, H100, LATENCY, Device
from .driver import emulate
from .estimate import short_seconds
from .model import DRAM_CYCLES, LAUNCH_SECONDS, modelled_time

# H20: data sheet: 4.0 TB/s; 78 SMs, from memory. A10G: data sheet 600 GB/s; 80 SMs, 1.71 GHz.
H20 = Device("H20", "sm_90", 4.0e12, 0.90, 78, 4, 1.98e9, 32, 1.0, 1, LATENCY)
A10G = Device("A10G", "sm_86", 0.6e12, 0.90, 80, 4, 1.71e9, 32, 1.0, 2, FEW_LANES_LATENCY)

# TRL 1.16's kernels/logprob_entropy.py for sm_90, tiles of 1024 and 4 warps, read by `codegen`
# (Triton 3.7.1): static counts of the loop. lsu: sums of a tile, 8 logits a thread, by shuffles.
TRL_INSTRUCTIONS_PER_LOGIT = 24.0
TRL_PIPE_CYCLES = {"fma": 9.4, "fmaheavy": 2.0, "alu": 14.0, "mufu": 9.0, "lsu": 18.5}

ADD_RMS_NORM = "https://github.com/flagos-ai/FlagGems/pull/3515"
RMS_NORM = "https://github.com/flagos-ai/FlagGems/pull/5152"
FUSION = "https://resume-site-4js.pages.dev/experiments/kernel-normalization-fusion"


class Published(NamedTuple):
    what: str
    device: Device
    rows: int
    columns: int
    tensors: int  # of that shape that are read or written, 16 bits an element
    us: float
    source: str


TIMES = (
    Published("add + RMS norm", H20, 64, 64, 3, 6.0, ADD_RMS_NORM),
    Published("add + RMS norm", H20, 256, 256, 3, 6.0, ADD_RMS_NORM),
    Published("add + RMS norm", H20, 1024, 1024, 3, 8.0, ADD_RMS_NORM),
    Published("add + RMS norm", H20, 4096, 4096, 3, 32.0, ADD_RMS_NORM),
    Published("RMS norm", H20, 256, 256, 2, 9.2, RMS_NORM),
    Published("RMS norm", H20, 1024, 1024, 2, 8.9, RMS_NORM),
    Published("RMS norm", H20, 4096, 4096, 2, 25.4, RMS_NORM),
    Published("RMS norm", A10G, 512, 1024, 2, 50.2, FUSION),
    Published("RMS norm", A10G, 2048, 4096, 2, 102.4, FUSION),
    Published("RMS norm", A10G, 4096, 8192, 2, 310.3, FUSION),
)


class Check(NamedTuple):
    what: str
    device: str
    modelled_us: float
    published_us: float
    source: str

    def cells(self) -> list[str]:
        """Its line below HEADINGS."""
        times = (self.modelled_us, self.published_us)
        ratio = f"{self.modelled_us / self.published_us:.2f}"
        return [self.what, self.device, self.source, *(f"{us:.1f}" for us in times), ratio]


HEADINGS = ["kernel", "GPU", "source", "modelled us", "published us", "modelled / published"]


def checks() -> list[Check]:
    """All of them, TRL's forward first."""
    return [trl_forward(), *map(_check, TIMES)]


def trl_forward() -> Check:
    """The fused log-probability and entropy forward that became TRL 1.16's, bfloat16, 8192 tokens
    of 151936 logits, on one H100; measured by its authors.

    Issue slots bind, 8 % above memory and 30 % above loads and shuffles. So this tries the clock
    and the issue rate; it says less of the pipes and of memory.
    """
    num_logits = 8192 * 151936
    modelled = modelled_time(
        H100,
        num_bytes=2 * num_logits,
        num_logits=num_logits,
        instructions_per_logit=TRL_INSTRUCTIONS_PER_LOGIT,
        pipe_cycles_per_32_logits=TRL_PIPE_CYCLES,
    )
    seconds = modelled.seconds + LAUNCH_SECONDS + DRAM_CYCLES / H100.clock_hz
    source = "https://github.com/huggingface/trl/issues/7244"
    return Check("TRL's forward, 8192 x 151936", H100.name, seconds * 1e6, 890.0, source)


@triton.jit
def rms_norm_kernel(x_ptr, y_ptr, num_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * num_columns
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row + i, mask=i < num_columns, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / num_columns + 1e-6)
    tl.store(y_ptr + row + i, x * scale, mask=i < num_columns)


def _check(one: Published) -> Check:
    x = torch.ones(1, one.columns, dtype=torch.bfloat16)
    with emulate(one.device.target, follows_chains=True) as lab:
        rms_norm_kernel[(1,)](
            x, torch.empty_like(x), one.columns, BLOCK=triton.next_power_of_2(one.columns)
        )
    num_bytes = 2.0 * one.rows * one.columns * one.tensors
    seconds = short_seconds(one.device, lab.records[0], one.rows, num_bytes)
    what = f"{one.what}, {one.rows} x {one.columns}"
    return Check(what, one.device.name, seconds * 1e6, one.us, one.source)
