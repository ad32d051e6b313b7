"""First stage: one pass over the scored rows; see `kernels/partials.py` for the mathematics."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._records import Columns, Partials, Scaling, Stats, Tokens, sum_dtype
from .._weights import token_weights
from ._rows import Workspace, exponent_scale, own_columns


def num_splits(num_columns: int) -> int:
    """Entries of the partials for each token: a row is summed as a whole."""
    return 1


def partials(
    logits: Tensor, tokens: Tokens, columns: Columns, scaling: Scaling, stats: Stats, out: Partials
) -> None:
    """Write the partials, K = 1, of float32, or float64 like the logits."""
    logits = logits[..., : columns.width]
    dtype = sum_dtype(logits.dtype)
    weights = out.weights.copy_(token_weights(tokens, dtype))
    scored = weights.flatten().nonzero().squeeze(1)
    labels = tokens.labels.flatten().index_select(0, scored)
    y = own_columns(labels, columns.first, columns.width)

    scale = exponent_scale(scaling, dtype)
    workspace = Workspace(logits, scored - int(tokens.shift), dtype)
    channels = torch.empty((2 + len(stats), len(scored), 1), dtype=dtype, device=logits.device)
    column = y.clamp(0, columns.width - 1)
    target = torch.empty_like(channels[0])
    for here, g, places in workspace.blocks():
        u = workspace.load(g, places, scaling)
        torch.gather(u, 1, column[here], out=target[here])
        sums = [x[here] for x in channels]
        _fold(workspace, u, y[here], scale, columns.vocab_size, sums, stats)
    if "top1" in stats:  # of columns that all come after the target, an equal one does not win
        rival = channels[2 + list(stats).index("top1")]
        is_later = labels[:, None] < columns.first
        rival.copy_(torch.where(is_later, rival.nextafter(rival.new_tensor(-math.inf)), rival))

    out.sums.index_copy_(2, scored, channels.transpose(1, 2))
    is_here = (y == column)[:, 0]
    out.target.index_copy_(0, scored[is_here], target[is_here, 0])


def _fold(
    workspace: Workspace,
    u: Tensor,  # (R, V), the workspace's first rows: overwritten
    y: Tensor,  # (R, 1)
    scale: float,
    vocab_size: int,
    out: Sequence[Tensor],  # (R, 1) each: peak, total, and what each stat asks for
    stats: Stats,
) -> None:
    """Peak, total = sum of 2 ** (scale * (u - peak)) over j != y, and what the stats ask for."""
    peak, total, *rest = out
    sums = dict(zip(stats, rest, strict=True))
    if "mean_logit" in sums:  # a sum could be too large for float32
        _row_sums(u / vocab_size, out=sums["mean_logit"])
    if "top1" in sums:
        sums["top1"].copy_(_rival(u, y))
    workspace.fill_target_(y, -math.inf)
    peak.copy_(u.amax(1, keepdim=True).clamp_(min=torch.finfo(u.dtype).min))
    offset = peak * scale
    # Beyond 1 / eps it is not exact to one: there the difference is taken first.
    large = (offset.abs() * torch.finfo(u.dtype).eps >= 1).nonzero()[:, 0]
    exponents = (u[large] - peak[large]) * scale
    workspace.to_exponents_(-offset, scale)
    u[large] = exponents
    products = u.clamp(min=-1.0e4) if "entropy" in sums else None  # 0 * -inf is NaN
    workspace.block(len(u)).exp2_()
    _row_sums(u, out=total)
    if products is not None:
        _row_sums(products.mul_(u), out=sums["entropy"])
    if "log_sum_sq_probs" in sums:
        _row_sums(u.square_(), out=sums["log_sum_sq_probs"])
    # What the offset lacks of the exact product.
    error = (offset.double() - peak.double() * scale).index_fill_(0, large, 0.0)
    if "entropy" in sums:
        sums["entropy"].copy_((sums["entropy"] + error * total) * error.exp2())
    if "log_sum_sq_probs" in sums:
        sums["log_sum_sq_probs"].mul_((2 * error).exp2())
    total.mul_(error.exp2())


def _rival(u: Tensor, y: Tensor) -> Tensor:
    """(R, 1): the target is the first maximum of its row unless this is at least its u.

    An equal u wins in an earlier column. In a later one it does not: there the next number below.
    """
    largest, column = u.max(1, keepdim=True)
    below = torch.nextafter(largest, largest.new_tensor(-math.inf))
    return torch.where(column < y, largest, below.masked_fill(column == y, -math.inf))


def _row_sums(x: Tensor, out: Tensor) -> None:
    """Sum each row of (R, V) into out, (R, 1): threads would share a lone row, but not two."""
    if len(x) > 1:
        torch.sum(x, 1, keepdim=True, out=out)
    else:
        out.copy_(x.expand(2, -1).sum(1)[0])
