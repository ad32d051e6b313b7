"""The Triton kernels that the kernel benchmark sets side by side, as (logits, labels, mask, shift).

logits are (B, T, V), labels (B, T) int64, mask (B, T) int64 of 0 and 1, or None: all are scored.
The result is the sum of the log-probabilities of each sequence, (B,) in nats, differentiable: of
labels[b, t] by logits[b, t], or with shift of labels[b, t + 1], for which the peers have to slice
the logits.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import dpo_triton
from benchmarks.common import token_logps
from benchmarks.common.peers import OURS, TRL_KERNELS, Peer
from benchmarks.common.token_logps import TokenLogps, masked_sum, module

SeqLogprob = Callable[[Tensor, Tensor, Tensor | None, bool], Tensor]

TRL = "TRL"
LIGER = "Liger"
FLASH_ATTENTION = "flash-attention"


@dataclass(frozen=True)
class KernelPeer(Peer):
    result_dtype: torch.dtype = torch.float32  # of a token's log-probability
    on_target: Callable[[str], contextlib.AbstractContextManager[None]] = lambda target: (
        contextlib.nullcontext()
    )


def candidates(dtype: torch.dtype) -> list[KernelPeer]:
    """This package first."""
    return [
        KernelPeer(
            OURS, 'fused_seq_logprob(..., shift=..., backend="triton")', lambda: ours, ours=True
        ),
        KernelPeer(
            TRL,
            "trl.kernels.logprob_entropy; it computes the entropy too",
            lambda: sum_of(token_logps.trl_kernel()),
            TRL_KERNELS,
        ),
        KernelPeer(
            LIGER,
            "liger_kernel's cross-entropy; its forward writes the gradient over the logits",
            lambda: sum_of(token_logps.liger()),
            token_logps.LIGER_KERNELS,
            overwrites_logits=True,
            result_dtype=dtype,
            on_target=liger_on_target,
        ),
        KernelPeer(
            FLASH_ATTENTION,
            "flash_attn's Triton cross-entropy",
            lambda: sum_of(token_logps.flash_attention()),
            token_logps.FLASH_ATTENTION_KERNELS,
        ),
    ]


def ours(logits: Tensor, labels: Tensor, mask: Tensor | None, shift: bool) -> Tensor:
    value = dpo_triton.fused_seq_logprob(
        logits, labels, mask, reduction="sum", shift=shift, backend="triton"
    )
    assert isinstance(value, Tensor)
    return value


def sum_of(of_tokens: TokenLogps) -> SeqLogprob:
    def fn(logits: Tensor, labels: Tensor, mask: Tensor | None, shift: bool) -> Tensor:
        logits, labels, mask = sliced(logits, labels, mask, shift)
        return masked_sum(of_tokens(logits, labels, mask), mask)

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


def sliced(
    logits: Tensor, labels: Tensor, mask: Tensor | None, shift: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    if not shift:
        return logits, labels, mask
    return logits[:, :-1], labels[:, 1:], None if mask is None else mask[:, 1:]
