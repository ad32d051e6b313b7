"""Autograd glue: the forward pass calls partials and combine, the backward pass grad."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _ops


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
        partials, target, weights = _ops.partials(
            logits, labels, mask, cu_seqlens, shift, ignore_index, *scaling, stats, backend
        )
        values, lengths, logps, *of_tokens, token_stats = _ops.combine(
            partials,
            target,
            weights,
            cu_seqlens,
            reduction,
            logits.shape[-1],
            *scaling,
            stats,
            backend,
        )
        result = logps.clone() if reduction == "none" else values
        ctx.save_for_backward(logits, labels, cu_seqlens, weights, lengths, *of_tokens)
        ctx.reduction = reduction
        ctx.options = (shift, *scaling, backend)
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
