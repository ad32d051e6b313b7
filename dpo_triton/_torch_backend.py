"""The three stages in PyTorch, for CPUs and for any device without Triton.

Rows that are scored go through a buffer that stays in cache, several at a time; rows that are not are never
touched. A row's bits are its own: every step is elementwise, or a sum along one row whose order follows from
the vocabulary alone.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Elements of the buffer: many enough to make the cost of starting an operation vanish; 6 MiB of float32.
BUFFER_NUMEL = 3 << 19
# Exponents are relative to the largest logit of a row's first columns; the true maximum would cost a seventh
# of the forward pass. A sum outside of [1 / TRUSTED, TRUSTED] says that the guess was poor: that row is walked
# again from its true maximum.
PEAK_COLUMNS = 16384
TRUSTED = 2.0**24
# The lowest exponent: finite, so that a row of -inf never makes inf - inf.
LOWEST = -1.0e30
LN2 = math.log(2.0)
# Tokens that combine handles at a time, so that its float64 temporaries do not grow with the batch.
COMBINE_TOKENS = 1 << 14


class _Block(NamedTuple):
    """Consecutive scored tokens: positions lo to hi among them, and their logits rows as runs of neighbours."""

    lo: int
    hi: int
    runs: list[tuple[int, int]]  # (first row, number of rows)


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
    """Return partials (C, 1, B * T), target (B * T,) and weights (B, T); see `kernels.partials`.

    Raises:
        IndexError: a scored label outside of the vocabulary.
        ValueError: cu_seqlens that do not run from 0 to the number of tokens.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    weights = _token_weights(labels, mask, cu_seqlens, shift, ignore_index, dtype)
    scored = weights.flatten().nonzero().squeeze(1)
    y = labels.flatten().index_select(0, scored).long()[:, None]
    _check_labels(y, scored, logits.shape[-1], labels.shape[1], packed=cu_seqlens is not None)

    scale = _exponent_scale(temperature, logit_scale, softcap, dtype)
    grid = _row_grid(logits)
    rows = (scored - int(shift)).cpu().numpy()
    max_rows = _buffer_rows(logits, len(rows))
    buffer = _empty(max_rows, logits, dtype)
    spare = _empty(max_rows if "entropy" in stats else 0, logits, dtype)
    channels = torch.empty((2 + len(stats), len(rows)), dtype=dtype, device=logits.device)
    target = torch.empty((len(rows), 1), dtype=dtype, device=logits.device)
    for block in _blocks(rows, grid.shape[1], max_rows):
        here = slice(block.lo, block.hi)
        u = _load(grid, block.runs, buffer, logit_scale, softcap)
        torch.gather(u, 1, y[here], out=target[here])
        exponents = buffer[: len(u)]
        channels[:, here] = _fold(u, exponents, y[here], target[here], scale, False, spare, stats)
        total = channels[1, here]
        for i in (~((total >= 1 / TRUSTED) & (total <= TRUSTED))).nonzero().flatten().tolist():
            n = block.lo + i
            u = buffer[:1].copy_(_load(grid, [(rows[n], 1)], buffer, logit_scale, softcap))
            channels[:, n : n + 1] = _fold(u, u, y[n : n + 1], target[n], scale, True, spare, stats)

    partials = torch.empty((2 + len(stats), 1, labels.numel()), dtype=dtype, device=logits.device)
    partials[:, 0, scored] = channels
    targets = torch.empty(labels.numel(), dtype=dtype, device=logits.device)
    targets[scored] = target.squeeze(1)
    return partials, targets, weights


def _fold(
    u: Tensor,  # (R, V); overwritten where it is `exponents`
    exponents: Tensor,  # (R, V), workspace
    y: Tensor,  # (R, 1)
    u_y: Tensor,  # (R, 1)
    scale: float,
    exact_peak: bool,
    spare: Tensor,  # (R, V), workspace for the entropy
    stats: Sequence[str],
) -> Tensor:
    """Sums over each row: (C, R), peak and total over j != y and what the stats ask for."""
    extra = {}
    if "mean_logit" in stats:
        extra["mean_logit"] = u.sum(1)
    if "top1" in stats:  # the first maximum wins a tie
        extra["top1"] = (u.argmax(1) != y[:, 0]).to(u.dtype)
    if exact_peak:
        u.scatter_(1, y, -math.inf)
    guess = u if exact_peak else u[:, :PEAK_COLUMNS]
    peak = guess.amax(1, keepdim=True).mul_(scale).clamp_(min=LOWEST)
    torch.add(-peak, u, alpha=scale, out=exponents)  # one fused multiply-add
    exponents.scatter_(1, y, -math.inf)
    if "entropy" in stats:
        finite_exponents = spare[: len(u)].copy_(exponents).clamp_(min=-1.0e4)  # 0 * -inf is NaN
    e = torch.exp2(exponents, out=exponents)
    total = _row_sums(e)
    if "entropy" in stats:
        extra["entropy"] = _row_sums(finite_exponents.mul_(e))
    if "log_sum_sq_probs" in stats:
        extra["log_sum_sq_probs"] = _row_sums(e.mul_(e))
    return torch.stack([peak[:, 0], total, *(extra[name] for name in stats)])


def combine(
    partials: Tensor,
    target: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor | None,
    reduction: str,
    vocab_size: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    stats: Sequence[str],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return values (S,), lengths (S,), logps (B, T), peak, total (B * T,), stats (E, B, T); see `kernels.combine`."""
    scale = _exponent_scale(temperature, logit_scale, softcap, weights.dtype)
    logps = torch.empty_like(weights)
    peak = torch.empty_like(target)
    total = torch.empty_like(target)
    token_stats = weights.new_empty((len(stats), *weights.shape))
    for first in range(0, target.numel(), COMBINE_TOKENS):
        here = slice(first, first + COMBINE_TOKENS)
        scored = weights.flatten()[here] != 0
        combined = _combine_tokens(partials[:, :, here], target[here], scale, vocab_size, stats)
        token_logps, peak[here], total[here], *token_extra = combined
        logps.view(-1)[here] = token_logps.where(scored, 0.0)
        for out, extra in zip(token_stats.flatten(1), token_extra, strict=True):
            out[here] = extra.where(scored, 0.0)

    if reduction == "none":
        return weights.new_empty(0), weights.new_empty(0), logps, peak, total, token_stats
    batch, seq_len = weights.shape
    if cu_seqlens is None:
        cu_seqlens = torch.arange(batch + 1, device=weights.device) * seq_len
    flat_weights = weights.flatten().double()
    lengths = _sequence_sums(flat_weights, cu_seqlens)
    is_scored = flat_weights != 0
    values = _sequence_sums((logps.flatten() * flat_weights).where(is_scored, 0.0), cu_seqlens)
    if reduction == "mean":
        values /= lengths.where(_sequence_sums(is_scored.double(), cu_seqlens) > 0, 1.0)
    return values.to(weights.dtype), lengths.to(weights.dtype), logps, peak, total, token_stats


def _combine_tokens(
    partials: Tensor, target: Tensor, scale: float, vocab_size: int, stats: Sequence[str]
) -> list[Tensor]:
    """logp, peak, total and the stats of each token, (N,) float64; what is not scored comes out as anything."""
    peaks, totals, *sums = partials.double()  # (K, N) each
    target = target.double() * scale  # in bits
    peak = peaks.amax(0)
    offsets = peaks - peak
    shrink = offsets.exp2()
    others = (totals * shrink).sum(0)
    log_odds = (peak - target + others.log2()) * LN2
    # A target of +inf or NaN would look certain: inf < inf and nan < inf are both false.
    log_odds = log_odds.where(target < math.inf, math.nan)
    logp = -(log_odds.clamp(min=0) + log_odds.abs().neg().exp().log1p())

    # The whole row, its target included, is what the gradient divides by; its peak is rounded as it is stored.
    row_peak = torch.maximum(peak, target).to(partials.dtype).double()
    offset = peak - row_peak
    shrink_all = offset.exp2()
    e_y = (target - row_peak).exp2()
    total = others * shrink_all + e_y
    extra = {}
    for name, channel in zip(stats, sums, strict=True):
        if name == "entropy":
            products = ((channel + offsets * totals) * shrink).sum(0) + offset * others
            products = (products * shrink_all).where(others != 0, 0.0)
            products += (e_y * (target - row_peak)).where(e_y > 0, 0.0)
            extra[name] = (total.log2() - products / total) * LN2
        elif name == "mean_logit":
            extra[name] = channel.sum(0) * (scale * LN2 / vocab_size)
        elif name == "top1":
            extra[name] = 1.0 - channel.amax(0)
        elif name == "log_sum_sq_probs":
            squares = (channel * shrink**2).sum(0) * shrink_all**2 + e_y**2
            extra[name] = (squares.log2() - 2 * total.log2()) * LN2
    return [logp, row_peak, total, *(extra[name] for name in stats)]


def grad(
    grad_logps: Tensor,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    logps: Tensor,
    peak: Tensor,
    total: Tensor,
    shift: bool,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    out: Tensor | None,
) -> Tensor:
    """Return the gradient of logits, in `out` if given, which may be logits itself; see `kernels.grad`."""
    dtype = weights.dtype
    scored = weights.flatten().nonzero().squeeze(1)
    scale = _exponent_scale(temperature, logit_scale, softcap, dtype)
    y = labels.flatten().index_select(0, scored).long()[:, None]
    coefficient = (grad_logps * weights).flatten()[scored, None].to(dtype) * (scale * LN2)
    target_grad = -coefficient * torch.expm1(logps.flatten()[scored, None])
    probability_scale = -coefficient / total[scored, None]
    negative_peak = -peak[scored, None]

    grid = _row_grid(logits)
    rows = (scored - int(shift)).cpu().numpy()
    if out is None:
        out = _zeros(logits)
        out_grid = out.view(grid.shape)
    else:
        out_grid = _row_grid(out)
        everything = np.arange(grid.shape[0] * grid.shape[1])
        for block in _blocks(np.setdiff1d(everything, rows), grid.shape[1], len(everything)):
            for _, view in _views(out_grid, block.runs):
                view.zero_()

    max_rows = _buffer_rows(logits, len(rows))
    buffer = _empty(max_rows, logits, dtype)
    spare = _empty(max_rows if softcap is not None else 0, logits, dtype)
    for block in _blocks(rows, grid.shape[1], max_rows):
        here = slice(block.lo, block.hi)
        views = list(_views(out_grid, block.runs))
        # Rows that lie together and need no rounding are computed where they belong.
        direct = len(views) == 1 and out.dtype == dtype
        d = views[0][1] if direct else buffer[: block.hi - block.lo]
        u = _load(grid, block.runs, buffer if softcap is None else spare, logit_scale, softcap)
        torch.add(negative_peak[here], u, alpha=scale, out=d)
        torch.exp2(d, out=d).mul_(probability_scale[here]).scatter_(1, y[here], target_grad[here])
        if softcap is not None:  # du / dx = logit_scale * (1 - tanh ** 2)
            d.mul_(u.div_(softcap).square_().neg_().add_(1).mul_(logit_scale))
        if not direct:
            for position, view in views:
                view.copy_(d[position : position + len(view)])
    return out


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
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != labels.numel() or sorted(bounds) != bounds:
            raise ValueError(
                f"cu_seqlens must rise from 0 to the number of tokens, {labels.numel()}, got {_brief(bounds)}; "
                "it is the running sum of the sequences' lengths with a 0 in front"
            )
        firsts = [b for b in bounds[:-1] if b < labels.numel()]
        if shift:
            weights[0, firsts] = 0.0
    elif shift:
        weights[:, :1] = 0.0
    return weights


def _brief(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:3]))}, ..., {values[-1]}]"


def _check_labels(y: Tensor, scored: Tensor, vocab_size: int, seq_len: int, packed: bool) -> None:
    outside = ((y < 0) | (y >= vocab_size)).nonzero()
    if len(outside) > 0:
        n = int(scored[outside[0, 0]])
        position = str(n) if packed else f"{n // seq_len}, {n % seq_len}"
        raise IndexError(
            f"labels[{position}] is {int(y[outside[0, 0], 0])}, outside of the vocabulary [0, {vocab_size}), "
            f"as are {len(outside)} scored labels in all; mask them, or set them to ignore_index"
        )


def _exponent_scale(
    temperature: float, logit_scale: float, softcap: float | None, dtype: torch.dtype
) -> float:
    """Slope of z in u over ln 2, as a number of dtype: partials, combine and grad must use the same."""
    scale = (1.0 if softcap is not None else logit_scale) / temperature / LN2
    return scale if dtype == torch.float64 else float(np.float32(scale))


def _row_grid(x: Tensor) -> Tensor:
    """View (B, T, V) as (1, B * T, V) where the strides allow: runs of rows then cross sequences."""
    batch, seq_len, vocab_size = x.shape
    if seq_len == 1:
        return x.transpose(0, 1)
    if batch == 1 or x.stride(0) == seq_len * x.stride(1):
        return x.view(1, batch * seq_len, vocab_size)
    return x


def _blocks(rows: np.ndarray, rows_per_group: int, max_rows: int) -> Iterator[_Block]:
    """Cut ascending row numbers into blocks of at most max_rows, and those into runs of neighbours."""
    if len(rows) == 0:
        return
    is_break = (np.diff(rows) != 1) | (rows[1:] % rows_per_group == 0)
    breaks = [0, *(np.flatnonzero(is_break) + 1).tolist(), len(rows)]
    lo, runs = 0, []
    for start, stop in zip(breaks[:-1], breaks[1:], strict=True):
        while start < stop:
            length = min(stop - start, lo + max_rows - start)
            runs.append((int(rows[start]), length))
            start += length
            if start == lo + max_rows:
                yield _Block(lo, start, runs)
                lo, runs = start, []
    if runs:
        yield _Block(lo, len(rows), runs)


def _views(grid: Tensor, runs: list[tuple[int, int]]) -> Iterator[tuple[int, Tensor]]:
    """The runs as views (r, V) of a grid, each with its position in the block."""
    position = 0
    for row, length in runs:
        group, first = divmod(row, grid.shape[1])
        yield position, grid[group, first : first + length]
        position += length


def _load(
    grid: Tensor, runs: list[tuple[int, int]], buffer: Tensor, logit_scale: float, softcap: float | None
) -> Tensor:
    """u of the block's rows, (R, V): in the buffer, or the logits themselves if they serve as they lie."""
    views = list(_views(grid, runs))
    if len(views) == 1 and grid.dtype == buffer.dtype and softcap is None:
        return views[0][1]
    for position, view in views:
        buffer[position : position + len(view)].copy_(view)
    u = buffer[: sum(length for _, length in runs)]
    return u if softcap is None else u.mul_(logit_scale / softcap).tanh_().mul_(softcap)


def _row_sums(x: Tensor) -> Tensor:
    """Sum of each row of (R, V): a lone row would be split among threads, two equal ones are not."""
    return x.sum(1) if len(x) > 1 else x.expand(2, -1).sum(1)[:1]


def _sequence_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums (S,) of (N,) float64 values, each added in order."""
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens.to(torch.int64), initial=0)


def _buffer_rows(logits: Tensor, num_rows: int) -> int:
    return max(1, min(num_rows, BUFFER_NUMEL // max(1, logits.shape[-1])))


def _empty(num_rows: int, logits: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty((num_rows, logits.shape[-1]), dtype=dtype, device=logits.device)


def _zeros(logits: Tensor) -> Tensor:
    """Contiguous zeros like logits. On a CPU straight from the operating system, by way of NumPy's calloc:

    pages of rows that nobody writes are never touched, and large arrays ask for huge pages.
    """
    if logits.device.type != "cpu":
        return torch.zeros_like(logits, memory_format=torch.contiguous_format)
    words = {2: np.int16, 4: np.int32, 8: np.int64}[logits.element_size()]
    return torch.from_numpy(np.zeros(logits.shape, words)).view(logits.dtype)
