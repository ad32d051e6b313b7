"""The three stages as torch.library operators: `partials`, `combine`, `grad` and `grad_`.

An operator picks its backend when it runs. torch.compile sees an opaque call that its fake
describes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._backends import resolve_backend
from ._checks import check_cu_seqlens_values, check_scored_labels
from ._weights import sum_dtype

# Of the operators: the package's own name, so that another copy of it, imported under another name
# as the Hugging Face Hub does, can live in the same process.
NAMESPACE = __name__.rpartition(".")[0].replace(".", "_")

SCALING = "float temperature, float logit_scale, float? softcap"
_PARTIALS = (
    "(Tensor logits, Tensor labels, Tensor? mask, Tensor? cu_seqlens, bool shift, "
    f"int ignore_index, SymInt first_column, SymInt vocab_size, {SCALING}, str[] stats, "
    "str backend) -> (Tensor, Tensor, Tensor)"
)
_COMBINE = (
    "(Tensor partials, Tensor target, Tensor weights, Tensor? cu_seqlens, str reduction, "
    f"SymInt vocab_size, {SCALING}, str[] stats, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_GRAD_INPUTS = (
    "Tensor labels, Tensor weights, Tensor complement, Tensor reference, Tensor share, "
    f"bool shift, SymInt first_column, {SCALING}, str backend"
)
_GRAD = f"(Tensor grad_logps, Tensor logits, {_GRAD_INPUTS}) -> Tensor"
_GRAD_ = f"(Tensor grad_logps, Tensor(a!) logits, {_GRAD_INPUTS}) -> ()"


@torch.library.custom_op(f"{NAMESPACE}::partials", mutates_args=(), schema=_PARTIALS)
def partials(logits: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Partials (C, K, B * T), the targets' logits (B * T,) and the tokens' weights (B, T)."""
    *stage_inputs, backend = inputs
    labels, _, cu_seqlens, _, _, _, vocab_size = inputs[:7]
    stages = resolve_backend(backend, logits.device, logits.dtype)
    if stages.checks_values and cu_seqlens is not None:
        check_cu_seqlens_values(cu_seqlens, labels.numel())
    partials, target, weights = stages.partials(logits, *stage_inputs)
    if stages.checks_values:
        check_scored_labels(labels, weights, vocab_size, cu_seqlens is not None)
    return partials, target, weights


@partials.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    shift: bool,
    ignore_index: int,
    first_column: int,
    vocab_size: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    stats: Sequence[str],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, seq_len, num_columns = logits.shape
    dtype = sum_dtype(logits.dtype)
    num_splits = resolve_backend(backend, logits.device, logits.dtype).num_splits(num_columns)
    return (
        logits.new_empty((2 + len(stats), num_splits, batch * seq_len), dtype=dtype),
        logits.new_empty(batch * seq_len, dtype=dtype),
        logits.new_empty((batch, seq_len), dtype=dtype),
    )


@torch.library.custom_op(f"{NAMESPACE}::combine", mutates_args=(), schema=_COMBINE)
def combine(
    partials: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Values and lengths (S,), logps (B, T), complement, reference and share (B * T,), stats
    (E, B, T)."""
    *stage_inputs, backend = inputs
    stages = resolve_backend(backend, partials.device, partials.dtype)
    return stages.combine(partials, *stage_inputs)


@combine.register_fake
def _(
    partials: Tensor,
    target: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor | None,
    reduction: str,
    vocab_size: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    stats: Sequence[str],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if reduction == "none":
        num_sequences = 0
    else:
        num_sequences = weights.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        weights.new_empty(num_sequences),
        weights.new_empty(num_sequences),
        torch.empty_like(weights),
        torch.empty_like(target),
        torch.empty_like(target),
        torch.empty_like(target),
        weights.new_empty((len(stats), *weights.shape)),
    )


@torch.library.custom_op(f"{NAMESPACE}::grad", mutates_args=(), schema=_GRAD)
def grad(grad_logps: Tensor, logits: Tensor, *inputs: Any) -> Tensor:
    """The gradient of logits, (B, T, V) contiguous; grad_logps is (B, T), possibly expanded."""
    *stage_inputs, backend = inputs
    stages = resolve_backend(backend, logits.device, logits.dtype)
    return stages.grad(grad_logps, logits, *stage_inputs, out=None)


@grad.register_fake
def _(grad_logps: Tensor, logits: Tensor, *inputs: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op(f"{NAMESPACE}::grad_", mutates_args=("logits",), schema=_GRAD_)
def grad_(grad_logps: Tensor, logits: Tensor, *inputs: Any) -> None:
    """Write the gradient of logits over logits."""
    *stage_inputs, backend = inputs
    stages = resolve_backend(backend, logits.device, logits.dtype)
    stages.grad(grad_logps, logits, *stage_inputs, out=logits)


@grad_.register_fake
def _(grad_logps: Tensor, logits: Tensor, *inputs: Any) -> None:
    return None


def forbid_double_backward(operator: str) -> None:
    """Have an operator that computes a gradient say so where it would be differentiated."""

    def raise_error(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "double backward: the gradient that dpo_triton computes cannot be differentiated "
            "again; for second derivatives use dpo_triton.reference, which is plain PyTorch"
        )

    torch.library.register_autograd(operator, raise_error)


forbid_double_backward(f"{NAMESPACE}::grad")
