"""The head as what logits come from, and its autograd function."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._autograd import differentiated_once, marked, scores, spread
from .._ops import numbers_of
from .._records import Combined, Request, Scores, Tokens
from ._operators import count_flops, linear_logprob, linear_logprob_grad
from ._tiles import Plan, Weights
from .backward import HeadGrads, Saved, Sum, frozen_backward
from .forward import Forward

# Memory of the tiles where the caller names none. On a GPU a tile should be thousands of rows.
TILE_BYTES = {"cpu": 56 * 2**20}
TILE_BYTES_ELSEWHERE = 256 * 2**20
# What a rank with few of the columns takes at least, beyond its share of that.
LEAST_TILE_BYTES = 4 * 2**20


class HeadPasses(NamedTuple):
    """Both passes over the head, as `Passes` over logits."""

    forward: Callable[[Weights, Tokens, Request, Plan], Forward]
    # Upstream (B, T), head, saved, request, plan, and what is next.
    backward: Callable[[Tensor, Weights, Saved, Request, Plan, Sum], HeadGrads]
    summed: Callable[[bool], AbstractContextManager[Sum]]  # whether hidden needs a gradient


def _forward(head: Weights, tokens: Tokens, request: Request, plan: Plan) -> Forward:
    numbers, asked = numbers_of(request), (request.reduction, request.stats)
    *combined, weights, kept, unit_grad = linear_logprob(*head, *tokens, *numbers, *asked, *plan)
    return Forward(Combined(*combined), weights, kept, unit_grad)


def _backward(
    grad_logps: Tensor, head: Weights, saved: Saved, request: Request, plan: Plan, sum_: Sum
) -> HeadGrads:
    numbers = numbers_of(request)
    return HeadGrads(*linear_logprob_grad(grad_logps, *head, *saved, *numbers, *plan))


_ALONE = nullcontext()
_BY_OPERATORS = HeadPasses(_forward, _backward, lambda needs_hidden: _ALONE)


class Head(NamedTuple):
    """Hidden states (B, T, H), or (N, H) of packed tokens, and the head (V, H) that they go to."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None  # (V,)
    tile_bytes: int | None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.hidden, self.weight, self.bias

    @property
    def dtype(self) -> torch.dtype:
        """Of the products: autocast's, which leaves float64 alone."""
        if self.is_autocast:
            return torch.get_autocast_dtype(self.hidden.device.type)
        return self.hidden.dtype

    @property
    def is_autocast(self) -> bool:
        device = self.hidden.device.type
        is_cast = self.hidden.dtype != torch.float64 and device != "meta"
        return is_cast and torch.is_autocast_enabled(device)

    def check(self, tokens: Tokens) -> None:
        _checks.check_hidden(self.hidden, self.weight, self.bias, tokens.cu_seqlens)
        _checks.check_tokens(self.hidden, tokens, "hidden")
        _checks.check_tile_bytes(self.tile_bytes)
        if not self.is_autocast:
            _checks.check_product_dtypes(self.hidden, self.weight, self.bias)

    def as_batch(self) -> "Head":
        return self._replace(hidden=self.hidden[None])

    def plan(self, backend: str, share: float = 1.0) -> Plan:
        """How its passes go; share is what part of the columns is here."""
        tile_bytes = self.tile_bytes
        if tile_bytes is None:
            default = TILE_BYTES.get(self.hidden.device.type, TILE_BYTES_ELSEWHERE)
            tile_bytes = max(int(default * share), LEAST_TILE_BYTES)
        is_on = torch.is_grad_enabled()
        hidden, weight, bias = (is_on and x is not None and x.requires_grad for x in self.tensors)
        return Plan(self.dtype, tile_bytes, (hidden, weight, bias), backend)

    def score(
        self,
        tokens: Tokens,
        request: Request,
        passes: HeadPasses = _BY_OPERATORS,
        plan: Plan | None = None,
    ) -> Scores:
        if "torch.utils.flop_counter" in sys.modules and not torch.compiler.is_compiling():
            count_flops()
        plan = self.plan(request.backend) if plan is None else plan
        head = Weights(self.hidden, self.weight, self.bias)
        if any(plan.needs):
            inputs = (*head, tokens, request, plan, passes)
            return Scores(*LinearLogprob.apply(*inputs))  # type: ignore[no-untyped-call]
        return scores(request, passes.forward(head, tokens, request, plan).combined)


class LinearLogprob(torch.autograd.Function):
    """hidden (B, T, H), weight (V, H), bias (V,) -> Scores, the logits only ever in tiles."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tokens,
        request: Request,
        plan: Plan,
        passes: HeadPasses,
    ) -> tuple[Tensor | None, ...]:
        head = Weights(hidden, weight, bias)
        combined, weights, kept, unit_grad = passes.forward(head, tokens, request, plan)
        if plan.makes_grad:  # all that the backward pass reads: not hidden, nor the head
            ctx.dtype = hidden.dtype
            needed: tuple[Tensor | None, ...] = (unit_grad,)
        else:
            needed = (*head, tokens.labels, combined.softmax, kept, request.symbols)
        ctx.save_for_backward(tokens.cu_seqlens, weights, combined.lengths, *needed)
        ctx.shift, ctx.request, ctx.plan, ctx.passes = tokens.shift, request, plan, passes
        return marked(ctx, scores(request, combined))

    @staticmethod
    def backward(
        ctx: Any, grad_result: Tensor, *unused: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None, None]:
        cu_seqlens, weights, lengths, *needed = ctx.saved_tensors
        request, plan, passes = ctx.request, ctx.plan, ctx.passes
        with passes.summed(plan.needs[0]) as sum_, torch.no_grad():
            upstream = spread(grad_result, request.reduction, lengths, cu_seqlens, weights)
            if plan.makes_grad:
                (unit_grad,) = needed
                grad = frozen_backward(upstream, unit_grad, weights, ctx.shift, ctx.dtype, sum_)
                grads: tuple[Tensor | None, ...] = (grad, None, None)
            else:
                hidden, weight, bias, labels, softmax, kept, symbols = needed
                saved = Saved(labels, weights, ctx.shift, softmax, kept)
                head = Weights(hidden, weight, bias)
                request = request if symbols is None else request._replace(symbols=symbols)
                grads = passes.backward(upstream, head, saved, request, plan, sum_)
        of_hidden, of_weight, of_bias = (
            differentiated_once(grad) if need else None
            for grad, need in zip(grads, plan.needs, strict=True)
        )
        return of_hidden, of_weight, of_bias, None, None, None, None
