"""The whole time of a call on a GPU, modelled: streaming kernels, short ones, PyTorch's operators.

Each launch is recognised by its record. One that was given logits streams: its loop's machine code
and the bytes that it must move give its time. Any other runs in the emulator at the case's real
size, which gives its blocks, float64 and the longest chain of dependent instructions. PyTorch's
operators are a launch each and the bytes of their tensors.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from benchmarks.common.operators import Operators
from benchmarks.common.report import BACKWARD as BOTH
from benchmarks.common.report import FORWARD, Figure, Figures
from benchmarks.kernel.counts import BACKWARD, Inputs, Loop, Work, is_streaming, short_kernels
from benchmarks.kernel.peers import KernelPeer
from gpu_lab.codegen import inspect_kernel
from gpu_lab.devices import Device
from gpu_lab.driver import Launch, emulate
from gpu_lab.model import DRAM_CYCLES, LAUNCH_SECONDS, launch_seconds, whole


class Shape(NamedTuple):
    name: str
    batch: int
    seq_len: int
    vocab_size: int
    share: float = 1.0  # of the tokens that are scored, the last of each sequence

    def __str__(self) -> str:
        scored = "" if self.share == 1 else f", {self.share:.0%} scored"
        return f"{self.name}: {self.batch} x {self.seq_len}, V = {self.vocab_size}{scored}"


SHAPES = (
    Shape("MiniMind's batch", 8, 1023, 6400),
    Shape("few long sequences", 2, 8192, 151936),
    Shape("one long sequence", 1, 16384, 128256),
    Shape("after a prompt", 8, 1023, 6400, 0.5),
)
SMALL = 16  # tokens of a sequence, where only operators are counted
STREAMING, SHORT = "modelled streaming kernels", "modelled short kernels"
OPERATORS = "modelled PyTorch's operators"
PARTS = (STREAMING, SHORT, OPERATORS)
WHOLE = "modelled whole time"
NOTES = f"""\
modelled: nothing here was measured. us of a call: whole = streaming + short kernels + PyTorch's
  operators, each launch {1e6 * LAUNCH_SECONDS:.1f} us. short: kernels per token, with their blocks,
  float64 and chains of dependent instructions. A card that waits for the host takes the host's time
  instead: see bench_host. A peer that is not installed is left out."""


class Recorded(NamedTuple):
    """What a pass launches, at a shape's real size."""

    streaming: list[Launch]
    short: list[Launch]
    operator_bytes: list[float]


def record(peer: KernelPeer, shape: Shape, dtype: torch.dtype, target: str) -> dict[str, Recorded]:
    """Return what each pass of a peer launches.

    Logits are one row seen many times. The forward pass is at the real size; the operators of a
    backward pass, and its launches, are those of SMALL tokens, each with as many more bytes.
    """
    forward = _run(peer, shape, dtype, target, has_backward=False)
    step = _run(peer, shape._replace(seq_len=SMALL), dtype, target, has_backward=True)
    scale = shape.seq_len / SMALL
    backward = Recorded(
        step.streaming[len(forward.streaming) :],
        step.short[len(forward.short) :],
        [scale * num_bytes for num_bytes in step.operator_bytes[len(forward.operator_bytes) :]],
    )
    return {FORWARD: forward, BACKWARD: backward}


def _run(
    peer: KernelPeer, shape: Shape, dtype: torch.dtype, target: str, *, has_backward: bool
) -> Recorded:
    row = torch.zeros(1, 1, shape.vocab_size, dtype=dtype)
    logits = row.expand(shape.batch, shape.seq_len, shape.vocab_size)
    if has_backward:
        logits = logits.clone().requires_grad_()
    labels = torch.zeros(shape.batch, shape.seq_len, dtype=torch.int64)
    mask = torch.zeros_like(labels)
    mask[:, round(shape.seq_len * (1 - shape.share)) :] = 1

    operators = Operators()
    with (
        peer.on_target(target),
        emulate(target, runs=short_kernels(logits, mask), follows_chains=True) as lab,
        torch.set_grad_enabled(has_backward),
        operators,
    ):
        value = peer.fn(logits, labels, mask, False)
        if has_backward:
            torch.autograd.grad(value.sum(), logits)
    parts: dict[bool, list[Launch]] = {True: [], False: []}
    for launch in lab.records:
        parts[is_streaming(launch, logits)].append(launch)
    num_bytes = [
        float(sum(x.nbytes for x in (*one.inputs, *one.outputs) if 2 * x.numel < logits.numel()))
        for one in operators.started
        if one.moves
    ]
    return Recorded(parts[True], parts[False], num_bytes)


def seconds(
    device: Device, shape: Shape, recorded: Recorded, work: Work, num_logits: int, loop: Loop
) -> dict[str, float]:
    """Return the time of each of PARTS.

    Args:
        work: of the pass on `num_logits` logits of another batch, with the same share scored.
    """
    of_shape = shape.batch * shape.seq_len * shape.vocab_size
    scale = of_shape / num_logits
    speed = device.bytes_per_s * device.streaming_efficiency
    latency = LAUNCH_SECONDS + DRAM_CYCLES / device.clock_hz
    kernel = loop.time(device, scale * (work.loaded + work.stored), of_shape * shape.share)
    by_torch = scale * (work.torch_loaded + work.torch_stored) / speed
    streaming = kernel.seconds + by_torch + latency * max(1, len(recorded.streaming))
    short = sum(
        whole(
            launch_seconds(
                device,
                launch.counts,
                num_blocks=launch.counts.num_blocks,
                blocks_per_multiprocessor=inspect_kernel(launch.kernel).blocks,
                num_bytes=launch.counts.distinct["load"] + launch.counts.distinct["store"],
            )
        )
        for launch in recorded.short
        if launch.counts is not None
    )
    operators = sum(latency + num_bytes / speed for num_bytes in recorded.operator_bytes)
    return {STREAMING: streaming, SHORT: short, OPERATORS: operators}


def whole_rows(
    peer: KernelPeer,
    shape: Shape,
    inputs: Inputs,
    target: str,
    work: Mapping[str, Work],
    loops: Mapping[tuple[str, str], Loop],
    devices: Sequence[Device],
) -> Figures:
    """Return the modelled microseconds of each part of a pass on each device.

    Args:
        work: by pass, counted on `inputs`, of which the same share is scored.
        loops: by target and pass.
    """
    result = Figures()
    dtype, num_logits = inputs.logits.dtype, inputs.logits.numel()
    both: dict[str, float] = {}
    for passes, recorded in record(peer, shape, dtype, target).items():
        for device in devices:
            loop = loops.get((device.target, passes))
            if loop is None:
                continue
            parts = seconds(device, shape, recorded, work[passes], num_logits, loop)
            parts[WHOLE] = sum(parts.values())
            both[device.name] = both.get(device.name, 0.0) + parts[WHOLE]
            for name, each in parts.items():
                place = (peer.name, passes, device.name, str(shape))
                result.append(Figure(*place, name, "us", 1e6 * each, "modelled"))
    for name, each in both.items():
        place = (peer.name, BOTH, name, str(shape))
        result.append(Figure(*place, WHOLE, "us", 1e6 * each, "modelled"))
    return result


def table(rows: Figures) -> str:
    """A line a shape, device and implementation: forward by part, and forward + backward."""
    forward = {
        name: ("{:.1f}", dict(quantity=quantity, passes=FORWARD))
        for name, quantity in zip(
            ("forward us", "streaming", "short", "operators"), (WHOLE, *PARTS), strict=True
        )
    }
    both = ("{:.1f}", dict(quantity=WHOLE, passes=BOTH))
    headings = {"case": "case", "GPU": "where", "implementation": "impl"}
    return rows.pivot(headings, {**forward, f"{BOTH} us": both})
