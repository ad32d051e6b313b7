"""The gradient of hidden that is made in the forward pass, for a head that does not train."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._backends import Backend
from ._tiles import Columns, Rows, Tile, add_product

# Unnormalised probabilities, times dz / dx over its largest, reach up to this: the middle of
# float16's range.
UNIT = 2.0**10


class Scaling(NamedTuple):
    """From logits to z = slope * u, as in the stages."""

    temperature: float
    logit_scale: float
    softcap: float | None

    @property
    def slope(self) -> float:
        return (1.0 if self.softcap is not None else self.logit_scale) / self.temperature

    @property
    def steepest(self) -> float:
        """The largest dz / dx."""
        return self.logit_scale / self.temperature

    def gradient(self, u: Tensor) -> Tensor | float:
        """dz / dx."""
        if self.softcap is None:
            return self.steepest
        return self.steepest * (1.0 - (u / self.softcap).square())


class HiddenGrad:
    """d logp / d hidden of the scored rows, tile by tile; overwrites the tiles."""

    def __init__(self, rows: Rows, scaling: Scaling, stages: Backend, columns: Columns) -> None:
        self.rows, self.scaling, self.stages, self.columns = rows, scaling, stages, columns
        self.sum = torch.zeros_like(rows.hidden, dtype=rows.weights.dtype)
        # log2 of the largest split's total: what the sum is relative to.
        self.reference = torch.full_like(rows.weights, -(2.0**100))
        self.ones = torch.ones_like(rows.weights)

    def add(self, tile: Tile, partials: Tensor, weight: Tensor) -> None:
        """Add the columns of a tile, whose partials are (C, 1, R); the target's is left out."""
        peak, total = partials[:2, 0]
        reference = self.reference[tile.rows]
        log2_total = peak * (self.scaling.slope / math.log(2.0)) + total.log2()
        larger = torch.maximum(reference, log2_total)
        total_sum = self.sum[tile.rows]
        total_sum.mul_((reference - larger).exp2_()[:, None])
        reference.copy_(larger)
        ones = self.ones[tile.rows]
        self.stages.grad(
            ones[None] / self.scaling.steepest,
            tile.logits[None],
            self.rows.labels[None, tile.rows],
            ones[None],
            torch.zeros_like(ones),
            larger,
            ones * UNIT,
            False,
            self.columns.first + tile.columns.start,
            *self.scaling,
            out=tile.logits[None],
        )
        add_product(total_sum, tile.logits, weight[tile.columns].to(tile.logits.dtype), False)

    def finish(self, partials: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """(M, H), from the partials (2, K, M) and targets (M,) of the whole vocabulary."""
        first, num_columns, vocab_size = self.columns
        _, _, _, complement, reference, share, _ = self.stages.combine(
            partials, target, self.ones[None], None, "none", vocab_size, *self.scaling, []
        )
        normaliser = share * (self.reference - reference).exp2() * (self.scaling.steepest / UNIT)
        of_target = complement * self.scaling.gradient(target)
        y = self.rows.labels.long() - first
        of_target.masked_fill_((y < 0) | (y >= num_columns), 0.0)  # others have it
        of_target = of_target[:, None] * weight[y.clamp(0, num_columns - 1)].to(
            self.rows.hidden.dtype
        )
        return self.sum.mul_(normaliser[:, None]).add_(of_target)
