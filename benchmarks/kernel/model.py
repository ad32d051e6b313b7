"""Rows of the kernel benchmark: counts per logit, the machine code's loop, and modelled times."""

from collections.abc import Iterator

from benchmarks.common.report import FORWARD, Figure
from benchmarks.kernel.counts import BACKWARD, PASSES, Case, Inputs, Loop, Work
from benchmarks.kernel.rows import BINDING, FLOOR, MEMORY, OF_FLOOR, PTX, SASS, TIME
from gpu_lab.devices import DEVICES, Device

ROWS = 8192  # of logits, in a modelled time


def work_rows(
    impl: str, target: str, inputs: Inputs, work: dict[str, Work], per_token: float
) -> Iterator[Figure]:
    """Per logit scored for instructions, per logit of the batch for bytes.

    Args:
        per_token: PTX instructions of a forward for each token, beside those of `work`.
    """
    case, num_logits = str(inputs.case), inputs.logits.numel()
    num_scored = inputs.num_scored * inputs.logits.shape[-1]
    per_logit = {FORWARD: per_token / inputs.logits.shape[-1], BACKWARD: 0.0}

    def row(passes: str, quantity: str, unit: str, value: float, how: str = "counted") -> Figure:
        return Figure(impl, passes, target, case, quantity, unit, value, how)

    total = 0.0
    for passes in PASSES:
        done = work[passes]
        instructions = done.instructions / num_scored + per_logit[passes]
        yield row(passes, PTX, "instructions", instructions)
        yield row(passes, "exp2 per logit", "instructions", done.exp2 / num_scored)
        yield row(passes, "launches", "launches", done.launches)
        for kind, num_bytes, wide in (
            ("load", done.loaded, done.wide_loaded),
            ("store", done.stored, done.wide_stored),
        ):
            name = {"load": "loaded", "store": "stored"}[kind]
            yield row(passes, f"{name} bytes per logit", "bytes", num_bytes / num_logits)
            # A forward stores a few bytes a token, of which a width says nothing.
            if num_bytes > 0.01 * num_logits:
                yield row(passes, f"16-byte share of {kind}s", "share", wide / num_bytes)
        by_torch = (done.torch_loaded + done.torch_stored) / num_logits
        yield row(passes, "PyTorch's bytes per logit", "bytes", by_torch, "derived")
        total += (done.loaded + done.stored) / num_logits + by_torch
    yield row("forward+backward", "total bytes per logit", "bytes", total, "counted and derived")


def loop_rows(impl: str, target: str, passes: str, case: Case, loop: Loop) -> Iterator[Figure]:
    def row(quantity: str, unit: str, value: float | str) -> Figure:
        return Figure(impl, passes, target, str(case), quantity, unit, value, "static")

    code = loop.codegen
    for way, name in SASS.items():
        yield row(name, "instructions", loop.instructions(way))
    yield row("machine exp2 per logit", "instructions", loop.exp2())
    yield row("barriers in the loop", "barriers", code.barriers_in_loop)
    yield row("registers", "registers", code.registers)
    yield row("spills", "spills", code.spills)
    yield row("warps", "warps of a block", code.num_warps)
    yield row("occupancy", "share", code.occupancy)
    yield row("occupancy is limited by", "", code.occupancy_limit)
    for kind, widths in code.access_bits.items():
        text = " ".join(f"{n}x{bits}" for bits, n in sorted(widths.items(), reverse=True))
        yield row(f"{kind} instructions by width", "count x bits", text)


def modelled_rows(
    impl: str, inputs: Inputs, work: dict[str, Work], loops: dict[tuple[str, str], Loop]
) -> Iterator[Figure]:
    """For every device whose target's loops were read.

    Args:
        loops: by target and pass.
    """
    vocab_size, itemsize = inputs.logits.shape[-1], inputs.logits.element_size()
    share = inputs.num_scored * vocab_size / inputs.logits.numel()
    num_logits = ROWS * vocab_size
    least = {FORWARD: itemsize * share, BACKWARD: itemsize * (share + 1)}
    for device in DEVICES:
        for passes in PASSES:
            loop = loops.get((device.target, passes))
            if loop is None:
                continue
            scale = num_logits / inputs.logits.numel()
            done = work[passes]
            kernel = loop.time(device, scale * (done.loaded + done.stored), num_logits * share)
            by_torch = memory_seconds(device, scale * (done.torch_loaded + done.torch_stored))
            time = kernel.seconds + by_torch
            floor = memory_seconds(device, num_logits * least[passes])
            times = {
                TIME: time,
                MEMORY: kernel.all_seconds["memory"] + by_torch,
                FLOOR: floor,
                **{
                    f"modelled time of {resource} in the kernel": seconds
                    for resource, seconds in kernel.all_seconds.items()
                },
            }
            place = (impl, passes, device.name, str(inputs.case))
            for quantity, seconds in times.items():
                yield Figure(*place, quantity, "ms", seconds * 1e3, "modelled")
            yield Figure(*place, OF_FLOOR, "", time / floor, "modelled")
            yield Figure(*place, BINDING, "", kernel.binding, "modelled")


def memory_seconds(device: Device, num_bytes: float) -> float:
    return num_bytes / (device.bytes_per_s * device.streaming_efficiency)
