"""The gradient of hidden that is made in the forward pass, for a head that does not train."""

import torch
from torch import Tensor

from .._records import Backend, Columns, Combined, Partials, RowSoftmax, Scaling, Scored
from ._tiles import Rows, Tile, add_product

# Probabilities, times dz / dx over its largest, are written as up to this: the middle of float16's
# range.
UNIT = 2.0**10


class HiddenGrad:
    """d logp / d hidden of the scored rows, tile by tile; overwrites the tiles."""

    def __init__(self, rows: Rows, scaling: Scaling, stages: Backend) -> None:
        self.rows, self.scaling, self.stages = rows, scaling, stages
        self.sum = torch.zeros_like(rows.hidden, dtype=rows.weights.dtype)
        # Of everybody but the target, among the columns so far: what the sum is relative to.
        self.softmax = rows.weights.new_zeros((4, rows.number))
        self.steepest = scaling.logit_scale / scaling.temperature  # the largest dz / dx
        self.ones = torch.ones_like(rows.weights)
        self.nobody = torch.full_like(rows.weights[0], -torch.inf)

    def add(self, tile: Tile, columns: Columns, sums: Tensor, weight: Tensor) -> None:
        """Add the columns of a tile, whose partials and those before are in sums (C, K, M)."""
        here = tile.rows
        ones = self.ones[:, here]
        so_far = Partials(sums[:2, : tile.splits.stop, here], self.nobody[here], ones)
        combined = Combined.empty(ones, 0, 0)
        self.stages.combine(so_far, None, "none", columns.vocab_size, self.scaling, (), combined)
        softmax = combined.softmax
        before = self.softmax[:, here]
        total = self.sum[here].mul_(_rescaled(before, softmax)[:, None])
        before.copy_(softmax)
        softmax[0] = 0.0  # the target's column
        softmax[2] *= UNIT
        self.stages.grad(
            ones / self.steepest,
            tile.logits,
            Scored(self.rows.labels[:, here], ones, False),
            softmax,
            columns,
            self.scaling,
            tile.logits,
        )
        d = tile.logits[0]
        add_product(total, d, weight[tile.columns].to(d.dtype), False)

    def finish(self, softmax: Tensor, target: Tensor, columns: Columns, weight: Tensor) -> Tensor:
        """(M, H), from the softmax (4, M) and targets (M,) of the whole vocabulary."""
        others = _rescaled(self.softmax, softmax)[:, None]
        of_target = softmax[0] * (self.scaling.slope * self.scaling.chain(target))
        y = self.rows.labels[0].long() - columns.first
        of_target.masked_fill_((y < 0) | (y >= columns.width), 0.0)  # others have it
        of_weight = weight[y.clamp(0, columns.width - 1)].to(self.rows.hidden.dtype)
        # One factor after the other: at 80 nats their product is below float32's normal numbers.
        self.sum.mul_(self.steepest / UNIT).mul_(others)
        return self.sum.addcmul_(of_target[:, None], of_weight.to(self.sum.dtype))


def _rescaled(before: Tensor, after: Tensor) -> Tensor:
    """The total of one softmax over that of a later one, (M,): 0 where the first has nobody."""
    old, new = RowSoftmax(*before), RowSoftmax(*after)
    ratio = new.share / old.share * (old.reference - new.reference).exp2()
    # Another scale of exponents means that the first total is beyond the reach of the second.
    is_comparable = (old.share > 0) & (old.exponent_scale == new.exponent_scale)
    return ratio.where(is_comparable, torch.zeros_like(ratio))
