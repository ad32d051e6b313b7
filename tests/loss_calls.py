"""Log-probabilities of pairs for the losses, and a loss called on them with its gradients."""

import mpmath as mp
import torch

from dpo_triton.losses import LOSSES

OF_PAIRS = [name for name in LOSSES if name != "sft"]


def draw_logps(name: str, batch: int = 5, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Chosen and rejected, of the policy and (where it has one) of the reference: below 0."""
    count = 4 if LOSSES[name].needs_reference else 2
    scale = 0.5 if LOSSES[name].takes == "mean" else 4.0
    return [-torch.rand(batch, dtype=dtype) * scale for _ in range(count)]


def run_loss(name: str, logps: list[torch.Tensor], **options):
    """The result, and the gradient of the sum of its losses for the policy's two tensors."""
    policy = [x.detach().requires_grad_() for x in logps[:2]]
    if name == "kto":
        options = dict(kl=0.25) | options
    result = LOSSES[name].function(*policy, *logps[2:], **options)
    return result, torch.autograd.grad(result.losses.sum(), policy)


def numbers(tensors):
    return [[mp.mpf(x) for x in tensor.tolist()] for tensor in tensors]
