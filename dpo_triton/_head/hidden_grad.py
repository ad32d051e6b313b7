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

    def __init__(self, rows: Rows, sums: Tensor, scaling: Scaling, stages: Backend) -> None:
        self.rows, self.sums, self.scaling, self.stages = rows, sums, scaling, stages
        self.sum = torch.empty_like(rows.hidden, dtype=rows.weights.dtype)
        self.steepest = scaling.logit_scale / scaling.temperature  # the largest dz / dx
        self.blocks: dict[int, _Block] = {}

    def add(self, tile: Tile, columns: Columns, weight: Tensor) -> None:
        """Add the columns of a tile, whose partials and those before are in sums (C, K, M)."""
        is_first = tile.columns.start == 0
        if is_first:
            self.blocks[tile.rows.start] = _Block(self, tile.rows)
        block = self.blocks[tile.rows.start]
        before, now = block.now, block.before
        block.before, block.now = before, now
        so_far = Partials(block.sums.narrow(1, 0, tile.splits.stop), block.nobody, block.ones)
        self.stages.combine(so_far, None, "none", columns.vocab_size, self.scaling, (), now)
        if not is_first:
            block.sum.mul_(_rescaled(before.softmax, now.softmax).unsqueeze(1))
        now.softmax[0].zero_()  # the target's column
        self.stages.grad(
            block.upstream,
            tile.logits,
            Scored(block.labels, block.ones, False),
            now.softmax,
            columns,
            self.scaling,
            tile.logits,
        )
        d = tile.matrix
        add_product(block.sum, d, weight[tile.columns].to(d.dtype), is_first)

    def finish(self, softmax: Tensor, target: Tensor, columns: Columns, weight: Tensor) -> Tensor:
        """(M, H), from the softmax (4, M) and targets (M,) of the whole vocabulary."""
        so_far = [block.now.softmax for block in self.blocks.values()]
        others = _rescaled(torch.cat(so_far, 1) if so_far else softmax, softmax).unsqueeze(1)
        of_target = softmax[0] * (self.scaling.slope * self.scaling.chain(target))
        y = self.rows.labels[0].long() - columns.first
        of_target.masked_fill_((y < 0) | (y >= columns.width), 0.0)  # others have it
        of_weight = weight[y.clamp(0, columns.width - 1)].to(self.rows.hidden.dtype)
        # One factor after the other: at 80 nats their product is below float32's normal numbers.
        self.sum.mul_(self.steepest / UNIT).mul_(others)
        return self.sum.addcmul_(of_target.unsqueeze(1), of_weight.to(self.sum.dtype))


class _Block:
    """What tiles of the same rows share."""

    def __init__(self, of: HiddenGrad, rows: slice) -> None:
        self.labels = of.rows.labels[:, rows]
        self.ones = torch.ones_like(of.rows.weights[:, rows])
        self.nobody = torch.full_like(self.ones[0], -torch.inf)
        self.upstream = self.ones * (UNIT / of.steepest)
        self.sums, self.sum = of.sums[:2, :, rows], of.sum[rows]
        # Of everybody but the target, among the columns so far, which sum is relative to; and among
        # those before.
        self.now, self.before = (Combined.empty(self.ones, 0, 0) for _ in range(2))


def _rescaled(before: Tensor, after: Tensor) -> Tensor:
    """The total of one softmax over that of a later one, (M,): 0 where the first has nobody."""
    old, new = RowSoftmax(*before), RowSoftmax(*after)
    ratio = (old.reference - new.reference).exp2_().mul_(new.share / old.share)
    # Another scale of exponents means that the first total is beyond the reach of the second.
    is_apart = (old.share <= 0).logical_or_(old.exponent_scale != new.exponent_scale)
    return ratio.masked_fill_(is_apart, 0.0)
