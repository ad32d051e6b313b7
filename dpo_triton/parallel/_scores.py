"""The passes of a call whose columns or tokens other ranks have: stages, and what is between."""

import sys
from typing import Any

import torch
from torch import Tensor

from .._autograd import (
    Logits,
    Options,
    Source,
    check_no_hooks,
    checked,
    differentiated_once,
    saved_logits,
    scores,
    spread,
)
from .._backends import backend_named, resolve_backend
from .._head import Head
from .._head._tiles import Plan, Weights
from .._head.backward import HeadGrads, Saved, frozen_backward, head_backward
from .._head.forward import head_forward
from .._records import (
    Combined,
    Partials,
    Request,
    Scaling,
    Scored,
    Scores,
    Tokens,
    sum_dtype,
)
from ._dtensor import local_head, local_logits
from ._peers import Peers


def sharded_scores(source: Source, tokens: Tokens, options: Options) -> Scores:
    """See `log_probabilities`, of which this is the body where something is sharded."""
    if isinstance(source, Logits):
        local, tokens, shard = local_logits(source, tokens, options.vocab_shard)
        return _scores(local, tokens, options._replace(vocab_shard=shard))
    assert isinstance(source, Head)
    head, tokens, shard = local_head(source, tokens, options.vocab_shard)
    return _scores(head, tokens, options._replace(vocab_shard=shard))


def _scores(source: Logits | Head, tokens: Tokens, options: Options) -> Scores:
    if options.vocab_shard is None and options.sequence_group is None:  # a head that was gathered
        call = checked(source, tokens, options)
        scores: Scores = call.source.score(call.tokens, call.scaling, call.request)
        return scores
    with Peers(options.vocab_shard, options.sequence_group) as peers:
        # torch.compile would look into frames one by one after `Peers` has refused.
        if "torch._dynamo" in sys.modules:
            return torch.compiler.disable(_of_group)(source, tokens, options, peers)  # type: ignore[no-untyped-call, no-any-return]
        return _of_group(source, tokens, options, peers)


def _of_group(source: Logits | Head, tokens: Tokens, options: Options, peers: Peers) -> Scores:
    source, tokens, scaling, request = checked(source, tokens, options)
    stages = resolve_backend(request.backend, source.rows.device, source.dtype)
    request = request._replace(backend=stages.name)
    same = {
        "reduction": request.reduction,
        **scaling._asdict(),
        "stats": request.stats,
        "backend": request.backend,
    }
    dtype = sum_dtype(source.dtype)
    inputs: tuple[Any, ...]
    if isinstance(source, Logits):
        same = {"dtype of logits": str(source.dtype), **same}
        peers.agree(tokens, dtype, source.logits.shape[-1], stages.num_splits, same)
        inputs = (*source, tokens, scaling, request, peers)
        return Scores(*_ShardedLogprob.apply(*inputs))  # type: ignore[no-untyped-call]
    head, plan = Weights(*source[:3]), source.plan(request.backend)
    same = {
        "hidden's dtype and size": [str(head.hidden.dtype), head.hidden.shape[-1]],
        "dtype of products": str(plan.dtype),
        **same,
        "whether hidden requires a gradient": plan.needs[0],
    }
    peers.agree(tokens, dtype, head.weight.shape[0], plan.num_splits, same)
    columns = peers.columns_of(head.weight.shape[0])
    plan = source.plan(request.backend, share=columns.width / columns.vocab_size)
    inputs = (*head, tokens, scaling, request, plan, peers)
    return Scores(*_ShardedLinearLogprob.apply(*inputs))  # type: ignore[no-untyped-call]


class _ShardedLogprob(torch.autograd.Function):
    """`Logprob` of some columns, or some tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        inplace_backward: bool,
        tokens: Tokens,
        scaling: Scaling,
        request: Request,
        peers: Peers,
    ) -> tuple[Tensor | None, ...]:
        if inplace_backward:
            check_no_hooks()
        stages, stats = backend_named(request.backend), request.stats
        columns = peers.columns_of(logits.shape[-1])
        splits, dtype = stages.num_splits(columns.width), sum_dtype(logits.dtype)
        partials = Partials.empty(tokens, columns, splits, len(stats), dtype)
        stages.partials(logits, tokens, columns, scaling, stats, partials)
        stages.check(tokens, partials.weights, columns.vocab_size)
        partials = peers.gather_all_partials(partials)
        reduction = peers.local_reduction(request.reduction)
        num_sequences = tokens.num_sequences(reduction)
        combined = Combined.empty(partials.weights, num_sequences, len(stats))
        cu_seqlens, vocab_size = tokens.cu_seqlens, columns.vocab_size
        stages.combine(partials, cu_seqlens, reduction, vocab_size, scaling, stats, combined)
        combined = peers.sum_sequences(combined, partials.weights, cu_seqlens, request.reduction)
        values, lengths, logps, softmax, token_stats = combined
        ctx.save_for_backward(logits, tokens.labels, cu_seqlens, partials.weights, lengths, softmax)
        ctx.shift, ctx.scaling, ctx.request, ctx.columns = tokens.shift, scaling, request, columns
        ctx.inplace_backward, ctx.is_overwritten = inplace_backward, False
        found = scores(request, values, lengths, logps, token_stats)
        ctx.mark_non_differentiable(*(x for x in found[1:] if x is not None))
        return found

    @staticmethod
    def backward(
        ctx: Any, grad_result: Tensor, *unused: Tensor
    ) -> tuple[Tensor, None, None, None, None, None]:
        saved = saved_logits(ctx) if ctx.inplace_backward else ctx.saved_tensors
        logits, labels, cu_seqlens, weights, lengths, softmax = saved
        width = ctx.columns.width
        is_padded = width < logits.shape[-1]
        with torch.no_grad():
            # Over a copy of padded logits: a gradient of their columns would be copied all the
            # same.
            source = logits.clone() if is_padded and not ctx.inplace_backward else logits.detach()
            is_overwritten = is_padded or ctx.inplace_backward
            grad = backend_named(ctx.request.backend).grad(
                spread(grad_result, ctx.request.reduction, lengths, cu_seqlens, weights),
                source[..., :width],
                Scored(labels, weights, ctx.shift),
                softmax,
                ctx.columns,
                ctx.scaling,
                source[..., :width] if is_overwritten else None,
            )
            if is_padded:
                source[..., width:] = 0
        if is_overwritten:
            grad = source
        if ctx.inplace_backward:
            ctx.is_overwritten = True
            torch.autograd.graph.increment_version(logits)
        return differentiated_once(grad), None, None, None, None, None


class _ShardedLinearLogprob(torch.autograd.Function):
    """`LinearLogprob` of some columns, or some tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tokens,
        scaling: Scaling,
        request: Request,
        plan: Plan,
        peers: Peers,
    ) -> tuple[Tensor | None, ...]:
        columns = peers.columns_of(weight.shape[0])
        combined, weights, kept, unit_grad = head_forward(
            Weights(hidden, weight, bias),
            tokens,
            columns,
            scaling,
            peers.local_reduction(request.reduction),
            request.stats,
            plan,
            peers.gather_partials,
        )
        combined = peers.sum_sequences(combined, weights, tokens.cu_seqlens, request.reduction)
        values, lengths, logps, softmax, token_stats = combined
        if plan.makes_grad:
            ctx.dtype = hidden.dtype
            needed: tuple[Tensor | None, ...] = (unit_grad,)
        else:
            needed = (hidden, weight, bias, tokens.labels, softmax, kept)
        ctx.save_for_backward(tokens.cu_seqlens, weights, lengths, *needed)
        ctx.shift, ctx.scaling, ctx.request = tokens.shift, scaling, request
        ctx.plan, ctx.columns, ctx.peers = plan, columns, peers
        found = scores(request, values, lengths, logps, token_stats)
        ctx.mark_non_differentiable(*(x for x in found[1:] if x is not None))
        return found

    @staticmethod
    def backward(
        ctx: Any, grad_result: Tensor, *unused: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None, None, None]:
        cu_seqlens, weights, lengths, *needed = ctx.saved_tensors
        plan = ctx.plan
        with ctx.peers.backward(plan.needs[0]) as sum_, torch.no_grad():
            grad_logps = spread(grad_result, ctx.request.reduction, lengths, cu_seqlens, weights)
            if plan.makes_grad:
                grad = frozen_backward(grad_logps, needed[0], weights, ctx.shift, ctx.dtype, sum_)
                grads = HeadGrads(grad, grad, grad)
            else:
                hidden, weight, bias, labels, softmax, kept = needed
                saved = Saved(Scored(labels, weights, ctx.shift), softmax, kept)
                head = Weights(hidden, weight, bias)
                grads = head_backward(grad_logps, head, saved, ctx.columns, ctx.scaling, plan, sum_)
        of_hidden, of_weight, of_bias = (
            grad if need else None for grad, need in zip(grads, plan.needs, strict=True)
        )
        return of_hidden, of_weight, of_bias, None, None, None, None, None
