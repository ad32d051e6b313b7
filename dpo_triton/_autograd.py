"""Autograd glue: the forward passes call partials and combine, the backward passes grad."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _head, _ops


class Logprob(torch.autograd.Function):
    """logits (B, T, V) -> result, lengths (S,), logps (B, T), stats (E, B, T).

    The result is the values of the sequences, (S,), or with reduction "none" the logps themselves.
    Only the result is differentiable.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        reduction: str,
        shift: bool,
        ignore_index: int,
        temperature: float,
        logit_scale: float,
        softcap: float | None,
        stats: Sequence[str],
        inplace_backward: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scaling = (temperature, logit_scale, softcap)
        vocab_size = logits.shape[-1]
        partials, target, weights = _ops.partials(
            logits,
            labels,
            mask,
            cu_seqlens,
            shift,
            ignore_index,
            0,
            vocab_size,
            *scaling,
            stats,
            backend,
        )
        values, lengths, logps, *of_tokens, token_stats = _ops.combine(
            partials,
            target,
            weights,
            cu_seqlens,
            reduction,
            vocab_size,
            *scaling,
            stats,
            backend,
        )
        result = logps.clone() if reduction == "none" else values
        ctx.save_for_backward(logits, labels, cu_seqlens, weights, lengths, *of_tokens)
        ctx.reduction = reduction
        ctx.options = (shift, 0, *scaling, backend)
        ctx.inplace_backward = inplace_backward
        ctx.is_overwritten = False
        ctx.mark_non_differentiable(lengths, logps, token_stats)
        return result, lengths, logps, token_stats

    @staticmethod
    def backward(ctx: Any, grad_result: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.inplace_backward and ctx.is_overwritten:
            raise RuntimeError(
                "inplace_backward=True: an earlier backward pass wrote its gradient over the "
                "logits, so there is nothing to differentiate again; pass inplace_backward=False"
            )
        logits, labels, cu_seqlens, weights, lengths, *of_tokens = ctx.saved_tensors
        grad_logps = _spread(grad_result, ctx.reduction, lengths, cu_seqlens, weights)
        inputs = (grad_logps, logits, labels, weights, *of_tokens, *ctx.options)
        if ctx.inplace_backward:
            _ops.grad_(*inputs)
            ctx.is_overwritten = True
            return (logits, *(None,) * 12)
        return (_ops.grad(*inputs), *(None,) * 12)


class LinearLogprob(torch.autograd.Function):
    """hidden (B, T, H), weight (V, H), bias (V,) -> as Logprob, the logits only ever in tiles."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        reduction: str,
        shift: bool,
        ignore_index: int,
        temperature: float,
        logit_scale: float,
        softcap: float | None,
        stats: Sequence[str],
        dtype: torch.dtype,
        tile_bytes: int,
        needs: Sequence[bool],  # of hidden, weight and bias
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scaling = (temperature, logit_scale, softcap)
        head_trains = needs[1] or needs[2]
        partials, target, weights, kept, unit_grad = _head.linear_partials(
            hidden,
            weight,
            bias,
            labels,
            mask,
            cu_seqlens,
            shift,
            ignore_index,
            *scaling,
            stats,
            dtype,
            tile_bytes,
            head_trains,
            needs[0] and not head_trains,
            backend,
        )
        values, lengths, logps, *of_tokens, token_stats = _ops.combine(
            partials,
            target,
            weights,
            cu_seqlens,
            reduction,
            weight.shape[0],
            *scaling,
            stats,
            backend,
        )
        result = logps.clone() if reduction == "none" else values
        ctx.save_for_backward(
            hidden, weight, bias, labels, cu_seqlens, weights, lengths, kept, unit_grad, *of_tokens
        )
        ctx.reduction = reduction
        ctx.options = (shift, *scaling, dtype, tile_bytes, needs, backend)
        ctx.mark_non_differentiable(lengths, logps, token_stats)
        return result, lengths, logps, token_stats

    @staticmethod
    def backward(ctx: Any, grad_result: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, cu_seqlens, weights, lengths, *rest = ctx.saved_tensors
        kept, unit_grad, *of_tokens = rest
        grad_logps = _spread(grad_result, ctx.reduction, lengths, cu_seqlens, weights)
        inputs = (labels, weights, *of_tokens, kept, unit_grad, *ctx.options)
        grads = _head.linear_grad(grad_logps, hidden, weight, bias, *inputs)
        needs = ctx.options[-2]
        asked = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        return (*asked, *(None,) * 14)


def _spread(
    grad_result: Tensor, reduction: str, lengths: Tensor, cu_seqlens: Tensor | None, weights: Tensor
) -> Tensor:
    """Upstream gradient of each token, (B, T), up to its weight. No host synchronisation."""
    if reduction == "none":
        return grad_result
    # An empty sequence gives 0 / 0 here, and has no token that would read it.
    grad_values = grad_result / lengths if reduction == "mean" else grad_result
    if cu_seqlens is None:
        return grad_values[:, None].expand_as(weights)
    spread = torch.repeat_interleave(grad_values, cu_seqlens.diff(), output_size=weights.numel())
    return spread.view_as(weights)
