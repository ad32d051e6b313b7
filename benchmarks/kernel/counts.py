"""What each implementation's kernels execute and move: counted on a CPU, and read in machine code.

A forward is one without gradients; the backward is a training step less such a forward, since some
implementations compute the gradient in the forward.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.common.operators import Operator, Operators
from benchmarks.common.report import FORWARD
from benchmarks.kernel.peers import KernelPeer, sliced
from gpu_lab.codegen import Codegen, inspect_kernel
from gpu_lab.devices import Device
from gpu_lab.driver import Kernel, Launch, emulate
from gpu_lab.machine import WARP, Counts
from gpu_lab.model import Modelled, modelled_time

BACKWARD = "backward"  # alone
PASSES = (FORWARD, BACKWARD)
TOKENS = 512


class Case(NamedTuple):
    share: float  # of the rows scored: the last ones of each sequence, as after a prompt
    shift: bool  # score the next token: peers slice the logits

    def __str__(self) -> str:
        return f"{'all' if self.share == 1 else f'{self.share:.0%}'}{', shift' * self.shift}"


ALL, ALL_SHIFT, HALF, HALF_SHIFT = (Case(s, h) for s in (1.0, 0.5) for h in (False, True))
CASES = (ALL, HALF, ALL_SHIFT, HALF_SHIFT)


class Inputs(NamedTuple):
    logits: Tensor  # (B, T, V)
    labels: Tensor  # (B, T) int64
    mask: Tensor | None  # (B, T) int64 of 0 and 1; None: all are scored
    case: Case

    @property
    def num_scored(self) -> int:
        """Rows of logits."""
        _, labels, mask = sliced(*self[:3], self.case.shift)
        return labels.numel() if mask is None else int(mask.sum())


def make_inputs(logits: Tensor, labels: Tensor, case: Case) -> Inputs:
    """Return a copy of the logits with a mask that scores the last `case.share` of the tokens."""
    mask = None
    if case.share < 1:
        mask = torch.zeros_like(labels)
        mask[:, round(labels.shape[1] * (1 - case.share)) :] = 1
    return Inputs(logits.clone(), labels, mask, case)


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one pass; sums over its launches."""

    launches: int = 0  # of Triton kernels
    instructions: int = 0  # PTX instructions, of threads; without kernels that work per token
    exp2: int = 0  # likewise
    loaded: int = 0  # bytes of global memory; what threads read together counts once
    stored: int = 0
    wide_loaded: int = 0  # of those, in accesses of 16 bytes a thread
    wide_stored: int = 0
    torch_loaded: int = 0  # bytes, derived: of PyTorch's own operators on logits and gradients
    torch_stored: int = 0

    def __sub__(self, other: "Work") -> "Work":
        mine, others = dataclasses.asdict(self), dataclasses.asdict(other)
        return Work(**{name: mine[name] - others[name] for name in mine})


class Counted(NamedTuple):
    work: dict[str, Work]  # by pass
    values: Tensor  # (B,)
    grad: Tensor  # (B, T, V)
    streaming: dict[str, list[Kernel]]  # that were given logits; BACKWARD: not in the forward too


def torch_traffic(operators: Iterable[Operator], least: int) -> tuple[int, int]:
    """Derive the bytes that PyTorch's operators load and store: each reads its inputs and writes
    its outputs once. Tensors of fewer elements than `least` do not count."""
    loaded = stored = 0
    for operator in operators:
        outputs = [x.nbytes for x in operator.outputs if x.numel >= least]
        if not (operator.moves and outputs):
            continue
        name = operator.name
        inputs = [x.nbytes for x in operator.inputs if x.numel >= least]
        if name.startswith("new_") or name.endswith("_like"):
            inputs = []
        elif operator.is_mutable and name.rstrip("_") in ("copy", "fill", "zero"):
            inputs = inputs[1:]
        loaded += sum(inputs)
        stored += sum(outputs)
        if name == "slice_backward":  # zeros for the whole tensor, then a copy into the slice
            stored += sum(inputs)
    return loaded, stored


def count(peer: KernelPeer, inputs: Inputs, target: str, runs: bool = True) -> Counted:
    """Run a forward and a training step, emulated; or only compile them, as always for AMD."""
    logits, labels, mask, case = inputs
    of_forward, of_step = Operators(), Operators()
    with peer.on_target(target), emulate(target, runs=lambda launch: runs) as lab:
        copy = logits.clone()  # Liger writes zeros into rows that are not scored
        with torch.no_grad(), of_forward:
            values = peer.fn(copy, labels, mask, case.shift)
        split = len(lab.records)
        leaf = logits.clone().requires_grad_()
        with of_step:
            (grad,) = torch.autograd.grad(peer.fn(leaf, labels, mask, case.shift).sum(), leaf)
    forward, step = lab.records[:split], lab.records[split:]
    known = streaming_kernels(forward, logits)
    kernels = {
        FORWARD: known,
        BACKWARD: [k for k in streaming_kernels(step, logits) if all(k is not x for x in known)],
    }
    forward_work = _work(forward, of_forward, logits)
    work = {FORWARD: forward_work, BACKWARD: _work(step, of_step, logits) - forward_work}
    return Counted(work, values, grad, kernels)


def is_streaming(launch: Launch, logits: Tensor) -> bool:
    """Whether a kernel was given logits or their gradient, or a slice of them."""
    return 2 * launch.largest >= logits.numel()


def streaming_kernels(launches: list[Launch], logits: Tensor) -> list[Kernel]:
    return [launch.kernel for launch in launches if is_streaming(launch, logits)]


def _work(launches: list[Launch], operators: Operators, logits: Tensor) -> Work:
    torch_loaded, torch_stored = torch_traffic(operators.started, logits.shape[-1])
    counts = [launch.counts for launch in launches if launch.counts is not None]
    streaming = [x.counts for x in launches if x.counts and is_streaming(x, logits)]
    return Work(
        launches=len(launches),
        instructions=WARP * sum(c.instructions.total() for c in streaming),
        exp2=WARP * sum(executed(c, "ex2") for c in streaming),
        loaded=sum(c.distinct["load"] for c in counts),
        stored=sum(c.distinct["store"] for c in counts),
        wide_loaded=16 * sum(c.lanes["load", 16] for c in counts),
        wide_stored=16 * sum(c.lanes["store", 16] for c in counts),
        torch_loaded=torch_loaded,
        torch_stored=torch_stored,
    )


def executed(counts: Counts, kind: str) -> int:
    """Warps that executed an opcode such as ex2, whatever its suffixes."""
    return sum(n for opcode, n in counts.instructions.items() if opcode.split(".")[0] == kind)


def short_kernels(logits: Tensor, mask: Tensor) -> Callable[[Launch], bool]:
    """What `emulate` runs where kernels that stream do not run: in their place each says that what
    the mask (B, T) says is scored, and that its sums are 1."""

    def runs(launch: Launch) -> bool:
        if not is_streaming(launch, logits):
            return True
        for x in launch.arguments.values():
            is_output = isinstance(x, Tensor) and x.is_floating_point() and x.is_contiguous()
            if is_output and 2 * x.numel() < logits.numel():
                x.copy_(mask.view_as(x)) if x.numel() == mask.numel() else x.fill_(1.0)
        return False

    return runs


def per_token_instructions(peer: KernelPeer, target: str, vocab_size: int) -> float:
    """PTX instructions a token of the kernels that work per token, on a sequence of TOKENS tokens.

    They take many tokens at a time: the few of the other counts would leave most lanes idle.
    """
    logits = torch.zeros(1, 1, vocab_size, dtype=torch.bfloat16).expand(1, TOKENS, vocab_size)
    labels = torch.zeros(1, TOKENS, dtype=torch.int64)
    runs = short_kernels(logits, torch.ones_like(labels))
    with emulate(target, runs=runs) as lab, torch.no_grad(), peer.on_target(target):
        peer.fn(logits, labels, None, False)
    return WARP * sum(c.instructions.total() for c in lab.launches) / TOKENS


class Loop(NamedTuple):
    """The streaming kernel of a pass, read in its machine code; counts are static."""

    kernel: str
    codegen: Codegen
    logits_per_iteration: int

    def instructions(self, way: str) -> float:
        """For each logit: of the whole loop, of what every iteration passes ("hot"), or of the
        "shortest" way round."""
        code = self.codegen.of_shortest_way() if way == "shortest" else self.codegen
        return code.instructions_per_logit(self.logits_per_iteration, hot=way == "hot")

    def time(self, device: Device, num_bytes: float, num_logits: float) -> Modelled:
        """On a GPU, of so many scored logits and bytes moved."""
        return modelled_time(
            device,
            num_bytes=num_bytes,
            num_logits=num_logits,
            instructions_per_logit=self.instructions("shortest"),
            pipe_cycles_per_32_logits=self.codegen.of_shortest_way().pipe_cycles(
                self.logits_per_iteration
            ),
        )

    def exp2(self) -> float:
        return self.codegen.of_shortest_way().exp2_per_logit(self.logits_per_iteration)


def read_loop(kernels: list[Kernel], dtype: torch.dtype) -> Loop | None:
    """Return the loop of the first kernel that streams logits, None where there is none."""
    if not kernels:
        return None
    codegen = inspect_kernel(kernels[0])
    tile = next(n for name, n in kernels[0].constants.items() if name.startswith("BLOCK"))
    unrolled = 1
    if codegen.has_loop:
        unrolled = max(1, round(codegen.loop_load_bytes / dtype.itemsize / tile))
    return Loop(kernels[0].name, codegen, tile * unrolled)


def complaint(peer: KernelPeer, inputs: Inputs, counted: Counted) -> str | None:
    """Compare values and gradient with plain PyTorch in float64: what is wrong, or None.

    A token's log-probability may be off by 4 roundings of the dtype that the implementation returns
    it in, and 1e-5 for its sums; a gradient by 2 roundings of its own and 1e-5 of it.
    """
    exact = inputs.logits.double().requires_grad_()
    logits, labels, mask = sliced(exact, *inputs[1:3], inputs.case.shift)
    scored = torch.ones_like(labels) if mask is None else mask
    logps = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0] * scored
    (exact_grad,) = torch.autograd.grad(logps.sum(), exact)
    eps = torch.finfo(peer.result_dtype).eps
    allowed = (4 * eps * logps.detach().abs() + 1e-5 * scored).sum(1)
    if not ((counted.values - logps.sum(1)).abs() <= allowed).all():
        return f"values off by {(counted.values - logps.sum(1)).abs().max():.3g}"
    info = torch.finfo(inputs.logits.dtype)
    allowed = (2 * info.eps + 1e-5) * exact_grad.abs() + 2 * info.tiny * info.eps + 1e-9
    if not ((counted.grad - exact_grad).abs() <= allowed).all():
        return f"gradient off by {(counted.grad - exact_grad).abs().max():.3g}"
    return None
