"""First stage: one pass over the scored rows; see `kernels/partials.py` for the mathematics."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._records import Columns, Partials, Scaling, Tokens, sum_dtype
from .._weights import token_weights
from ._rows import (
    Workspace,
    blocks,
    exponent_error,
    exponent_scale,
    own_columns,
    row_grid,
    row_numbers,
    views,
)

# Exponents are relative to the largest logit of a row's first columns: finding the true maximum
# would cost a seventh of the forward pass. A sum outside of [1 / TRUSTED, TRUSTED] says that the
# guess was poor, and that row is walked again from the true maximum of everybody but the target.
PEAK_COLUMNS = 2048
TRUSTED = 2.0**24
# The lowest peak: finite, so that a row of -inf never makes inf - inf.
LOWEST = -(2.0**100)


def num_splits(num_columns: int) -> int:
    """Entries of the partials for each token: a row is summed as a whole."""
    return 1


def partials(
    logits: Tensor,
    tokens: Tokens,
    columns: Columns,
    scaling: Scaling,
    stats: Sequence[str],
    out: Partials,
) -> None:
    """Write the partials, K = 1, of float32, or float64 like the logits."""
    logits = logits[..., : columns.width]
    labels, first_column = tokens.labels, columns.first
    dtype = sum_dtype(logits.dtype)
    weights = out.weights.copy_(token_weights(tokens, dtype))
    scored = weights.flatten().nonzero().squeeze(1)
    y = own_columns(labels.flatten().index_select(0, scored), first_column, logits.shape[-1])

    scale = exponent_scale(scaling, dtype)
    grid = row_grid(logits)
    rows = row_numbers(scored, tokens.shift)
    row = scored - int(tokens.shift)
    num_columns = logits.shape[-1]
    here = y[:, 0].clamp(0, num_columns - 1)
    x_y = grid[row // grid.shape[1], row % grid.shape[1], here]
    target = scaling.cap_(x_y.to(dtype))

    workspace = Workspace(logits, len(rows), dtype)
    spare = torch.empty_like(workspace.rows(workspace.max_rows)) if "entropy" in stats else None
    channels = torch.empty((2 + len(stats), len(rows), 1), dtype=dtype, device=logits.device)
    peak, total = channels[:2]
    for runs in blocks(rows, grid.shape[1], len(rows)):
        guesses = [view[:, :PEAK_COLUMNS].amax(1, keepdim=True) for view in views(grid, runs)]
        peak.copy_(scaling.cap_(torch.cat(guesses).to(dtype)))
    offsets = workspace.pad(peak * -scale)
    # Views for each block are made here, all at once: in the loop they would cost a tenth of it.
    # Without a scored token there is no block, but split gives one empty view: hence no strict zip.
    per_block = zip(
        *(torch.split(x, workspace.max_rows) for x in (y, *channels[1:])),
        [offsets[lo:] for lo in range(0, max(1, len(rows)), workspace.max_rows)],
        strict=True,
    )
    for runs, (y_here, *sums, offsets_here) in zip(
        blocks(rows, grid.shape[1], workspace.max_rows), per_block, strict=False
    ):
        workspace.load(grid, runs, scaling)
        _fold(workspace, y_here, scale, offsets_here, sums, spare, stats)
    is_poor = ~((total >= 1 / TRUSTED) & (total <= TRUSTED)).squeeze(1)
    for n in is_poor.nonzero().flatten().tolist():
        one = slice(n, n + 1)
        u = workspace.load(grid, [(int(rows[n]), 1)], scaling)
        workspace.fill_target_(y[one], -math.inf)
        others_peak = u.amax(1, keepdim=True)
        peak[one] = others_peak.clamp_(min=LOWEST)
        workspace.load(grid, [(int(rows[n]), 1)], scaling)
        sums = [x[one] for x in channels[1:]]
        _fold(workspace, y[one], scale, workspace.pad(peak[one] * -scale), sums, spare, stats)
    _make_exact(channels, scale, stats)
    if "top1" in stats:  # of columns that all come after the target, an equal one does not win
        rival = channels[2 + list(stats).index("top1")]
        is_later = labels.flatten().index_select(0, scored)[:, None] < first_column
        rival.copy_(torch.where(is_later, rival.nextafter(rival.new_tensor(-math.inf)), rival))

    out.sums.index_copy_(2, scored, channels.transpose(1, 2))
    is_here = y[:, 0] == here
    out.target.index_copy_(0, scored[is_here], target[is_here])


def _fold(
    workspace: Workspace,  # holds u of R rows, overwritten
    y: Tensor,  # (R, 1)
    scale: float,
    offsets: Tensor,  # -scale * peak, of `Workspace.pad`
    out: Sequence[Tensor],  # (R, 1) each: the total, and what each stat asks for
    spare: Tensor | None,  # (at least R, V) for the entropy, overwritten
    stats: Sequence[str],
) -> None:
    """Sum 2 ** (scale * u - scale * peak) over j != y of each row, and what the stats ask for."""
    num_rows = len(y)
    x = workspace.rows(num_rows)  # u, then exponents, then exponentials
    total, *rest = out
    sums = dict(zip(stats, rest, strict=True))
    if "mean_logit" in sums:
        _row_sums(x, out=sums["mean_logit"])
    if "top1" in sums:
        sums["top1"].copy_(_rival(x, y))
    workspace.to_exponents(num_rows, offsets, scale)
    workspace.fill_target_(y, -math.inf)
    if spare is not None:
        products = torch.clamp(x, min=-1.0e4, out=spare[:num_rows])  # 0 * -inf is NaN
    workspace.exp2_(num_rows)
    _row_sums(x, out=total)
    if spare is not None:
        _row_sums(products.mul_(x), out=sums["entropy"])
    if "log_sum_sq_probs" in sums:
        _row_sums(x.square_(), out=sums["log_sum_sq_probs"])


def _rival(u: Tensor, y: Tensor) -> Tensor:
    """(R, 1): the target is the first maximum of its row unless this is at least its u.

    An equal u wins in an earlier column. In a later one it does not: there the next number below.
    """
    largest, column = u.max(1, keepdim=True)
    below = torch.nextafter(largest, largest.new_tensor(-math.inf))
    return torch.where(column < y, largest, below.masked_fill(column == y, -math.inf))


def _make_exact(channels: Tensor, scale: float, stats: Sequence[str]) -> None:
    """From exponents relative to the rounded scale * peak to the exact one."""
    peak, total, *rest = channels
    sums = dict(zip(stats, rest, strict=True))
    error = exponent_error(peak, scale)
    correction = error.exp2()
    if "entropy" in sums:
        sums["entropy"].copy_((sums["entropy"] + error * total) * correction)
    if "log_sum_sq_probs" in sums:
        sums["log_sum_sq_probs"].copy_(sums["log_sum_sq_probs"] * correction.square())
    total.copy_(total * correction)


def _row_sums(x: Tensor, out: Tensor) -> None:
    """Sum each row of (R, V) into out, (R, 1): threads would share a lone row, but not two."""
    if len(x) > 1:
        torch.sum(x, 1, keepdim=True, out=out)
    else:
        out.copy_(x.expand(2, -1).sum(1)[0])
