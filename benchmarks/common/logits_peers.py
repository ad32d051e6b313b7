"""This package and its peers on logits, each called as `fused_seq_logprob` is.

(logits, labels, mask, *, reduction, shift) -> (B,) in nats, differentiable: logits are (B, T, V),
labels (B, T) int64, mask (B, T) int64 of 0 and 1 with a 1 in each sequence, or None: all are
scored. Of labels[b, t] by logits[b, t], or with shift of labels[b, t + 1], for which the peers have
to slice the logits.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import dpo_triton
from benchmarks.common.peers import OURS, TRL_KERNELS, Peer

SeqLogprob = Callable[..., Tensor]
# (logits (..., V), labels (...), mask of 0 and 1 or None) -> (...), where the mask is 0 any value.
TokenLogps = Callable[[Tensor, Tensor, Tensor | None], Tensor]

OURS_IN_PLACE = "dpo_triton in place"
LOG_SOFTMAX = "log_softmax"
COMPILED = "torch.compile"
TRL_KERNEL = "TRL kernel"
LIGER = "Liger"
FLASH_ATTENTION = "flash-attention"
KERNELS = (OURS, TRL_KERNEL, LIGER, FLASH_ATTENTION)  # of Triton

TRL_EAGER = "trl.trainer.utils"
LIGER_KERNELS = "liger_kernel.ops.cross_entropy"
FLASH_ATTENTION_KERNELS = "flash_attn.ops.triton.cross_entropy"


def candidates(device: torch.device, backend: str) -> list[Peer]:
    """This package first."""

    def ours(**options: bool) -> SeqLogprob:
        return partial(dpo_triton.fused_seq_logprob, backend=backend, **options)

    on_gpu = device.type == "cuda"
    needs_gpu = None if on_gpu else "its kernel is Triton's: needs a GPU"
    return [
        Peer(OURS, "fused_seq_logprob(logits, labels, mask)", ours, ours=True),
        Peer(
            OURS_IN_PLACE,
            "the same with inplace_backward=True",
            partial(ours, inplace_backward=True),
            ours=True,
            overwrites_logits=True,
            serves=lambda place: place.is_headline and place.has_backward,
        ),
        Peer(
            LOG_SOFTMAX,
            "log_softmax(logits.float(), -1).gather(...), the formula this project began with",
            lambda: reduced(log_softmax),
        ),
        Peer("logsumexp", "gather minus logsumexp, of logits.float()", lambda: reduced(logsumexp)),
        Peer(
            COMPILED,
            "torch.compile of log_softmax, for static shapes; compiling is not counted",
            compiled,
        ),
        Peer(
            "TRL",
            "trl.trainer.utils.selective_log_softmax, TRL's way on a CPU",
            trl_eager,
            TRL_EAGER,
            obstacle=f"see {TRL_KERNEL}" if on_gpu else None,
        ),
        Peer(
            TRL_KERNEL,
            "trl.kernels.logprob_entropy, TRL's way on a GPU; it computes the entropy too",
            trl_kernel,
            TRL_KERNELS,
            obstacle=needs_gpu,
        ),
        Peer(
            LIGER,
            "liger_kernel's cross entropy; its forward writes the gradient over the logits",
            liger,
            LIGER_KERNELS,
            obstacle=needs_gpu,
            overwrites_logits=True,
            rounds_tokens=True,
            on_target=liger_on_target,
        ),
        Peer(
            FLASH_ATTENTION,
            "flash_attn's Triton cross entropy",
            flash_attention,
            FLASH_ATTENTION_KERNELS,
            obstacle=needs_gpu,
        ),
    ]


def kernels() -> list[Peer]:
    """Those of Triton."""
    every = candidates(torch.device("cuda"), "triton")
    return [peer for peer in every if peer.name in KERNELS]


def log_softmax(logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """The formula that this project began with, of tokens."""
    return torch.log_softmax(logits.float(), -1).gather(-1, labels[..., None])[..., 0]


def logsumexp(logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    z = logits.float()
    return z.gather(-1, labels[..., None])[..., 0] - z.logsumexp(-1)


def compiled() -> SeqLogprob:
    # Without dynamic=False a second shape would be compiled for any shape; without fullgraph a
    # compiler that gives up would leave eager code under this name.
    return torch.compile(reduced(log_softmax), dynamic=False, fullgraph=True)


def trl_eager() -> SeqLogprob:
    selective_log_softmax = module(TRL_EAGER).selective_log_softmax
    return reduced(
        lambda logits, labels, mask: selective_log_softmax(logits, labels, row_mask=mask)
    )


def trl_kernel() -> SeqLogprob:
    with_entropy = module(TRL_KERNELS).selective_log_softmax_and_entropy
    return reduced(lambda logits, labels, mask: with_entropy(logits, labels, row_mask=mask)[0])


def liger() -> SeqLogprob:
    cross_entropy = module(LIGER_KERNELS).LigerCrossEntropyFunction

    def losses(rows: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = cross_entropy.apply(rows, targets, None, -100, 0.0, 0.0, "none")[0]
        return loss.float()

    return of_cross_entropy(losses)


def flash_attention() -> SeqLogprob:
    cross_entropy_loss = module(FLASH_ATTENTION_KERNELS).cross_entropy_loss
    return of_cross_entropy(lambda rows, targets: cross_entropy_loss(rows, targets)[0])


def of_cross_entropy(losses: Callable[[Tensor, Tensor], Tensor]) -> SeqLogprob:
    """From rows (N, V) and targets (N,), -100 where none is scored, to (N,)."""

    def fn(logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        targets = labels if mask is None else labels.masked_fill(mask == 0, -100)
        rows = logits.reshape(-1, logits.shape[-1])
        return -losses(rows, targets.reshape(-1)).view(labels.shape)

    return reduced(fn)


@contextlib.contextmanager
def liger_on_target(target: str) -> Iterator[None]:
    """Have Liger choose its warps for the target rather than for this machine."""
    kernels = module(LIGER_KERNELS)
    names = {"sm_80": "ampere_ada", "sm_90": "hopper", "sm_100": "blackwell"}
    before = kernels.infer_device_arch, kernels.is_hip
    kernels.infer_device_arch = lambda *args: names.get(target, target)
    kernels.is_hip = lambda: target.startswith("gfx")
    try:
        yield
    finally:
        kernels.infer_device_arch, kernels.is_hip = before


def reduced(of_tokens: TokenLogps) -> SeqLogprob:
    def fn(
        logits: Tensor,
        labels: Tensor,
        mask: Tensor | None,
        *,
        reduction: str = "mean",
        shift: bool = False,
    ) -> Tensor:
        logits, labels, mask = sliced(logits, labels, mask, shift)
        logps = of_tokens(logits, labels, mask)
        if reduction == "sum":
            return (logps if mask is None else logps * mask).sum(1)
        return logps.mean(1) if mask is None else masked_mean(logps, mask)

    return fn


def sliced(
    logits: Tensor, labels: Tensor, mask: Tensor | None, shift: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """With shift: the next tokens, by logits of all but the last."""
    if not shift:
        return logits, labels, mask
    return logits[:, :-1], labels[:, 1:], None if mask is None else mask[:, 1:]


def masked_mean(token_logps: Tensor, mask: Tensor) -> Tensor:
    """(B, T) to (B,)."""
    return (token_logps * mask).sum(1) / mask.sum(1)


def module(name: str) -> Any:
    return importlib.import_module(name)
