"""The forward pass: a tile of logits after the other through `partials`; see the package."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._backends import resolve_backend
from .._checks import check_cu_seqlens_values, check_scored_labels
from .._weights import sum_dtype, token_weights
from ._tiles import Columns, Tiles, fill_, kept_numel, num_splits, scored_rows
from .hidden_grad import HiddenGrad, Scaling


def head_partials(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    shift: bool,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    stats: Sequence[str],
    dtype: torch.dtype,
    tile_bytes: int,
    keep_tiles: bool,
    make_grad: bool,
    backend: str,
    *,
    columns: Columns,
    gather: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`linear_partials` of some columns: `gather` makes of their partials (C, K, M) and targets
    (M,) those of the whole vocabulary, and d logp / d hidden is these columns' part of it."""
    scaling = Scaling(temperature, logit_scale, softcap)
    stages = resolve_backend(backend, hidden.device, dtype)
    first_column, num_columns, vocab_size = columns
    if stages.checks_values and cu_seqlens is not None:
        check_cu_seqlens_values(cu_seqlens, labels.numel())
    weights = token_weights(labels, mask, cu_seqlens, shift, ignore_index, sum_dtype(dtype))
    if stages.checks_values:
        check_scored_labels(labels, weights, vocab_size, cu_seqlens is not None)
    rows = scored_rows(hidden, labels, weights, shift, dtype)
    num_rows, num_tokens = len(rows.tokens), labels.numel()
    kept = hidden.new_empty(
        kept_numel(num_tokens, num_columns, tile_bytes, dtype) if keep_tiles else 0, dtype=dtype
    )
    partials = weights.new_empty((2 + len(stats), num_splits(num_columns), num_rows))
    target = torch.full_like(rows.weights, -torch.inf)
    sums = HiddenGrad(rows, scaling, stages, columns) if make_grad else None
    for tile in Tiles(num_rows, num_columns, tile_bytes, kept, dtype):
        fill_(tile, rows, weight, bias)
        here, of_tile, _ = stages.partials(
            tile.logits[None],
            rows.labels[None, tile.rows],
            rows.weights[None, tile.rows],
            None,
            False,
            ignore_index,
            first_column + tile.columns.start,
            vocab_size,
            *scaling,
            stats,
        )
        partials[:, tile.split, tile.rows] = here[:, 0]
        target[tile.rows] = torch.maximum(target[tile.rows], of_tile)  # NaN stays
        if sums is not None:
            sums.add(tile, here, weight)
    partials, target = gather(partials, target)
    unit_grad = weights.new_empty(0)
    if sums is not None:
        unit_grad = weights.new_zeros(num_tokens, hidden.shape[-1])
        unit_grad.index_copy_(0, rows.places, sums.finish(partials[:2], target, weight))
    return (
        partials.new_empty((*partials.shape[:2], num_tokens)).index_copy_(2, rows.tokens, partials),
        target.new_empty(num_tokens).index_copy_(0, rows.tokens, target),
        weights,
        kept,
        unit_grad,
    )
