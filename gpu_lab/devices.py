"""GPUs as the time model sees them, each figure with its source."""

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
    float64_lanes: int  # of a multiprocessor, a clock
    float64_latency: float  # cycles until a result can be used

    def memory_seconds(self, num_bytes: float) -> float:
        """Of a kernel that only streams them."""
        return num_bytes / (self.bytes_per_s * self.streaming_efficiency)


# Sources. Memory speed, multiprocessors and boost clock are those of the vendors' data sheets and
# architecture white papers, quoted from memory where no more is said. float64_lanes: CUDA C++
# Programming Guide, "Arithmetic Instructions", 64-bit floating-point results a clock and
# multiprocessor: 32 at 8.0, 64 at 9.0 and 10.0, 2 at 8.6, 8.9 and 12.0. 0.90 of the memory's speed
# is what QuACK's softmax and cross-entropy reach on an H100 (3.0 TB/s, its authors' figure); for
# the others it is assumed. float64_latency is assumed: a few times a float32's where there are
# units for it; with two lanes a warp's instruction takes 16 cycles to enter them, and as many to
# come out.
FEW_LANES_LATENCY, LATENCY = 40.0, 16.0

# H100 SXM5: white paper and data sheet: 132 SMs, 3.35 TB/s, and 66.9 TFLOP/s of float32, which is
# 132 * 128 * 2 a clock at 1.98 GHz.
H100 = Device("H100 SXM", "sm_90", 3.35e12, 0.90, 132, 4, 1.98e9, 32, 1.0, 64, LATENCY)
# H200: the same processor with 4.8 TB/s (data sheet).
H200 = Device("H200", "sm_90", 4.8e12, 0.90, 132, 4, 1.98e9, 32, 1.0, 64, LATENCY)
# B200: 8 TB/s (data sheet); 148 SMs and 1.9 GHz are assumed.
B200 = Device("B200", "sm_100", 8.0e12, 0.90, 148, 4, 1.9e9, 32, 1.0, 64, LATENCY)
# A100 SXM 80 GB: data sheet 2039 GB/s; white paper 108 SMs, 1.41 GHz.
A100 = Device("A100 SXM", "sm_80", 2.039e12, 0.90, 108, 4, 1.41e9, 32, 1.0, 32, LATENCY)
# L40S: data sheet 864 GB/s; 142 SMs, 2.52 GHz.
L40S = Device("L40S", "sm_89", 0.864e12, 0.90, 142, 4, 2.52e9, 32, 1.0, 2, FEW_LANES_LATENCY)
# GeForce: NVIDIA's GA102, Ada and RTX Blackwell white papers: 936 GB/s, 82 SMs, 1.695 GHz;
# 1008 GB/s, 128 SMs, 2.52 GHz; 1792 GB/s, 170 SMs, 2.407 GHz.
RTX_3090 = Device(
    "RTX 3090", "sm_86", 0.936e12, 0.90, 82, 4, 1.695e9, 32, 1.0, 2, FEW_LANES_LATENCY
)
RTX_4090 = Device(
    "RTX 4090", "sm_89", 1.008e12, 0.90, 128, 4, 2.52e9, 32, 1.0, 2, FEW_LANES_LATENCY
)
RTX_5090 = Device(
    "RTX 5090", "sm_120", 1.792e12, 0.90, 170, 4, 2.407e9, 32, 1.0, 2, FEW_LANES_LATENCY
)
# MI300X: data sheet: 304 compute units, 2.1 GHz, 5.3 TB/s, 81.7 TFLOP/s of float64 in vectors: 64
# fused lanes a clock. In each cycle a compute unit turns to one of its four SIMDs and issues up to
# five instructions of its waves, each of another kind: 4 cycles of a SIMD over 5. A vector
# instruction then holds its SIMD for 4 cycles, a transcendental one for 16 (see
# `amdgcn.pipe_cycles`), so issue hardly ever binds.
MI300X = Device("MI300X", "gfx942", 5.3e12, 0.90, 304, 4, 2.1e9, 64, 4 / 5, 64, LATENCY)

DEVICES = (H100, H200, B200, A100, L40S, RTX_3090, RTX_4090, RTX_5090, MI300X)
