"""The backward pass: tiles that were not kept are made again, and go through `grad`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._backends import resolve_backend
from ._tiles import Columns, Tiles, add_product, fill_, scored_rows


def head_grad(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    complement: Tensor,
    reference: Tensor,
    share: Tensor,
    kept: Tensor,
    unit_grad: Tensor,
    shift: bool,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    dtype: torch.dtype,
    tile_bytes: int,
    needs: Sequence[bool],
    backend: str,
    *,
    columns: Columns,
    sum_: Callable[[Tensor], None] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_grad` of some columns: `sum_` adds to the gradient of the scored hidden states
    (M, H), in place, what the other columns say of it, before it is rounded."""
    needs_hidden, needs_weight, needs_bias = needs
    grad_hidden = hidden.new_zeros(hidden.shape if needs_hidden else 0)
    grad_weight = torch.empty_like(weight) if needs_weight else weight.new_empty(0)
    grad_bias = weight.new_zeros(weight.shape[0] if needs_bias else 0, dtype=weights.dtype)

    def bias_result() -> Tensor:
        return grad_bias if bias is None else grad_bias.to(bias.dtype)

    if unit_grad.numel() > 0:
        coefficient = torch.where(weights != 0, grad_logps * weights, 0.0).flatten()
        # The first token is never scored by a shift: it leaves its 0 to the last hidden state.
        coefficient = coefficient.roll(-int(shift))[:, None]
        flat_grad = grad_hidden.view(unit_grad.shape)
        if sum_ is None:
            torch.mul(unit_grad, coefficient, out=flat_grad)
        else:
            places = weights.flatten().nonzero().squeeze(1) - int(shift)
            hidden_sum = unit_grad.index_select(0, places).mul_(coefficient[places])
            sum_(hidden_sum)
            flat_grad.index_copy_(0, places, hidden_sum.to(hidden.dtype))
        return grad_hidden, grad_weight, bias_result()

    stages = resolve_backend(backend, hidden.device, dtype)
    rows = scored_rows(hidden, labels, weights, shift, dtype)
    num_rows = len(rows.tokens)
    if num_rows == 0:
        return grad_hidden, grad_weight.zero_(), bias_result()
    of_rows = [x.reshape(-1)[rows.tokens] for x in (grad_logps, complement, reference, share)]
    tiles = Tiles(num_rows, columns.width, tile_bytes, kept, dtype)
    hidden_sum = rows.hidden.new_empty(
        rows.hidden.shape if needs_hidden else 0, dtype=weights.dtype
    )
    # Several tiles of rows are summed in float32, a single one is rounded once by its product.
    is_once = tiles.num_blocks == 1 and weight.dtype == dtype
    is_direct = is_once or weight.dtype == weights.dtype
    weight_sum = weight.new_empty(
        0 if is_direct or not needs_weight else (tiles.width, weight.shape[1]), dtype=weights.dtype
    )
    for tile in tiles:
        if not tile.is_kept:
            fill_(tile, rows, weight, bias)
        upstream, *of_tile = (x[tile.rows] for x in of_rows)
        d = tiles.room_like(tile)
        stages.grad(
            upstream[None],
            tile.logits[None],
            rows.labels[None, tile.rows],
            rows.weights[None, tile.rows],
            *of_tile,
            False,
            columns.first + tile.columns.start,
            temperature,
            logit_scale,
            softcap,
            out=d[None],
        )
        is_first = tile.rows.start == 0
        if needs_hidden:
            of_columns = weight[tile.columns].to(dtype)
            add_product(hidden_sum[tile.rows], d, of_columns, tile.split == 0)
        if needs_weight:
            place = grad_weight[tile.columns]
            total = place if is_direct else weight_sum[: len(place)]
            add_product(total, d.t(), rows.hidden[tile.rows], is_first)
            if not is_direct and tile.rows.stop == num_rows:
                place.copy_(total)
        if needs_bias:
            grad_bias[tile.columns] += d.sum(0, dtype=weights.dtype)
    if needs_weight:
        grad_weight[columns.width :] = 0
    if needs_hidden:
        if sum_ is not None:
            sum_(hidden_sum)
        grad_hidden.view(-1, hidden.shape[-1]).index_copy_(
            0, rows.places, hidden_sum.to(hidden.dtype)
        )
    return grad_hidden, grad_weight, bias_result()
