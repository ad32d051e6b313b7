"""The passes of a call whose columns or tokens other ranks have: stages, and what is between."""

import sys
from functools import partial

import torch
from torch import Tensor

from .._autograd import Logits, Options, Passes, Source, checked
from .._backends import backend_named, resolve_backend
from .._head import Head
from .._head._autograd import HeadPasses
from .._head._tiles import Plan, Weights
from .._head.backward import HeadGrads, Saved, Sum, head_backward
from .._head.forward import Forward, head_forward
from .._records import Combined, Partials, Request, Scored, Scores, Tokens, sum_dtype
from ._dtensor import local_head, local_logits
from ._peers import Peers


def sharded_scores(source: Source, tokens: Tokens, options: Options) -> Scores:
    """See `log_probabilities`, of which this is the body where something is sharded."""
    local: Logits | Head
    if isinstance(source, Logits):
        local, tokens, shard = local_logits(source, tokens, options.vocab_shard)
    else:
        assert isinstance(source, Head)
        local, tokens, shard = local_head(source, tokens, options.vocab_shard)
    if shard is None and options.sequence_group is None:  # a head that was gathered
        local, tokens, request = checked(local, tokens, options)
        return local.score(tokens, request)
    with Peers(shard, options.sequence_group) as peers:
        # torch.compile would look into frames one by one after `Peers` has refused.
        if "torch._dynamo" in sys.modules:
            return torch.compiler.disable(_of_group)(local, tokens, options, peers)  # type: ignore[no-untyped-call, no-any-return]
        return _of_group(local, tokens, options, peers)


def _of_group(source: Logits | Head, tokens: Tokens, options: Options, peers: Peers) -> Scores:
    source, tokens, request = checked(source, tokens, options)
    stages = resolve_backend(request.backend, tokens.labels.device, source.dtype)
    request = request._replace(backend=stages.name)
    same = {
        "reduction": request.reduction,
        **request.scaling._asdict(),
        "stats": request.stats,
        "backend": request.backend,
    }
    dtype = sum_dtype(source.dtype)
    if isinstance(source, Logits):
        same = {"dtype of logits": str(source.dtype), **same}
        peers.agree(tokens, dtype, source.logits.shape[-1], stages.num_splits, same)
        passes = Passes(partial(_forward, peers), partial(_backward, peers))
        return source.score(tokens, request, passes)
    plan, width = source.plan(request.backend), source.weight.shape[0]
    same = {
        "hidden's dtype and size": [str(source.hidden.dtype), source.hidden.shape[-1]],
        "dtype of products": str(plan.dtype),
        **same,
        "whether hidden requires a gradient": plan.needs[0],
    }
    peers.agree(tokens, dtype, width, plan.num_splits, same)
    columns = peers.columns_of(width)
    plan = source.plan(request.backend, share=columns.width / columns.vocab_size)
    of_head = (partial(_head_forward, peers), partial(_head_backward, peers), peers.backward)
    return source.score(tokens, request, HeadPasses(*of_head), plan)


def _forward(
    peers: Peers, logits: Tensor, tokens: Tokens, request: Request
) -> tuple[Combined, Tensor]:
    scaling, _, reduction, stats, *_ = request
    stages, columns = backend_named(request.backend), peers.columns_of(logits.shape[-1])
    splits, dtype = stages.num_splits(columns.width), sum_dtype(logits.dtype)
    partials = Partials.empty(tokens, columns, splits, len(stats), dtype)
    stages.partials(logits, tokens, columns, scaling, stats, partials)
    stages.check(tokens, partials.weights, columns.vocab_size)
    partials = peers.gather_all_partials(partials)
    here, weights = peers.local_reduction(reduction), partials.weights
    combined = Combined.empty(weights, tokens.num_sequences(here), len(stats))
    cu_seqlens, vocab_size = tokens.cu_seqlens, columns.vocab_size
    stages.combine(partials, cu_seqlens, here, vocab_size, scaling, stats, combined)
    return peers.sum_sequences(combined, weights, cu_seqlens, reduction), weights


def _backward(
    peers: Peers,
    grad_logps: Tensor,
    logits: Tensor,
    scored: Scored,
    softmax: Tensor,
    request: Request,
    in_place: bool,
) -> Tensor:
    columns = peers.columns_of(logits.shape[-1])
    is_padded = columns.width < logits.shape[-1]
    # Over a copy of padded logits: a gradient of their columns would be copied all the same.
    source = logits.clone() if is_padded and not in_place else logits.detach()
    own = source[..., : columns.width]
    out = own if is_padded or in_place else None
    inputs = (grad_logps, own, scored, softmax, columns, request.scaling, out)
    grad = backend_named(request.backend).grad(*inputs)
    if out is None:
        return grad
    source[..., columns.width :] = 0
    if in_place:
        torch.autograd.graph.increment_version(logits)
    return source


def _head_forward(
    peers: Peers, head: Weights, tokens: Tokens, request: Request, plan: Plan
) -> Forward:
    scaling, _, reduction, stats, *_ = request
    columns, here = peers.columns_of(head.weight.shape[0]), peers.local_reduction(reduction)
    inputs = (head, tokens, columns, scaling, here, stats, plan, peers.gather_partials)
    done = head_forward(*inputs)
    combined = peers.sum_sequences(done.combined, done.weights, tokens.cu_seqlens, reduction)
    return done._replace(combined=combined)


def _head_backward(
    peers: Peers,
    grad_logps: Tensor,
    head: Weights,
    saved: Saved,
    request: Request,
    plan: Plan,
    sum_: Sum,
) -> HeadGrads:
    columns = peers.columns_of(head.weight.shape[0])
    return head_backward(grad_logps, head, saved, columns, request.scaling, plan, sum_)
