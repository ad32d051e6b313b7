"""The three stages in PyTorch, for CPUs and for any device without Triton.

Rows that are scored go through a buffer that stays in cache, several at a time; rows that are not are never
touched. A row's bits are its own: every step is elementwise, or a sum along one row whose order follows from
the vocabulary alone.
"""

import math
from collections.abc import Iterator, Sequence
import numpy as np
import torch
from torch import Tensor

# Elements of the buffer: many enough to make the cost of starting an operation vanish; 6.5 MiB of float32.
BUFFER_NUMEL = 13 << 17
# Exponents are relative to the largest logit of a row's first columns; the true maximum would cost a seventh
# of the forward pass. A sum outside of [1 / TRUSTED, TRUSTED] says that the guess was poor: that row is walked
# again from its true maximum.
PEAK_COLUMNS = 2048
TRUSTED = 2.0**24
# The lowest exponent: finite, so that a row of -inf never makes inf - inf.
LOWEST = -1.0e30
LN2 = math.log(2.0)
# Tokens that combine handles at a time, so that its float64 temporaries do not grow with the batch.
COMBINE_TOKENS = 1 << 14


Run = tuple[int, int]  # first logits row, number of rows


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
    rows = scored - int(shift)
    group, row = rows.div(grid.shape[1], rounding_mode="floor"), rows % grid.shape[1]
    target = _cap_(grid[group, row, y[:, 0]].to(dtype), logit_scale, softcap)

    rows = rows.cpu().numpy()
    max_rows = _buffer_rows(logits, len(rows))
    buffer = _empty(max_rows, logits, dtype)
    spare = _empty(max_rows if "entropy" in stats else 0, logits, dtype)
    channels = torch.empty((2 + len(stats), len(rows), 1), dtype=dtype, device=logits.device)
    peak, total, *sums = channels
    for runs in _blocks(rows, grid.shape[1], len(rows)):
        guesses = [view[:, :PEAK_COLUMNS].amax(1, keepdim=True) for view in _views(grid, runs)]
        torch.mul(_cap_(torch.cat(guesses).to(dtype), logit_scale, softcap), scale, out=peak)
    # Views for each block are made here, all at once: in the loop they would cost a tenth of it.
    per_block = zip(*(x.split(max_rows) for x in (y, -peak, total, *sums)), strict=True)
    for runs, (block_y, negative_peak, *out) in zip(_blocks(rows, grid.shape[1], max_rows), per_block, strict=False):
        workspace = buffer if len(block_y) == max_rows else buffer[: len(block_y)]
        u = _load(grid, runs, workspace, logit_scale, softcap)
        _fold(u, workspace, block_y, scale, negative_peak, out, spare, stats)
    for n in (~((total >= 1 / TRUSTED) & (total <= TRUSTED))).flatten().nonzero().flatten().tolist():
        here = slice(n, n + 1)
        u = _load(grid, [(int(rows[n]), 1)], buffer[:1], logit_scale, softcap)
        others_peak = u.scatter(1, y[here], -math.inf).amax(1, keepdim=True)
        torch.mul(others_peak, scale, out=peak[here]).clamp_(min=LOWEST)
        _fold(u, buffer[:1], y[here], scale, -peak[here], [x[here] for x in (total, *sums)], spare, stats)

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
    flat_weights = weights.flatten()
    logps = torch.empty_like(weights)
    weighted_logps = torch.empty_like(target, dtype=torch.float64)
    peak = torch.empty_like(target)
    total = torch.empty_like(target)
    token_stats = weights.new_empty((len(stats), *weights.shape))
    for first in range(0, target.numel(), COMBINE_TOKENS):
        here = slice(first, first + COMBINE_TOKENS)
        scored = flat_weights[here] != 0
        combined = _combine_tokens(partials[:, :, here], target[here], scale, vocab_size, stats)
        token_logps, peak[here], total[here], *extras = combined
        logps.view(-1)[here] = token_logps.where(scored, 0.0)
        weighted_logps[here] = (token_logps * flat_weights[here]).where(scored, 0.0)
        for out, extra in zip(token_stats.flatten(1), extras, strict=True):
            out[here] = extra.where(scored, 0.0)

    if reduction == "none":
        return weights.new_empty(0), weights.new_empty(0), logps, peak, total, token_stats
    if cu_seqlens is None:
        batch, seq_len = weights.shape
        cu_seqlens = torch.arange(batch + 1, device=weights.device) * seq_len
    lengths = _sequence_sums(flat_weights, cu_seqlens)
    values = _sequence_sums(weighted_logps, cu_seqlens)
    if reduction == "mean":
        has_scored = _sequence_sums(flat_weights != 0, cu_seqlens) > 0
        values /= lengths.where(has_scored, 1.0)
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
        for runs in _blocks(np.setdiff1d(everything, rows), grid.shape[1], len(everything)):
            for view in _views(out_grid, runs):
                view.zero_()

    max_rows = _buffer_rows(logits, len(rows))
    buffer = _empty(max_rows, logits, dtype)
    spare = _empty(max_rows if softcap is not None else 0, logits, dtype)
    per_row = (y, target_grad, probability_scale, negative_peak)
    per_block = zip(*(x.split(max_rows) for x in per_row), strict=True)
    for runs, (y, target_grad, probability_scale, negative_peak) in zip(
        _blocks(rows, grid.shape[1], max_rows), per_block, strict=False
    ):
        workspace = buffer if len(y) == max_rows else buffer[: len(y)]
        u = _load(grid, runs, workspace if softcap is None else spare[: len(y)], logit_scale, softcap)
        views = _views(out_grid, runs)
        # Rows that lie together and need no rounding are computed where they belong.
        direct = len(views) == 1 and out.dtype == dtype
        d = views[0] if direct else workspace
        torch.add(negative_peak, u, alpha=scale, out=d)
        torch.exp2(d, out=d).mul_(probability_scale).scatter_(1, y, target_grad)
        if softcap is not None:  # du / dx = logit_scale * (1 - tanh ** 2)
            d.mul_(u.div_(softcap).square_().neg_().add_(1).mul_(logit_scale))
        if not direct:
            for view, computed in zip(views, d.split([len(view) for view in views]), strict=True):
                view.copy_(computed)
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


def _blocks(rows: np.ndarray, rows_per_group: int, max_rows: int) -> Iterator[list[Run]]:
    """Cut ascending row numbers into blocks of max_rows rows (the last may have fewer), each as runs of neighbours."""
    if len(rows) == 0:
        return
    is_break = (np.diff(rows) != 1) | (rows[1:] % rows_per_group == 0)
    breaks = [0, *(np.flatnonzero(is_break) + 1).tolist(), len(rows)]
    block: list[Run] = []
    room = max_rows
    for start, stop in zip(breaks[:-1], breaks[1:], strict=True):
        while start < stop:
            length = min(stop - start, room)
            block.append((int(rows[start]), length))
            start += length
            room -= length
            if room == 0:
                yield block
                block, room = [], max_rows
    if block:
        yield block


def _views(grid: Tensor, runs: list[Run]) -> list[Tensor]:
    """The runs as views (r, V) of a grid."""
    views = []
    for row, length in runs:
        group, first = divmod(row, grid.shape[1])
        views.append(grid[group, first : first + length])
    return views


def _load(grid: Tensor, runs: list[Run], workspace: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    """u of the runs' rows, (R, V): in the workspace, or the logits themselves if they serve as they lie."""
    views = _views(grid, runs)
    if len(views) == 1:
        if grid.dtype == workspace.dtype and softcap is None:
            return views[0]
        workspace.copy_(views[0])
    else:
        for view, place in zip(views, workspace.split([len(view) for view in views]), strict=True):
            place.copy_(view)
    return _cap_(workspace, logit_scale, softcap)


def _cap_(x: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    """Logits to u, in place: without a softcap logit_scale is part of the slope of z in u."""
    return x if softcap is None else x.mul_(logit_scale / softcap).tanh_().mul_(softcap)


def _row_sums(x: Tensor, out: Tensor) -> None:
    """Sum each row of (R, V) into out, (R, 1): a lone row would be split among threads, two are not."""
    if len(x) > 1:
        torch.sum(x, 1, keepdim=True, out=out)
    else:
        out.copy_(x.expand(2, -1).sum(1)[0])


def _sequence_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums (S,) of (N,) values in float64, each added in order."""
    return torch.segment_reduce(values.double(), "sum", offsets=cu_seqlens.to(torch.int64), initial=0)


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
