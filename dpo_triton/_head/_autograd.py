"""The head as what logits come from, and its autograd function."""

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks, _ops
from .._autograd import differentiated_once, scores, spread
from .._records import Request, Scaling, Scores, Tokens
from ._operators import count_flops, linear_logprob, linear_logprob_grad
from ._tiles import Plan, Weights
from .backward import frozen_backward

# Memory of the tiles where the caller names none. On a GPU a tile should be thousands of rows.
TILE_BYTES = {"cpu": 56 * 2**20}
TILE_BYTES_ELSEWHERE = 256 * 2**20
# What a rank with few of the columns takes at least, beyond its share of that.
LEAST_TILE_BYTES = 4 * 2**20


class Head(NamedTuple):
    """Hidden states (B, T, H), or (N, H) of packed tokens, and the head (V, H) that they go to."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None  # (V,)
    tile_bytes: int | None

    @property
    def rows(self) -> Tensor:
        return self.hidden

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

    def score(self, tokens: Tokens, scaling: Scaling, request: Request) -> Scores:
        symbols = _ops.symbols_of(scaling)
        if "torch.utils.flop_counter" in sys.modules and not torch.compiler.is_compiling():
            count_flops()
        head, plan = Weights(*self[:3]), self.plan(request.backend)
        if any(plan.needs):
            inputs = (*head, tokens, scaling, symbols, request, plan)
            return Scores(*LinearLogprob.apply(*inputs))  # type: ignore[no-untyped-call]
        found = _forward(head, tokens, scaling, symbols, request, plan)
        values, lengths, logps, _, stats, *_ = found
        return scores(request, values, lengths, logps, stats)


class LinearLogprob(torch.autograd.Function):
    """hidden (B, T, H), weight (V, H), bias (V,) -> Scores, the logits only ever in tiles."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tokens,
        scaling: Scaling,
        symbols: Tensor | None,
        request: Request,
        plan: Plan,
    ) -> tuple[Tensor | None, ...]:
        head = Weights(hidden, weight, bias)
        found = _forward(head, tokens, scaling, symbols, request, plan)
        values, lengths, logps, softmax, stats, weights, kept, unit_grad = found
        ctx.shift, ctx.scaling, ctx.request, ctx.plan = tokens.shift, scaling, request, plan
        if plan.makes_grad:  # all that the backward pass reads: not hidden, nor the head
            ctx.dtype = hidden.dtype
            needed: tuple[Tensor | None, ...] = (unit_grad,)
        else:
            needed = (hidden, weight, bias, tokens.labels, softmax, kept, symbols)
        ctx.save_for_backward(tokens.cu_seqlens, weights, lengths, *needed)
        results = scores(request, values, lengths, logps, stats)
        ctx.mark_non_differentiable(*(x for x in results[1:] if x is not None))
        return results

    @staticmethod
    def backward(
        ctx: Any, grad_result: Tensor, *unused: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None, None, None]:
        cu_seqlens, weights, lengths, *needed = ctx.saved_tensors
        plan = ctx.plan
        with torch.no_grad():
            grad_logps = spread(grad_result, ctx.request.reduction, lengths, cu_seqlens, weights)
            if plan.makes_grad:
                grad = frozen_backward(grad_logps, needed[0], weights, ctx.shift, ctx.dtype)
                grads = (grad, None, None)
            else:
                hidden, weight, bias, labels, softmax, kept, symbols = needed
                grads = linear_logprob_grad(
                    grad_logps,
                    *(hidden, weight, bias),
                    *(labels, weights, ctx.shift, softmax, kept),
                    *_ops.constants(ctx.scaling, symbols),
                    symbols,
                    *plan,
                )
        of_hidden, of_weight, of_bias = (
            differentiated_once(grad) if need else None
            for grad, need in zip(grads, plan.needs, strict=True)
        )
        return of_hidden, of_weight, of_bias, None, None, None, None, None


def _forward(
    head: Weights,
    tokens: Tokens,
    scaling: Scaling,
    symbols: Tensor | None,
    request: Request,
    plan: Plan,
) -> Any:
    return linear_logprob(
        *head,
        *tokens,
        *_ops.constants(scaling, symbols),
        symbols,
        request.reduction,
        request.stats,
        *plan,
    )
