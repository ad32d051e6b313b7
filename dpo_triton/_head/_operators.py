"""Both passes as torch.library operators: `linear_partials` and `linear_grad`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._ops import NAMESPACE, SCALING, forbid_double_backward
from .._weights import sum_dtype
from ._tiles import Columns, kept_numel, num_splits
from .grad import head_grad
from .partials import head_partials

_PRODUCTS = "Tensor hidden, Tensor weight, Tensor? bias"
_PARTIALS = (
    f"({_PRODUCTS}, Tensor labels, Tensor? mask, Tensor? cu_seqlens, bool shift, "
    f"int ignore_index, {SCALING}, str[] stats, ScalarType dtype, int tile_bytes, "
    "bool keep_tiles, bool make_grad, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_GRAD = (
    f"(Tensor grad_logps, {_PRODUCTS}, Tensor labels, Tensor weights, Tensor complement, "
    f"Tensor reference, Tensor share, Tensor kept, Tensor unit_grad, bool shift, {SCALING}, "
    "ScalarType dtype, int tile_bytes, bool[] needs, str backend) -> (Tensor, Tensor, Tensor)"
)


@torch.library.custom_op(f"{NAMESPACE}::linear_partials", mutates_args=(), schema=_PARTIALS)
def linear_partials(
    hidden: Tensor, weight: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Partials (C, K, N), targets (N,) and weights (B, T) as those of `partials`; logits that
    linear_grad need not make again, flat; with make_grad d logp / d hidden, (N, H), else empty."""
    every = Columns(0, weight.shape[0], weight.shape[0])
    return head_partials(hidden, weight, *inputs, columns=every, gather=lambda *sums: sums)


@linear_partials.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    shift: bool,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    stats: Sequence[str],
    dtype: torch.dtype,
    tile_bytes: int,
    keep_tiles: bool,
    make_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_tokens, vocab_size = labels.numel(), weight.shape[0]
    num_kept = kept_numel(num_tokens, vocab_size, tile_bytes, dtype) if keep_tiles else 0
    weights = labels.new_empty(labels.shape, dtype=sum_dtype(dtype))
    return (
        weights.new_empty((2 + len(stats), num_splits(vocab_size), num_tokens)),
        weights.new_empty(num_tokens),
        weights,
        hidden.new_empty(num_kept, dtype=dtype),
        weights.new_empty((num_tokens, hidden.shape[-1]) if make_grad else 0),
    )


@torch.library.custom_op(f"{NAMESPACE}::linear_grad", mutates_args=(), schema=_GRAD)
def linear_grad(
    grad_logps: Tensor, hidden: Tensor, weight: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, each empty if `needs` does not ask for it.

    grad_logps is (B, T), of any strides, and not read where a token is not scored.
    """
    every = Columns(0, weight.shape[0], weight.shape[0])
    return head_grad(grad_logps, hidden, weight, *inputs, columns=every, sum_=None)


@linear_grad.register_fake
def _(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *inputs: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    needs_hidden, needs_weight, needs_bias = inputs[-2]
    bias_dtype = inputs[1].dtype if bias is None else bias.dtype
    return (
        hidden.new_empty(hidden.shape if needs_hidden else 0),
        torch.empty_like(weight) if needs_weight else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if needs_bias else 0, dtype=bias_dtype),
    )


forbid_double_backward(f"{NAMESPACE}::linear_grad")
