"""Inputs of the tests of hidden states and head, and their truth; `batches` has the budgets."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_triton import reference

TILE_V = 4096  # columns of a tile here, whatever the backend: see conftest


class HeadBatch(NamedTuple):
    hidden: Tensor  # (B, T, H) or (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    labels: Tensor  # (B, T) or (N,)
    mask: Tensor | None  # float weights, with holes


ALL = (True, True, True)  # hidden, weight and bias ask for a gradient
FROZEN = (True, False, False)


def make_head_batch(
    shape: tuple[int, ...],
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    spread: float = 3.0,
) -> HeadBatch:
    """Normal logits of that spread, uniform labels, weights in (0, 2) of which a third are 0."""
    hidden = torch.randn(shape, device=device).to(dtype)
    weight = (torch.randn(vocab_size, shape[-1], device=device) * spread / shape[-1] ** 0.5).to(
        dtype
    )
    bias = torch.randn(vocab_size, device=device).to(dtype)
    labels = torch.randint(0, vocab_size, shape[:-1], device=device)
    mask = torch.rand(shape[:-1], device=device) * 2 * (torch.rand(shape[:-1], device=device) > 0.3)
    return HeadBatch(hidden, weight, bias, labels, mask)


def value_and_grads(
    function: Any,
    batch: HeadBatch,
    upstream: Tensor | None = None,
    trains: tuple[bool, bool, bool] = ALL,
    **options: Any,
) -> tuple[Tensor, ...]:
    """The function's value, and the gradients of those of hidden, weight and bias that train."""
    leaves = [
        None if x is None else x.detach().requires_grad_(train)
        for x, train in zip(batch[:3], trains, strict=True)
    ]
    hidden, weight, bias = leaves
    value = function(hidden, weight, batch.labels, batch.mask, bias=bias, **options)
    upstream = torch.ones_like(value) if upstream is None else upstream.to(value.dtype)
    asked = [x for x in leaves if x is not None and x.requires_grad]
    return value.detach(), *torch.autograd.grad(value, asked, upstream)


def linear_truth(
    function_name: str,
    batch: HeadBatch,
    upstream: Tensor | None = None,
    trains: tuple[bool, bool, bool] = ALL,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Value and gradients in float64 on the CPU, from the same already rounded inputs."""
    options = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in options.items()}
    exact = HeadBatch(
        *(None if x is None else x.detach().cpu().double() for x in batch[:3]),
        *(None if x is None else x.cpu() for x in batch[3:]),
    )
    upstream = None if upstream is None else upstream.cpu()
    return value_and_grads(
        getattr(reference, f"linear_{function_name}"), exact, upstream, trains, **options
    )


def plain_linear(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """What everybody writes: the head on the scored rows, then log_softmax in float32."""
    scored = mask != 0
    logits = F.linear(hidden[scored], weight, bias).float()
    p = logits.log_softmax(-1).gather(-1, labels[scored][:, None])[:, 0]
    p = torch.zeros_like(mask).index_put((scored,), p)
    return (p * mask).sum(-1) / mask.sum(-1).clamp(min=1e-8)
