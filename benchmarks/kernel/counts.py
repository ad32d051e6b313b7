"""What each implementation's kernels execute and move: counted on a CPU, and read in machine code.

A forward is one without gradients; the backward is a training step less such a forward, since some
implementations compute the gradient in the forward.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.common.peers import Peer
from benchmarks.common.report import BACKWARD, FORWARD
from benchmarks.kernel.cases import ALL, Inputs
from gpu_lab.driver import Kernel, Launch, emulate
from gpu_lab.estimate import Streaming, read_streaming
from gpu_lab.machine import WARP
from gpu_lab.operators import Operator, Operators, traffic

TOKENS = 512


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

    @property
    def moved(self) -> int:
        """Bytes, of Triton kernels."""
        return self.loaded + self.stored

    @property
    def torch_moved(self) -> int:
        return self.torch_loaded + self.torch_stored


class Call(NamedTuple):
    """What a call launched, which operators PyTorch started, and what it returned."""

    launches: list[Launch]
    operators: list[Operator]
    values: Tensor  # (B,)
    grad: Tensor | None  # (B, T, V), of a training step


def call(
    peer: Peer,
    inputs: Inputs,
    target: str,
    runs: Callable[[Launch], bool],
    *,
    trains: bool,
    follows_chains: bool = False,
) -> Call:
    """Run a forward without gradients, or a training step, emulated; what `runs` says no to, and
    all for AMD, is only compiled."""
    logits = inputs.logits.clone().requires_grad_() if trains else inputs.logits
    operators, grad = Operators(), None
    with (
        peer.on_target(target),
        emulate(target, runs=runs, follows_chains=follows_chains) as lab,
        torch.set_grad_enabled(trains),
        operators,
    ):
        values = inputs.sums(peer, logits)
        if trains:
            (grad,) = torch.autograd.grad(values.sum(), logits)
    return Call(lab.records, operators.started, values.detach(), grad)


class Counted(NamedTuple):
    work: dict[str, Work]  # by pass
    values: Tensor  # (B,)
    grad: Tensor  # (B, T, V)
    streaming: dict[str, Kernel]  # by pass, where one was given logits

    def loops(self) -> dict[str, Streaming]:
        """By pass."""
        itemsize = self.grad.element_size()
        return {passes: read_streaming(k, itemsize) for passes, k in self.streaming.items()}


def count(peer: Peer, inputs: Inputs, target: str, runs: bool = True) -> Counted:
    """Count a forward and a training step; or only compile them, as always for AMD."""
    # Liger writes zeros into rows that are not scored.
    copied = inputs._replace(logits=inputs.logits.clone())
    forward = call(peer, copied, target, lambda launch: runs, trains=False)
    step = call(peer, inputs, target, lambda launch: runs, trains=True)
    assert step.grad is not None
    known = streaming_kernels(forward, inputs.logits)
    new = [kernel for kernel in streaming_kernels(step, inputs.logits) if kernel not in known]
    streaming = {p: found[0] for p, found in ((FORWARD, known), (BACKWARD, new)) if found}
    forward_work = _work(forward, inputs.logits)
    work = {FORWARD: forward_work, BACKWARD: _work(step, inputs.logits) - forward_work}
    return Counted(work, forward.values, step.grad, streaming)


def is_streaming(launch: Launch, logits: Tensor) -> bool:
    """Whether a kernel was given logits or their gradient, or a slice of them."""
    return 2 * launch.largest >= logits.numel()


def streaming_kernels(call: Call, logits: Tensor) -> list[Kernel]:
    return [launch.kernel for launch in call.launches if is_streaming(launch, logits)]


def _work(call: Call, logits: Tensor) -> Work:
    torch_loaded, torch_stored = traffic(call.operators, logits.shape[-1])
    counts = [launch.counts for launch in call.launches if launch.counts is not None]
    streaming = [x.counts for x in call.launches if x.counts and is_streaming(x, logits)]
    return Work(
        launches=len(call.launches),
        instructions=WARP * sum(c.instructions.total() for c in streaming),
        exp2=WARP * sum(c.executed("ex2") for c in streaming),
        loaded=sum(c.distinct["load"] for c in counts),
        stored=sum(c.distinct["store"] for c in counts),
        wide_loaded=16 * sum(c.lanes["load", 16] for c in counts),
        wide_stored=16 * sum(c.lanes["store", 16] for c in counts),
        torch_loaded=torch_loaded,
        torch_stored=torch_stored,
    )


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


def per_token_instructions(peer: Peer, target: str, vocab_size: int) -> float:
    """PTX instructions a token of the kernels that work per token, on a sequence of TOKENS tokens.

    They take many tokens at a time: the few of the other counts would leave most lanes idle.
    """
    logits = torch.zeros(1, 1, vocab_size, dtype=torch.bfloat16).expand(1, TOKENS, vocab_size)
    labels = torch.zeros(1, TOKENS, dtype=torch.int64)
    runs = short_kernels(logits, torch.ones_like(labels))
    done = call(peer, Inputs(logits, labels, None, ALL), target, runs, trains=False).launches
    return WARP * sum(x.counts.instructions.total() for x in done if x.counts) / TOKENS
