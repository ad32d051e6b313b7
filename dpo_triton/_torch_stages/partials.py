"""First stage: one pass over the scored rows; see `kernels/partials.py` for the mathematics."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._rows import (
    blocks,
    cap_,
    exponent_scale,
    load,
    row_grid,
    row_numbers,
    views,
    workspace,
    workspace_rows,
)

# Exponents are relative to the largest logit of a row's first columns: finding the true maximum
# would cost a seventh of the forward pass. A sum outside of [1 / TRUSTED, TRUSTED] says that the
# guess was poor, and that row is walked again from the true maximum of everybody but the target.
PEAK_COLUMNS = 2048
TRUSTED = 2.0**24
# The lowest exponent: finite, so that a row of -inf never makes inf - inf.
LOWEST = -1.0e30


def num_splits(vocab_size: int) -> int:
    """Entries of the partials for each token: a row is summed as a whole."""
    return 1


def partials(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    shift: bool,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    stats: Sequence[str],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return partials (C, 1, B * T), target (B * T,) and weights (B, T), float32 or float64 like
    the logits.

    C is 2 (peak, total) and one more for each of `stats`.

    Raises:
        IndexError: a scored label outside of the vocabulary.
        ValueError: cu_seqlens that do not run from 0 to the number of tokens.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    weights = _token_weights(labels, mask, cu_seqlens, shift, ignore_index, dtype)
    scored = weights.flatten().nonzero().squeeze(1)
    y = labels.flatten().index_select(0, scored).long()[:, None]
    _check_labels(y, scored, logits.shape[-1], labels.shape[1], cu_seqlens is not None)

    scale = exponent_scale(temperature, logit_scale, softcap, dtype)
    grid = row_grid(logits)
    rows = row_numbers(scored, shift)
    row = scored - int(shift)
    x_y = grid[row // grid.shape[1], row % grid.shape[1], y[:, 0]]
    target = cap_(x_y.to(dtype), logit_scale, softcap)

    max_rows = workspace_rows(logits, len(rows))
    buffer = workspace(max_rows, logits, dtype)
    spare = workspace(max_rows if "entropy" in stats else 0, logits, dtype)
    channels = torch.empty((2 + len(stats), len(rows), 1), dtype=dtype, device=logits.device)
    peak, total, *sums = channels
    for runs in blocks(rows, grid.shape[1], len(rows)):
        guesses = [view[:, :PEAK_COLUMNS].amax(1, keepdim=True) for view in views(grid, runs)]
        torch.mul(cap_(torch.cat(guesses).to(dtype), logit_scale, softcap), scale, out=peak)
    # Views for each block are made here, all at once: in the loop they would cost a tenth of it.
    # Without a scored token there is no block, but split gives one empty view: hence no strict zip.
    per_block = zip(*(torch.split(x, max_rows) for x in (y, -peak, total, *sums)), strict=True)
    for runs, (y_here, negative_peak, *out) in zip(
        blocks(rows, grid.shape[1], max_rows), per_block, strict=False
    ):
        here = buffer if len(y_here) == max_rows else buffer[: len(y_here)]
        u = load(grid, runs, here, logit_scale, softcap)
        _fold(u, here, y_here, scale, negative_peak, out, spare, stats)
    is_poor = ~((total >= 1 / TRUSTED) & (total <= TRUSTED)).squeeze(1)
    for n in is_poor.nonzero().flatten().tolist():
        one = slice(n, n + 1)
        u = load(grid, [(int(rows[n]), 1)], buffer[:1], logit_scale, softcap)
        others_peak = u.scatter(1, y[one], -math.inf).amax(1, keepdim=True)
        torch.mul(others_peak, scale, out=peak[one]).clamp_(min=LOWEST)
        out = [x[one] for x in (total, *sums)]
        _fold(u, buffer[:1], y[one], scale, -peak[one], out, spare, stats)

    num_tokens = labels.numel()
    partials = channels.new_empty((2 + len(stats), 1, num_tokens))
    partials.index_copy_(2, scored, channels.transpose(1, 2))
    targets = channels.new_empty(num_tokens).index_copy_(0, scored, target)
    return partials, targets, weights


def _fold(
    u: Tensor,  # (R, V); may be the workspace
    workspace: Tensor,  # (R, V), overwritten
    y: Tensor,  # (R, 1)
    scale: float,
    negative_peak: Tensor,  # (R, 1)
    out: Sequence[Tensor],  # (R, 1) each: the total, and what each stat asks for
    spare: Tensor,  # (at least R, V) for the entropy, overwritten
    stats: Sequence[str],
) -> None:
    """Sum 2 ** (scale * u - peak) over j != y of each row, and what the stats ask for."""
    total, *rest = out
    sums = dict(zip(stats, rest, strict=True))
    if "mean_logit" in sums:
        _row_sums(u, out=sums["mean_logit"])
    if "top1" in sums:  # 0 where the label is the first maximum
        torch.ne(u.argmax(1, keepdim=True), y, out=sums["top1"])
    exponents = torch.add(negative_peak, u, alpha=scale, out=workspace)  # one fused multiply-add
    exponents.scatter_(1, y, -math.inf)
    if "entropy" in sums:
        products = torch.clamp(exponents, min=-1.0e4, out=spare[: len(u)])  # 0 * -inf is NaN
    e = torch.exp2(exponents, out=exponents)
    _row_sums(e, out=total)
    if "entropy" in sums:
        _row_sums(products.mul_(e), out=sums["entropy"])
    if "log_sum_sq_probs" in sums:
        _row_sums(e.square_(), out=sums["log_sum_sq_probs"])


def _row_sums(x: Tensor, out: Tensor) -> None:
    """Sum each row of (R, V) into out, (R, 1): threads would share a lone row, but not two."""
    if len(x) > 1:
        torch.sum(x, 1, keepdim=True, out=out)
    else:
        out.copy_(x.expand(2, -1).sum(1)[0])


def _token_weights(
    labels: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    shift: bool,
    ignore_index: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight of each token, (B, T) of dtype, 0 where it is not scored."""
    weights = torch.ones_like(labels, dtype=dtype) if mask is None else mask.to(dtype, copy=True)
    weights = weights.contiguous().masked_fill_(labels == ignore_index, 0.0)
    if cu_seqlens is not None:
        firsts = _sequence_starts(cu_seqlens.tolist(), labels.numel())
        if shift:
            weights[0, firsts] = 0.0
    elif shift:
        weights[:, :1] = 0.0
    return weights


def _sequence_starts(bounds: list[int], num_tokens: int) -> list[int]:
    """First tokens of the packed sequences that have any."""
    if bounds[0] != 0 or bounds[-1] != num_tokens or sorted(bounds) != bounds:
        shown = bounds if len(bounds) <= 8 else [*bounds[:4], "...", bounds[-1]]
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of tokens, {num_tokens}, got {shown}; "
            "it is the running sum of the sequences' lengths with a 0 in front"
        )
    return [first for first in bounds[:-1] if first < num_tokens]


def _check_labels(
    y: Tensor, scored: Tensor, vocab_size: int, seq_len: int, is_packed: bool
) -> None:
    outside = ((y < 0) | (y >= vocab_size)).squeeze(1).nonzero()
    if len(outside) > 0:
        n = int(scored[outside[0, 0]])
        position = str(n) if is_packed else f"{n // seq_len}, {n % seq_len}"
        raise IndexError(
            f"labels[{position}] is {int(y[outside[0, 0], 0])}, outside of the vocabulary "
            f"[0, {vocab_size}), and so are {len(outside)} scored labels in all; "
            "mask them, or set them to ignore_index"
        )
