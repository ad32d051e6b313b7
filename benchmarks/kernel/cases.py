"""What kernels are given, and what they have to return."""

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.common.batches import Shape, mask_of
from benchmarks.common.logits_peers import sliced
from benchmarks.common.peers import Peer
from benchmarks.common.report import BACKWARD, FORWARD

PASSES = (FORWARD, BACKWARD)


class Case(NamedTuple):
    share: float  # of the rows scored: the last ones of each sequence, as after a prompt
    shift: bool = False  # score the next token: peers slice the logits

    def __str__(self) -> str:
        return f"{'all' if self.share == 1 else f'{self.share:.0%}'}{', shift' * self.shift}"


ALL, ALL_SHIFT, HALF, HALF_SHIFT = (Case(s, h) for s in (1.0, 0.5) for h in (False, True))
CASES = (ALL, HALF, ALL_SHIFT, HALF_SHIFT)


class WholeCall(NamedTuple):
    shape: Shape
    case: Case

    def __str__(self) -> str:
        batch, seq_len, vocab_size, _, name = self.shape
        scored = "" if self.case == ALL else f", {self.case} scored"
        return f"{name}: {batch} x {seq_len}, V = {vocab_size}{scored}"


WHOLE_CALLS = (
    WholeCall(Shape(8, 1023, 6400, name="MiniMind's batch"), ALL),
    WholeCall(Shape(2, 8192, 151936, name="few long sequences"), ALL),
    WholeCall(Shape(1, 16384, 128256, name="one long sequence"), ALL),
    WholeCall(Shape(8, 1023, 6400, name="after a prompt"), HALF),
)


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

    def sums(self, peer: Peer, logits: Tensor) -> Tensor:
        """What an implementation says of these logits or a copy of them: (B,) in nats."""
        options = dict(reduction="sum", shift=self.case.shift)
        sums: Tensor = peer.fn(logits, self.labels, self.mask, **options)
        return sums


def make_inputs(logits: Tensor, labels: Tensor, case: Case) -> Inputs:
    """Return a copy of the logits with the mask of the case."""
    mask = None if case.share == 1 else mask_of(labels, case.share)
    return Inputs(logits.clone(), labels, mask, case)


def complaint(peer: Peer, inputs: Inputs, values: Tensor, grad: Tensor) -> str | None:
    """Compare values and gradient with plain PyTorch in float64: what is wrong, or None.

    A token's log-probability may be off by 4 roundings of the dtype that the implementation returns
    it in, and 1e-5 for its sums; a gradient by 2 roundings of its own and 1e-5 of it.
    """
    exact = inputs.logits.double().requires_grad_()
    logits, labels, mask = sliced(exact, *inputs[1:3], inputs.case.shift)
    scored = torch.ones_like(labels) if mask is None else mask
    logps = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0] * scored
    (exact_grad,) = torch.autograd.grad(logps.sum(), exact)
    info = torch.finfo(inputs.logits.dtype)
    eps = info.eps if peer.rounds_tokens else torch.finfo(torch.float32).eps
    allowed = (4 * eps * logps.detach().abs() + 1e-5 * scored).sum(1)
    if not ((values - logps.sum(1)).abs() <= allowed).all():
        return f"values off by {(values - logps.sum(1)).abs().max():.3g}"
    allowed = (2 * info.eps + 1e-5) * exact_grad.abs() + 2 * info.tiny * info.eps + 1e-9
    if not ((grad - exact_grad).abs() <= allowed).all():
        return f"gradient off by {(grad - exact_grad).abs().max():.3g}"
    return None
