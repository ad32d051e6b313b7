"""The whole time of a call on a GPU, modelled: streaming kernels, short ones, PyTorch's operators.

Each launch is recognised by its record. One that was given logits streams: its loop's machine code
and the bytes that it must move give its time. Any other runs in the emulator at the case's real
size, which gives its blocks, float64 and the longest chain of dependent instructions. PyTorch's
operators are a launch each and the bytes of their tensors.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from benchmarks.common.batches import mask_of
from benchmarks.common.peers import Peer
from benchmarks.common.report import BACKWARD, BOTH, FORWARD, Figures, figures
from benchmarks.kernel.cases import Inputs, WholeCall
from benchmarks.kernel.counts import Work, call, is_streaming, short_kernels
from benchmarks.kernel.figures import Loops
from benchmarks.kernel.tables import OPERATORS, SHORT, STREAMING, WHOLE
from gpu_lab.devices import Device
from gpu_lab.driver import Launch
from gpu_lab.estimate import Streaming, short_seconds
from gpu_lab.model import DRAM_CYCLES, LAUNCH_SECONDS

SMALL = 16  # tokens of a sequence, where only operators are counted


class Recorded(NamedTuple):
    """What a pass launches, at a shape's real size."""

    streaming: list[Launch]
    short: list[Launch]
    operator_bytes: list[float]


def record(peer: Peer, one: WholeCall, dtype: torch.dtype, target: str) -> dict[str, Recorded]:
    """Return what each pass of a peer launches.

    Logits are one row seen many times. The forward pass is at the real size; the operators of a
    backward pass, and its launches, are those of SMALL tokens, each with as many more bytes.
    """
    forward = _run(peer, one, dtype, target, trains=False)
    small = one._replace(shape=one.shape._replace(seq_len=SMALL))
    step = _run(peer, small, dtype, target, trains=True)
    scale = one.shape.seq_len / SMALL
    backward = Recorded(
        step.streaming[len(forward.streaming) :],
        step.short[len(forward.short) :],
        [scale * num_bytes for num_bytes in step.operator_bytes[len(forward.operator_bytes) :]],
    )
    return {FORWARD: forward, BACKWARD: backward}


def _run(peer: Peer, one: WholeCall, dtype: torch.dtype, target: str, *, trains: bool) -> Recorded:
    shape, case = one
    row = torch.zeros(1, 1, shape.vocab_size, dtype=dtype)
    logits = row.expand(shape.batch, shape.seq_len, shape.vocab_size)
    labels = torch.zeros(logits.shape[:2], dtype=torch.int64)
    mask = mask_of(labels, case.share)
    runs, inputs = short_kernels(logits, mask), Inputs(logits, labels, mask, case)
    done = call(peer, inputs, target, runs, trains=trains, follows_chains=True)
    parts: dict[bool, list[Launch]] = {True: [], False: []}
    for launch in done.launches:
        parts[is_streaming(launch, logits)].append(launch)
    num_bytes = [
        float(sum(x.nbytes for x in (*op.inputs, *op.outputs) if 2 * x.numel < logits.numel()))
        for op in done.operators
        if op.moves
    ]
    return Recorded(parts[True], parts[False], num_bytes)


def seconds(
    device: Device, one: WholeCall, recorded: Recorded, work: Work, num_logits: int, loop: Streaming
) -> dict[str, float]:
    """Return the time of each part, and of the whole.

    Args:
        work: of the pass on `num_logits` logits of another batch, with the same share scored.
    """
    here = one.shape.num_logits
    scale = here / num_logits
    latency = LAUNCH_SECONDS + DRAM_CYCLES / device.clock_hz
    kernel = loop.time(device, scale * work.moved, here * one.case.share)
    by_torch = device.memory_seconds(scale * work.torch_moved)
    parts = {
        STREAMING: kernel.seconds + by_torch + latency * max(1, len(recorded.streaming)),
        SHORT: sum(short_seconds(device, x) for x in recorded.short if x.counts is not None),
        OPERATORS: sum(latency + device.memory_seconds(n) for n in recorded.operator_bytes),
    }
    return {**parts, WHOLE: sum(parts.values())}


def whole_figures(
    peer: Peer,
    one: WholeCall,
    inputs: Inputs,
    target: str,
    work: Mapping[str, Work],
    loops: Loops,
    devices: Sequence[Device],
) -> Figures:
    """Return the modelled microseconds of each part of a pass on each device.

    Args:
        work: by pass, counted on `inputs`, of which the same share is scored.
    """
    result = Figures()
    num_logits, place = inputs.logits.numel(), str(one)
    for passes, recorded in record(peer, one, inputs.logits.dtype, target).items():
        for device in devices:
            loop = loops.get(device.target, {}).get(passes)
            if loop is not None:
                parts = seconds(device, one, recorded, work[passes], num_logits, loop)
                us = {name: ("us", 1e6 * each) for name, each in parts.items()}
                result += figures(peer.name, passes, device.name, place, "modelled", us)
    for name in result.column("where"):
        both = sum(float(figure.value) for figure in result.select(WHOLE, where=name))
        result += figures(peer.name, BOTH, name, place, "modelled", {WHOLE: ("us", both)})
    return result
