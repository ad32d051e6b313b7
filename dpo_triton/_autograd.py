"""Autograd glue: the forward passes call partials and combine, the backward passes grad."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _head, _ops

if TYPE_CHECKING:
    from .parallel import Peers


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
        peers: "Peers | None",  # the ranks that have the other columns or tokens
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scaling = (temperature, logit_scale, softcap)
        columns = _columns(logits.shape[-1], peers)
        partials, target, weights = _ops.partials(
            logits[..., : columns.width],
            labels,
            mask,
            cu_seqlens,
            shift,
            ignore_index,
            columns.first,
            columns.vocab_size,
            *scaling,
            stats,
            backend,
        )
        if peers is not None:
            partials, target = peers.gather_all_partials(partials, target, weights)
        inputs = (
            partials,
            target,
            weights,
            cu_seqlens,
            columns.vocab_size,
            scaling,
            stats,
            backend,
        )
        result, lengths, logps, of_tokens, token_stats = _combined(reduction, peers, *inputs)
        ctx.save_for_backward(logits, labels, cu_seqlens, weights, lengths, *of_tokens)
        ctx.reduction = reduction
        ctx.options = (shift, columns.first, *scaling, backend)
        ctx.num_columns = columns.width
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
        inputs = (labels, weights, *of_tokens, *ctx.options)
        is_padded = ctx.num_columns < logits.shape[-1]
        if not ctx.inplace_backward and not is_padded:
            return (_ops.grad(grad_logps, logits, *inputs), *(None,) * 13)
        # Over a copy of padded logits: a gradient of their columns would be copied all the same.
        out = logits if ctx.inplace_backward else logits.clone()
        _ops.grad_(grad_logps, out[..., : ctx.num_columns], *inputs)
        if is_padded:
            out[..., ctx.num_columns :] = 0
        ctx.is_overwritten = True
        return (out, *(None,) * 13)


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
        peers: "Peers | None",
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scaling = (temperature, logit_scale, softcap)
        head_trains = needs[1] or needs[2]
        columns = _columns(weight.shape[0], peers)
        inputs = (
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
        if peers is None:
            of_head = _head.linear_partials(*inputs)
        else:
            of_head = _head.head_partials(*inputs, columns=columns, gather=peers.gather_partials)
        partials, target, weights, kept, unit_grad = of_head
        combined = (
            partials, target, weights, cu_seqlens, columns.vocab_size, scaling, stats, backend
        )  # fmt: skip
        result, lengths, logps, of_tokens, token_stats = _combined(reduction, peers, *combined)
        if unit_grad.numel() > 0:  # of no more use: one gathered for this pass can be freed
            weight = weight.new_empty(0)
        ctx.save_for_backward(
            hidden, weight, bias, labels, cu_seqlens, weights, lengths, kept, unit_grad, *of_tokens
        )
        ctx.reduction, ctx.columns, ctx.peers = reduction, columns, peers
        ctx.options = (shift, *scaling, dtype, tile_bytes, needs, backend)
        ctx.mark_non_differentiable(lengths, logps, token_stats)
        return result, lengths, logps, token_stats

    @staticmethod
    def backward(ctx: Any, grad_result: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, cu_seqlens, weights, lengths, *rest = ctx.saved_tensors
        kept, unit_grad, *of_tokens = rest
        grad_logps = _spread(grad_result, ctx.reduction, lengths, cu_seqlens, weights)
        inputs: Any = (grad_logps, hidden, weight, bias, labels, weights, *of_tokens)
        inputs = (*inputs, kept, unit_grad, *ctx.options)
        needs = ctx.options[-2]
        if ctx.peers is None:
            grads = _head.linear_grad(*inputs)
        else:
            with ctx.peers.backward(needs[0]) as sum_:
                grads = _head.head_grad(*inputs, columns=ctx.columns, sum_=sum_)
        asked = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        return (*asked, *(None,) * 15)


def _columns(width: int, peers: "Peers | None") -> _head.Columns:
    """Which columns of the vocabulary are here: all, unless it is sharded."""
    if peers is None or peers.columns is None:
        return _head.Columns(0, width, width)
    return peers.columns


def _combined(
    reduction: str,
    peers: "Peers | None",
    partials: Tensor,
    target: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor | None,
    vocab_size: int,
    scaling: tuple[float, float, float | None],
    stats: Sequence[str],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
    """Result, lengths and logps, what `grad` takes of each token, and stats."""
    # Where a sequence's tokens are sharded, only the sum of those that are here is known.
    is_local = peers is not None and peers.sequence is not None
    values, lengths, logps, *of_tokens, token_stats = _ops.combine(
        partials,
        target,
        weights,
        cu_seqlens,
        "sum" if is_local else reduction,
        vocab_size,
        *scaling,
        stats,
        backend,
    )
    if peers is not None:
        values, lengths = peers.sum_sequences(values, lengths, weights, cu_seqlens, reduction)
    result = logps.clone() if reduction == "none" else values
    return result, lengths, logps, of_tokens, token_stats


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
