"""Both passes of the head as operators: `linear_logprob` and `linear_logprob_grad`."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._backends import resolve_backend
from .._ops import SCALING, TOKENS, Operator, scaling_of
from .._records import Columns, Combined, Scored, Tokens, sum_dtype
from ._tiles import Plan, Weights
from .backward import Saved, head_backward
from .forward import head_forward

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias"
_PLAN = "ScalarType dtype, SymInt tile_bytes, bool[] needs, str backend"


def _resolved(hidden: Tensor, plan: Sequence[Any]) -> Plan:
    asked = Plan(*plan)
    return asked._replace(backend=resolve_backend(asked.backend, hidden.device, asked.dtype).name)


def _linear_logprob(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *inputs: Any
) -> tuple[Tensor, ...]:
    """A Combined, and weights (B, T); logits that the backward pass need not make again, flat; and
    d logp / d hidden, (N, H), if the plan makes it, else empty."""
    tokens, scaling = Tokens(*inputs[:5]), scaling_of(*inputs[5:9])
    reduction, stats, *plan = inputs[9:]
    columns = Columns.all_of(weight.shape[0])
    inputs = (Weights(hidden, weight, bias), tokens, columns, scaling, reduction, stats)
    done = head_forward(*inputs, _resolved(hidden, plan))
    return *done.combined, *done[1:]


def _fake_linear_logprob(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *inputs: Any
) -> tuple[Tensor, ...]:
    tokens, (reduction, stats, *rest) = Tokens(*inputs[:5]), inputs[9:]
    plan, num_tokens = _resolved(hidden, rest), tokens.labels.numel()
    weights = tokens.labels.new_empty(tokens.labels.shape, dtype=sum_dtype(plan.dtype))
    return (
        *Combined.empty(weights, tokens.num_sequences(reduction), len(stats)),
        weights,
        hidden.new_empty(plan.kept_numel(num_tokens, weight.shape[0]), dtype=plan.dtype),
        weights.new_empty((num_tokens, hidden.shape[-1]) if plan.makes_grad else 0),
    )


def _linear_logprob_grad(
    grad_logps: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, each empty if `needs` does not ask for it.

    grad_logps is (B, T), of any strides, and not read where a token is not scored.
    """
    labels, weights, shift, softmax, kept = inputs[:5]
    return head_backward(
        grad_logps,
        Weights(hidden, weight, bias),
        Saved(Scored(labels, weights, shift), softmax, kept),
        Columns.all_of(weight.shape[0]),
        scaling_of(*inputs[5:9]),
        _resolved(hidden, inputs[9:]),
    )


def _fake_linear_logprob_grad(
    grad_logps: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    needs_hidden, needs_weight, needs_bias = Plan(*inputs[9:]).needs
    bias_dtype = inputs[1].dtype if bias is None else bias.dtype
    return (
        hidden.new_empty(hidden.shape if needs_hidden else 0),
        torch.empty_like(weight) if needs_weight else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if needs_bias else 0, dtype=bias_dtype),
    )


linear_logprob = Operator(
    f"linear_logprob({_HEAD}, {TOKENS}, {SCALING}, str reduction, str[] stats, {_PLAN})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_logprob,
    _fake_linear_logprob,
)
linear_logprob_grad = Operator(
    f"linear_logprob_grad(Tensor grad_logps, {_HEAD}, Tensor labels, Tensor weights, bool shift, "
    f"Tensor softmax, Tensor kept, {SCALING}, {_PLAN}) -> (Tensor, Tensor, Tensor)",
    _linear_logprob_grad,
    _fake_linear_logprob_grad,
)


def _product_flops(hidden_shape: Sequence[int], weight_shape: Sequence[int]) -> int:
    """Of one product of all rows: how many are scored, shapes do not say."""
    rows = 1
    for size in hidden_shape[:-1]:
        rows *= size
    return 2 * rows * weight_shape[0] * weight_shape[1]


# What the model needs, not what is made again, as model FLOPs are counted.
def _forward_flops(
    hidden_shape: Sequence[int], weight_shape: Sequence[int], *inputs: Any, **kwargs: Any
) -> int:
    makes_grad = Plan(*inputs[-4:]).makes_grad
    return _product_flops(hidden_shape, weight_shape) * (2 if makes_grad else 1)


def _backward_flops(
    grad_shape: Sequence[int], hidden_shape: Sequence[int], weight_shape: Sequence[int],
    *inputs: Any, **kwargs: Any,
) -> int:  # fmt: skip
    needs_hidden, needs_weight, _ = Plan(*inputs[-4:]).needs
    return _product_flops(hidden_shape, weight_shape) * (needs_hidden + needs_weight)


@functools.cache
def count_flops() -> None:
    """Tell PyTorch's FlopCounterMode of the products; its module imports Triton, and so is not
    imported here. A mode that is active already made a copy of the formulas."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
    from torch.utils.flop_counter import register_flop_formula

    for operator, formula in (
        (linear_logprob, _forward_flops),
        (linear_logprob_grad, _backward_flops),
    ):
        packet = operator.overload.overloadpacket
        counted = register_flop_formula(packet, get_raw=True)(_of_shapes(formula))
        for mode in _get_current_dispatch_mode_stack():
            counter = getattr(mode, "counter", mode)
            getattr(counter, "flop_registry", {})[packet] = counted


def _of_shapes(formula: Any) -> Any:
    def counted(*inputs: Any, **kwargs: Any) -> int:
        shapes = [x.shape if isinstance(x, Tensor) else x for x in inputs]
        return int(formula(*shapes))

    return counted
