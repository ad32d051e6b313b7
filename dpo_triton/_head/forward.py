"""The forward pass: a tile of logits after the other through `partials`; see the package."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._backends import backend_named
from .._records import Columns, Combined, Partials, Scaling, Stats, Tokens, sum_dtype
from .._weights import token_weights
from ._tiles import Plan, Tiles, Weights, columns_of, fill_, rows_of, scored_rows
from .hidden_grad import HiddenGrad


class Forward(NamedTuple):
    combined: Combined
    weights: Tensor  # (B, T)
    kept: Tensor  # logits that the backward pass need not make again, flat
    unit_grad: Tensor  # d logp / d hidden, (N, H), of these columns; empty unless it is made here


def head_forward(
    head: Weights,
    tokens: Tokens,
    columns: Columns,
    scaling: Scaling,
    reduction: str,
    stats: Stats,
    plan: Plan,
    gather: Callable[[Partials], Partials] | None = None,
) -> Forward:
    """Some columns' forward pass: `gather` makes of the partials of the scored tokens, with sums
    (C, K, M) and targets (M,), those of the whole vocabulary."""
    stages = backend_named(plan.backend)
    weights = token_weights(tokens, sum_dtype(plan.dtype))
    stages.check(tokens, weights, columns.vocab_size)
    rows = scored_rows(head.hidden, tokens.labels, weights, tokens.shift, plan)
    num_tokens = tokens.labels.numel()
    kept = head.hidden.new_empty(plan.kept_numel(num_tokens, columns.width), dtype=plan.dtype)
    channels, splits = 2 + len(stats), plan.num_splits(columns.width)
    partials = Partials(
        weights.new_empty((channels, splits, rows.number)),
        torch.full_like(rows.weights[0], -torch.inf),
        rows.weights,
    )
    sums = HiddenGrad(rows, partials.sums, scaling, stages) if plan.makes_grad else None
    tiles = Tiles(rows.number, columns.width, plan, kept)
    of_block = {
        some.start: (rows.as_tokens(some), rows_of(partials, some)) for some in tiles.blocks
    }
    for tile in tiles:
        fill_(tile, rows.hidden, head)
        here, (of_tile, out) = columns_of(tile, columns), of_block[tile.rows.start]
        splits = tile.splits.stop - tile.splits.start
        place = out._replace(sums=out.sums.narrow(1, tile.splits.start, splits))
        stages.partials(tile.logits, of_tile, here, scaling, stats, place)
        if sums is not None:
            sums.add(tile, here, head.weight)
    if gather is not None:
        partials = gather(partials)
    every = partials.among(rows.tokens, weights)
    combined = Combined.empty(weights, tokens.num_sequences(reduction), len(stats))
    vocab_size = columns.vocab_size
    stages.combine(every, tokens.cu_seqlens, reduction, vocab_size, scaling, stats, combined)
    unit_grad = weights.new_empty(0)
    if sums is not None:
        unit_grad = weights.new_zeros(num_tokens, head.hidden.shape[-1])
        softmax = combined.softmax.index_select(1, rows.tokens)
        of_rows = sums.finish(softmax, partials.target, columns, head.weight)
        unit_grad.index_copy_(0, rows.places, of_rows)
    return Forward(combined, weights, kept, unit_grad)
