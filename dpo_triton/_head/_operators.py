"""Both passes of the head as operators: `linear_logprob` and `linear_logprob_grad`."""

import functools
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._backends import resolve_backend
from .._ops import SCALING, TOKENS, Numbers, Operator, scaling_of
from .._records import Columns, Combined, Stats, Tokens, sum_dtype
from ._tiles import Plan, Weights
from .backward import Saved, head_backward
from .forward import head_forward

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias"
_PLAN = "ScalarType dtype, SymInt tile_bytes, bool[] needs, str backend"


class Asked(NamedTuple):
    """What of a request an operator is told beside the plan."""

    reduction: str
    stats: Stats


FORWARD = (Weights, Tokens, Numbers, Asked, Plan)
BACKWARD = (Weights, Saved, Numbers, Plan)


def _records(inputs: Sequence[Any], kinds: Sequence[Any]) -> list[Any]:
    """Flat arguments as the records whose fields they are, in their order."""
    rest = iter(inputs)
    return [kind(*islice(rest, len(kind._fields))) for kind in kinds]


def _resolved(plan: Plan, device: torch.device) -> Plan:
    return plan._replace(backend=resolve_backend(plan.backend, device, plan.dtype).name)


def _linear_logprob(*inputs: Any) -> tuple[Tensor, ...]:
    """A Combined, and weights (B, T); logits that the backward pass need not make again, flat; and
    d logp / d hidden, (N, H), if the plan makes it, else empty."""
    head, tokens, numbers, (reduction, stats), plan = _records(inputs, FORWARD)
    columns, plan = Columns.all_of(head.weight.shape[0]), _resolved(plan, head.hidden.device)
    done = head_forward(head, tokens, columns, scaling_of(*numbers), reduction, stats, plan)
    return *done.combined, done.weights, done.kept, done.unit_grad


def _fake_linear_logprob(*inputs: Any) -> tuple[Tensor, ...]:
    (hidden, weight, _), tokens, _, (reduction, stats), plan = _records(inputs, FORWARD)
    plan, num_tokens = _resolved(plan, hidden.device), tokens.labels.numel()
    weights = tokens.labels.new_empty(tokens.labels.shape, dtype=sum_dtype(plan.dtype))
    return (
        *Combined.empty(weights, tokens.num_sequences(reduction), len(stats)),
        weights,
        hidden.new_empty(plan.kept_numel(num_tokens, weight.shape[0]), dtype=plan.dtype),
        weights.new_empty((num_tokens, hidden.shape[-1]) if plan.makes_grad else 0),
    )


def _linear_logprob_grad(grad_logps: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, each empty if `needs` does not ask for it.

    grad_logps is (B, T), of any strides, and not read where a token is not scored.
    """
    head, saved, numbers, plan = _records(inputs, BACKWARD)
    columns, plan = Columns.all_of(head.weight.shape[0]), _resolved(plan, head.hidden.device)
    return head_backward(grad_logps, head, saved, columns, scaling_of(*numbers), plan)


def _fake_linear_logprob_grad(grad_logps: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    (hidden, weight, bias), saved, _, plan = _records(inputs, BACKWARD)
    needs_hidden, needs_weight, needs_bias = plan.needs
    bias_dtype = saved.weights.dtype if bias is None else bias.dtype
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


def _product_flops(head: Weights) -> int:
    """Of one product of all rows: how many are scored, shapes do not say."""
    return 2 * head.hidden.shape.numel() * head.weight.shape[0]


# What the model needs, not what is made again, as model FLOPs are counted.
def _forward_flops(*inputs: Any, **kwargs: Any) -> int:
    head, *_, plan = _records(inputs, FORWARD)
    return _product_flops(head) * (2 if plan.makes_grad else 1)


def _backward_flops(grad_logps: Tensor, *inputs: Any, **kwargs: Any) -> int:
    head, *_, plan = _records(inputs, BACKWARD)
    needs_hidden, needs_weight, _ = plan.needs
    return _product_flops(head) * int(needs_hidden + needs_weight)


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
        counted = register_flop_formula(packet, get_raw=True)(formula)
        for mode in _get_current_dispatch_mode_stack():
            counter = getattr(mode, "counter", mode)
            getattr(counter, "flop_registry", {})[packet] = counted
