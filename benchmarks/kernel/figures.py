"""Figures of kernels: counts per logit, the machine code's loop, and modelled times."""

from collections.abc import Mapping

from benchmarks.common.measure import least_bytes
from benchmarks.common.report import BOTH, FORWARD, Figures, figures
from benchmarks.kernel.cases import PASSES, Inputs
from benchmarks.kernel.counts import Work
from benchmarks.kernel.tables import BINDING, FLOOR, MEMORY, OF_FLOOR, PTX, SASS, TIME
from gpu_lab.devices import DEVICES
from gpu_lab.estimate import Streaming

ROWS = 8192  # of logits, in a modelled time

Loops = Mapping[str, Mapping[str, Streaming]]  # by target and pass


def of_work(
    impl: str, target: str, inputs: Inputs, work: Mapping[str, Work], per_token: float
) -> Figures:
    """Per logit scored for instructions, per logit of the batch for bytes.

    Args:
        per_token: PTX instructions of a forward for each token, beside those of `work`.
    """
    case, num_logits, vocab_size = str(inputs.case), inputs.logits.numel(), inputs.logits.shape[-1]
    num_scored = inputs.num_scored * vocab_size
    result = Figures()
    for passes in PASSES:
        done = work[passes]
        beside = per_token / vocab_size if passes == FORWARD else 0.0
        widths = {"load": (done.wide_loaded, done.loaded), "store": (done.wide_stored, done.stored)}
        counted = {
            PTX: ("instructions", done.instructions / num_scored + beside),
            "exp2 per logit": ("instructions", done.exp2 / num_scored),
            "launches": ("launches", done.launches),
            "loaded bytes per logit": ("bytes", done.loaded / num_logits),
            "stored bytes per logit": ("bytes", done.stored / num_logits),
            # A forward stores a few bytes a token, of which a width says nothing.
            **{
                f"16-byte share of {kind}s": ("share", wide / num_bytes)
                for kind, (wide, num_bytes) in widths.items()
                if num_bytes > 0.01 * num_logits
            },
        }
        derived = {"PyTorch's bytes per logit": ("bytes", done.torch_moved / num_logits)}
        result += figures(impl, passes, target, case, "counted", counted)
        result += figures(impl, passes, target, case, "derived", derived)
    moved = sum(done.moved + done.torch_moved for done in work.values()) / num_logits
    total = {"total bytes per logit": ("bytes", moved)}
    result += figures(impl, BOTH, target, case, "counted and derived", total)
    return result


def of_loop(impl: str, target: str, passes: str, case: str, loop: Streaming) -> Figures:
    code = loop.codegen
    widths = {
        f"{kind} instructions by width": " ".join(
            f"{n}x{bits}" for bits, n in sorted(counts.items(), reverse=True)
        )
        for kind, counts in code.access_bits.items()
    }
    static: dict[str, tuple[str, float | str]] = {
        **{name: ("instructions", loop.instructions(way)) for way, name in SASS.items()},
        "machine exp2 per logit": ("instructions", loop.exp2()),
        "barriers in the loop": ("barriers", code.barriers_in_loop),
        "registers": ("registers", code.registers),
        "spills": ("spills", code.spills),
        "warps": ("warps of a block", code.num_warps),
        "occupancy": ("share", code.occupancy),
        "occupancy is limited by": ("", code.occupancy_limit),
        **{quantity: ("count x bits", text) for quantity, text in widths.items()},
    }
    return figures(impl, passes, target, case, "static", static)


def modelled(impl: str, inputs: Inputs, work: Mapping[str, Work], loops: Loops) -> Figures:
    """For every device whose target's loops were read."""
    logits, case = inputs.logits, str(inputs.case)
    share = inputs.num_scored * logits.shape[-1] / logits.numel()
    num_logits = ROWS * logits.shape[-1]
    scale = num_logits / logits.numel()
    least = least_bytes(num_logits, share * num_logits, logits.element_size())
    result = Figures()
    for device in DEVICES:
        for passes, loop in loops.get(device.target, {}).items():
            done = work[passes]
            kernel = loop.time(device, scale * done.moved, num_logits * share)
            by_torch = device.memory_seconds(scale * done.torch_moved)
            time, floor = kernel.seconds + by_torch, device.memory_seconds(least[passes])
            seconds = {
                TIME: time,
                MEMORY: kernel.all_seconds["memory"] + by_torch,
                FLOOR: floor,
                **{f"{TIME} of {name} in the kernel": s for name, s in kernel.all_seconds.items()},
            }
            values: dict[str, tuple[str, float | str]] = {
                **{quantity: ("ms", 1e3 * each) for quantity, each in seconds.items()},
                OF_FLOOR: ("", time / floor),
                BINDING: ("", kernel.binding),
            }
            result += figures(impl, passes, device.name, case, "modelled", values)
    return result
