"""The head of a preference step over 1 to 64 GPUs: products, memory, bytes and time, modelled."""

import dataclasses
from typing import NamedTuple

from benchmarks.common.peers import OURS
from benchmarks.parallel.ways import GATHERED, MEGATRON
from gpu_lab.devices import H100

# NVIDIA H100 data sheet (SXM): 989 TFLOP/s of dense bfloat16; NVLink 900 GB/s, half of it each way.
# DGX H100 user guide: one ConnectX-7 of 400 Gbit/s for each of the eight GPUs of a machine.
FLOPS_PER_S, NVLINK_BYTES_PER_S, INFINIBAND_BYTES_PER_S = 989e12, 450e9, 50e9
GPUS_OF_A_MACHINE = 8
# Assumed: shares of these that are reached, and what a collective takes beside its bytes.
PRODUCT_EFFICIENCY, LINK_EFFICIENCY = 0.7, 0.8
NVLINK_LATENCY_S, INFINIBAND_LATENCY_S = 20e-6, 60e-6
TILE_V, TILE_BYTES, LEAST_TILE_BYTES, NOTE_BYTES = 4096, 256 * 2**20, 4 * 2**20, 1024


@dataclasses.dataclass(frozen=True)
class Step:
    """Policy's head, forward and backward, that trains; bfloat16."""

    num_scored: int = 16384  # 8 pairs of 2048 tokens, half of them scored
    hidden_size: int = 4096
    vocab_size: int = 128256  # both of Llama 3 8B


class Cost(NamedTuple):
    """Of one GPU."""

    flops: float
    memory_bytes: float  # at the peak, above hidden states, weight and their gradients
    traffic_bytes: float  # of its memory, beside the products' own reads of hidden and weight
    forward_bytes: float  # that leave it
    backward_bytes: float
    collectives: int

    @property
    def sent_bytes(self) -> float:
        return self.forward_bytes + self.backward_bytes


def cost(way: str, step: Step, gpus: int) -> Cost:
    """Every way on the scored tokens only, which favours the peers: they are left to score all."""
    m, h = step.num_scored, step.hidden_size
    width = -(-step.vocab_size // gpus)
    product = 2.0 * m * h * width
    others, ring = gpus - 1, 2 * (gpus - 1) / gpus
    logits, every_logit = m * width, m * step.vocab_size
    if way == OURS:
        splits = -(-width // TILE_V)
        tile = max(TILE_BYTES * width // step.vocab_size, LEAST_TILE_BYTES)
        return Cost(
            flops=4 * product,  # forward, once more in the backward pass, and two gradients
            memory_bytes=tile + 4 * m * h + (8 * splits * gpus + 4) * m,
            # Written and read in the forward pass; written, read and overwritten, read twice.
            traffic_bytes=14 * logits,
            forward_bytes=others * ((8 * splits + 4) * m + NOTE_BYTES) if others else 0,
            backward_bytes=ring * 4 * m * h + others * NOTE_BYTES,
            collectives=4 if others else 0,
        )
    if way == MEGATRON:
        return Cost(
            flops=3 * product,
            memory_bytes=6 * logits,  # bfloat16 logits or their gradient, and float32 softmax
            # Written 2; to float32 6; maximum 4; shifted 8; exp 8; sum 4; divided 8. Backward:
            # scaled 8, to bfloat16 6, read twice 4.
            traffic_bytes=58 * logits,
            forward_bytes=3 * ring * 4 * m,
            backward_bytes=ring * 2 * m * h,
            collectives=4 if others else 0,
        )
    assert way == GATHERED
    return Cost(
        flops=3 * product,
        memory_bytes=10 * every_logit,  # bfloat16, float32, and float32 log_softmax
        # Of all logits: received 2, to float32 6, log_softmax 8, its gradient 8, to bfloat16 6;
        # of one's own: written 2, read twice 4.
        traffic_bytes=30 * every_logit + 6 * logits,
        forward_bytes=others * 2 * logits,
        backward_bytes=ring * 2 * m * h,
        collectives=2 if others else 0,
    )


def seconds(cost: Cost, gpus: int) -> dict[str, float]:
    """Of products, memory and communication, one after the other."""
    is_one_machine = gpus <= GPUS_OF_A_MACHINE
    link = NVLINK_BYTES_PER_S if is_one_machine else INFINIBAND_BYTES_PER_S
    latency = NVLINK_LATENCY_S if is_one_machine else INFINIBAND_LATENCY_S
    return {
        "products": cost.flops / (FLOPS_PER_S * PRODUCT_EFFICIENCY),
        "memory": H100.memory_seconds(cost.traffic_bytes),
        "communication": cost.sent_bytes / (link * LINK_EFFICIENCY) + cost.collectives * latency,
    }
