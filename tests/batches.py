"""Inputs of the tests, and how wrong a result may be."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

import dpo_triton
from dpo_triton import reference


class Batch(NamedTuple):
    logits: Tensor  # (B, T, V) or (N, V)
    labels: Tensor  # (B, T) or (N,)
    mask: Tensor  # float weights, with holes


def make_batch(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    spread: float = 3.0,
) -> Batch:
    """Normal logits, uniform labels, and weights in (0, 2) of which about a third are 0."""
    logits = (torch.randn(shape, device=device) * spread).to(dtype)
    labels = torch.randint(0, shape[-1], shape[:-1], device=device)
    mask = torch.rand(shape[:-1], device=device) * 2 * (torch.rand(shape[:-1], device=device) > 0.3)
    return Batch(logits, labels, mask)


def value_and_grad(
    function: Any, batch: Batch, upstream: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """The function's value and the gradient of logits for an upstream gradient (default: ones)."""
    logits = batch.logits.detach().requires_grad_()
    value = function(logits, batch.labels, batch.mask, **options)
    upstream = torch.ones_like(value) if upstream is None else upstream.to(value.dtype)
    return value.detach(), torch.autograd.grad(value, logits, upstream)[0]


def truth(
    function_name: str,
    batch: Batch,
    upstream: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    **options: Any,
):
    """Value and gradient in float64 on the CPU, from the same already rounded logits."""
    options = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in options.items()}
    upstream = None if upstream is None else upstream.cpu()
    exact = Batch(batch.logits.detach().cpu().to(dtype), batch.labels.cpu(), batch.mask.cpu())
    return value_and_grad(getattr(reference, function_name), exact, upstream, **options)


def plain(batch: Batch, reduction: str = "mean") -> Tensor:
    """What everybody writes, in float32: the error that we may have twice."""
    p = torch.log_softmax(batch.logits.float(), -1).gather(-1, batch.labels[..., None])[..., 0]
    total = (p * batch.mask).sum(-1)
    return total / batch.mask.sum(-1).clamp(min=1e-8) if reduction == "mean" else total


def max_error(result: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; infinite where one is NaN and the other is not."""
    result = result.detach().cpu().double()
    same = (result == exact) | (result.isnan() & exact.isnan())
    error = torch.where(same, 0.0, (result - exact).abs()).nan_to_num(nan=torch.inf)
    return float(error.max()) if error.numel() else 0.0


def rounding(exact: Tensor, dtype: torch.dtype) -> float:
    """Half a unit in the last place of dtype at the largest magnitude."""
    finite = exact[exact.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return largest * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).tiny


def assert_within_budget(result: Tensor, rough: Tensor, exact: Tensor, what: str = "") -> None:
    """Within twice what plain PyTorch in float32 errs by, and a rounding of the result's dtype.

    In a few numbers plain PyTorch may err by nothing, by luck: then six roundings of float32 stand
    in for it, as a sum of many terms and a product of a few factors may have.
    """
    plain_error = max(max_error(rough, exact), 6 * rounding(exact, torch.float32))
    allowed = 2 * plain_error + rounding(exact, result.dtype)
    error = max_error(result, exact)
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def assert_close(result: Tensor, exact: Tensor, atol: float, what: str = "") -> None:
    """Within atol plus two roundings of the result's dtype."""
    allowed = atol + 2 * rounding(exact, result.dtype)
    error = max_error(result, exact)
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def fused(backend: str, function_name: str = "fused_seq_logprob") -> Any:
    """The public function on a backend."""
    return lambda *args, **options: getattr(dpo_triton, function_name)(
        *args, backend=backend, **options
    )
