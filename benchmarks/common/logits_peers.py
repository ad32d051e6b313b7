"""This package and its peers on logits, each called as `fused_seq_logprob` is.

(logits, labels, mask, *, reduction, shift) -> (B,) in nats, differentiable: logits are (B, T, V),
labels (B, T) int64, mask (B, T) int64 of 0 and 1 with a 1 in each sequence, or None: all are
scored. Of labels[b, t] by logits[b, t], or with shift of labels[b, t + 1], for which the peers have
to slice the logits.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import dpo_triton
from benchmarks.common import token_logps
from benchmarks.common.peers import OURS, TRL_KERNELS, Peer
from benchmarks.common.token_logps import TokenLogps, module, sliced

SeqLogprob = Callable[..., Tensor]

OURS_IN_PLACE = "dpo_triton in place"
LOG_SOFTMAX = "log_softmax"
LOGSUMEXP = "logsumexp"
COMPILED = "torch.compile"
TRL = "TRL"
TRL_KERNEL = "TRL kernel"
LIGER = "Liger"
FLASH_ATTENTION = "flash-attention"
KERNELS = (OURS, TRL_KERNEL, LIGER, FLASH_ATTENTION)  # of Triton


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
            lambda: reduced(token_logps.log_softmax),
        ),
        Peer(
            LOGSUMEXP,
            "gather minus logsumexp, of logits.float()",
            lambda: reduced(token_logps.logsumexp),
        ),
        Peer(
            COMPILED,
            "torch.compile of log_softmax, for static shapes; compiling is not counted",
            compiled,
        ),
        Peer(
            TRL,
            "trl.trainer.utils.selective_log_softmax, TRL's way on a CPU",
            lambda: reduced(token_logps.trl_eager()),
            token_logps.TRL_EAGER,
            obstacle=f"see {TRL_KERNEL}" if on_gpu else None,
        ),
        Peer(
            TRL_KERNEL,
            "trl.kernels.logprob_entropy, TRL's way on a GPU; it computes the entropy too",
            lambda: reduced(token_logps.trl_kernel()),
            TRL_KERNELS,
            obstacle=needs_gpu,
        ),
        Peer(
            LIGER,
            "liger_kernel's cross entropy; its forward writes the gradient over the logits",
            lambda: reduced(token_logps.liger()),
            token_logps.LIGER_KERNELS,
            obstacle=needs_gpu,
            overwrites_logits=True,
            rounds_tokens=True,
            on_target=liger_on_target,
        ),
        Peer(
            FLASH_ATTENTION,
            "flash_attn's Triton cross entropy",
            lambda: reduced(token_logps.flash_attention()),
            token_logps.FLASH_ATTENTION_KERNELS,
            obstacle=needs_gpu,
        ),
    ]


def kernels() -> list[Peer]:
    """Those of Triton."""
    every = candidates(torch.device("cuda"), "triton")
    return [peer for peer in every if peer.name in KERNELS]


def compiled() -> SeqLogprob:
    # Without dynamic=False a second shape would be compiled for any shape; without fullgraph a
    # compiler that gives up would leave eager code under this name.
    return torch.compile(reduced(token_logps.log_softmax), dynamic=False, fullgraph=True)


def reduced(of_tokens: TokenLogps) -> SeqLogprob:
    def fn(
        logits: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        *,
        reduction: str = "mean",
        shift: bool = False,
    ) -> Tensor:
        logits, labels, mask = sliced(logits, labels, mask, shift)
        logps = of_tokens(logits, labels, mask)
        total = (logps if mask is None else logps * mask).sum(1)
        if reduction == "sum":
            return total
        return total / (labels.shape[1] if mask is None else mask.sum(1))

    return fn


@contextlib.contextmanager
def liger_on_target(target: str) -> Iterator[None]:
    """Have Liger choose its warps for the target rather than for this machine."""
    kernels = module(token_logps.LIGER_KERNELS)
    names = {"sm_80": "ampere_ada", "sm_90": "hopper", "sm_100": "blackwell"}
    before = kernels.infer_device_arch, kernels.is_hip
    kernels.infer_device_arch = lambda *args: names.get(target, target)
    kernels.is_hip = lambda: target.startswith("gfx")
    try:
        yield
    finally:
        kernels.infer_device_arch, kernels.is_hip = before
