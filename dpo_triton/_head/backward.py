"""The backward pass: tiles that were not kept are made again, and go through `grad`."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._backends import backend_named
from .._records import Columns, Scaling, Scored
from ._tiles import Plan, Tiles, Weights, add_product, columns_of, fill_, scored_rows

# Adds what other ranks say of a gradient to it, in place; None where there are no others.
Sum = Callable[[Tensor], None] | None


class Saved(NamedTuple):
    """What the forward pass leaves to the backward pass of a head that trains."""

    labels: Tensor  # (B, T)
    weights: Tensor  # (B, T): 0 where a token is not scored
    shift: bool
    softmax: Tensor  # (4, N)
    kept: Tensor  # logits, flat


class HeadGrads(NamedTuple):
    """Gradients, each empty if the plan does not ask for it."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


def head_backward(
    grad_logps: Tensor,
    head: Weights,
    saved: Saved,
    columns: Columns,
    scaling: Scaling,
    plan: Plan,
    sum_: Sum = None,
) -> HeadGrads:
    """Some columns' backward pass: `sum_` adds to the gradient of the scored hidden states (M, H),
    in place, what the other columns say of it, before it is rounded."""
    needs_hidden, needs_weight, needs_bias = plan.needs
    labels, weights, shift, softmax, kept = saved
    hidden, weight, bias = head
    sums = weights.dtype
    grad_hidden = hidden.new_zeros(hidden.shape if needs_hidden else 0)
    grad_weight = torch.empty_like(weight) if needs_weight else weight.new_empty(0)
    grad_bias = weight.new_zeros(weight.shape[0] if needs_bias else 0, dtype=sums)

    rows = scored_rows(hidden, labels, weights, shift, plan)
    upstream = grad_logps.reshape(-1)[rows.tokens][None]
    softmax, grad = softmax.index_select(1, rows.tokens), backend_named(plan.backend).grad
    tiles = Tiles(rows.number, columns.width, plan, kept)
    hidden_sum = rows.hidden.new_empty(rows.hidden.shape if needs_hidden else 0, dtype=sums)
    # Several blocks of rows are summed in float32, a single one is rounded once by its product.
    is_once = len(tiles.blocks) == 1 and weight.dtype == plan.dtype
    is_direct = is_once or weight.dtype == sums
    room = (0,) if is_direct or not needs_weight else (tiles.width, weight.shape[1])
    weight_sum = weight.new_empty(room, dtype=sums)
    for tile in tiles:
        if not tile.is_kept:
            fill_(tile, rows.hidden, head)
        here, (out, d) = tile.rows, tiles.room_like(tile)  # (1, R, C) and the same as (R, C)
        scored = Scored(rows.labels[:, here], rows.weights[:, here], False)
        of_rows = (upstream[:, here], tile.logits, scored, softmax[:, here])
        grad(*of_rows, columns_of(tile, columns), scaling, out)
        if needs_hidden:
            of_columns = weight[tile.columns].to(plan.dtype)
            add_product(hidden_sum[here], d, of_columns, tile.columns.start == 0)
        if needs_weight:
            place = grad_weight[tile.columns]
            total = place if is_direct else weight_sum[: len(place)]
            add_product(total, d.t(), rows.hidden[here], here.start == 0)
            if not is_direct and here.stop == rows.number:
                place.copy_(total)
        if needs_bias:
            grad_bias[tile.columns] += d.sum(0, dtype=sums)
    if needs_weight:  # padding, or all of it where nothing is scored
        grad_weight[columns.width if rows.number else 0 :] = 0
    if needs_hidden:
        if sum_ is not None:
            sum_(hidden_sum)
        flat = grad_hidden.view(-1, hidden.shape[-1])
        flat.index_copy_(0, rows.places, hidden_sum.to(hidden.dtype))
    return HeadGrads(grad_hidden, grad_weight, grad_bias if bias is None else grad_bias.to(bias))


def frozen_backward(
    grad_logps: Tensor,
    unit_grad: Tensor,
    weights: Tensor,
    shift: bool,
    dtype: torch.dtype,
    sum_: Sum = None,
) -> Tensor:
    """The gradient of hidden, (B, T, H) of dtype: what the forward pass made, (N, H), times the
    factors that it did not know."""
    coefficient = (grad_logps * weights).masked_fill(weights == 0, 0.0).reshape(-1)
    # The first token is never scored by a shift: it leaves its 0 to the last hidden state.
    coefficient = coefficient.roll(-int(shift))[:, None]
    if sum_ is None:
        return (unit_grad * coefficient).to(dtype).view(*weights.shape, unit_grad.shape[-1])
    places = weights.flatten().nonzero().squeeze(1) - int(shift)
    hidden_sum = unit_grad.index_select(0, places).mul_(coefficient[places])
    sum_(hidden_sum)
    grad = torch.zeros_like(unit_grad, dtype=dtype)
    return grad.index_copy_(0, places, hidden_sum.to(dtype)).view(
        *weights.shape, unit_grad.shape[-1]
    )
