"""Per-token log-probabilities of plain PyTorch and of the peers' operators on logits.

Each maker returns (logits (..., V), labels (...) int64, mask of 0 and 1 or None) -> (...), in nats
and differentiable; where the mask is 0 a result may have any value.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.peers import TRL_KERNELS

TokenLogps = Callable[[Tensor, Tensor, Tensor | None], Tensor]

LIGER_KERNELS = "liger_kernel.ops.cross_entropy"
FLASH_ATTENTION_KERNELS = "flash_attn.ops.triton.cross_entropy"
TRL_EAGER = "trl.trainer.utils"


def log_softmax(logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """The formula that this project began with."""
    return torch.log_softmax(logits.float(), -1).gather(-1, labels[..., None])[..., 0]


def logsumexp(logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    z = logits.float()
    return z.gather(-1, labels[..., None])[..., 0] - z.logsumexp(-1)


def trl_eager() -> TokenLogps:
    selective_log_softmax = module(TRL_EAGER).selective_log_softmax
    return lambda logits, labels, mask: selective_log_softmax(logits, labels, row_mask=mask)


def trl_kernel() -> TokenLogps:
    with_entropy = module(TRL_KERNELS).selective_log_softmax_and_entropy
    return lambda logits, labels, mask: with_entropy(logits, labels, row_mask=mask)[0]


def liger() -> TokenLogps:
    cross_entropy = module(LIGER_KERNELS).LigerCrossEntropyFunction

    def fn(logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        rows, targets = logits.reshape(-1, logits.shape[-1]), _ignoring(labels, mask).reshape(-1)
        loss, *_ = cross_entropy.apply(rows, targets, None, -100, 0.0, 0.0, "none")
        return -loss.view(labels.shape).float()

    return fn


def flash_attention() -> TokenLogps:
    cross_entropy_loss = module(FLASH_ATTENTION_KERNELS).cross_entropy_loss

    def fn(logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        rows, targets = logits.reshape(-1, logits.shape[-1]), _ignoring(labels, mask).reshape(-1)
        return -cross_entropy_loss(rows, targets)[0].view(labels.shape)

    return fn


def masked_mean(token_logps: Tensor, mask: Tensor) -> Tensor:
    """(B, T) to (B,)."""
    return (token_logps * mask).sum(1) / mask.sum(1)


def sliced(
    logits: Tensor, labels: Tensor, mask: Tensor | None, shift: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """With shift: the next tokens, by logits of all but the last."""
    if not shift:
        return logits, labels, mask
    return logits[:, :-1], labels[:, 1:], None if mask is None else mask[:, 1:]


def module(name: str) -> Any:
    return importlib.import_module(name)


def _ignoring(labels: Tensor, mask: Tensor | None) -> Tensor:
    return labels if mask is None else labels.masked_fill(mask == 0, -100)
