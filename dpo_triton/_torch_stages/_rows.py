"""How the stages walk the logits: rows in blocks that fit a buffer; the scale of exponents."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

# Elements of the buffer, 6.5 MiB of float32: enough to hide the cost of starting an operation.
BUFFER_NUMEL = 13 << 17
LN2 = math.log(2.0)
# Elements of which PyTorch gives a thread at least so many (at::internal::GRAIN_SIZE).
GRAIN = 32768

Run = tuple[int, int]  # first row, number of rows


def exponent_scale(
    temperature: float, logit_scale: float, softcap: float | None, dtype: torch.dtype
) -> float:
    """Slope of z in u over ln 2, as a number of dtype: all three stages must use the same."""
    scale = (1.0 if softcap is not None else logit_scale) / temperature / LN2
    return scale if dtype == torch.float64 else float(np.float32(scale))


def cap_(x: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    """Logits to u, in place: without a softcap logit_scale is part of the slope of z in u."""
    return x if softcap is None else x.mul_(logit_scale / softcap).tanh_().mul_(softcap)


def row_grid(x: Tensor) -> Tensor:
    """View (B, T, V) as (1, B * T, V) where strides allow: runs of rows then cross sequences."""
    batch, seq_len, vocab_size = x.shape
    if seq_len == 1:
        return x.transpose(0, 1)
    if batch == 1 or x.stride(0) == seq_len * x.stride(1):
        return x.view(1, batch * seq_len, vocab_size)
    return x


def row_numbers(scored: Tensor, shift: bool) -> np.ndarray:
    """Logits rows (M,) of the scored tokens (M,), on the host: a GPU would be waited for here."""
    return (scored - int(shift)).cpu().numpy()


def blocks(rows: np.ndarray, rows_per_group: int, max_rows: int) -> Iterator[list[Run]]:
    """Cut ascending rows into blocks of max_rows (the last may be less), as runs of neighbours."""
    if len(rows) == 0:
        return
    is_break = (np.diff(rows) != 1) | (rows[1:] % rows_per_group == 0)
    breaks = [0, *(np.flatnonzero(is_break) + 1).tolist(), len(rows)]
    block: list[Run] = []
    room = max_rows
    for start, stop in itertools.pairwise(breaks):
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


def views(grid: Tensor, runs: list[Run]) -> list[Tensor]:
    """The runs as views (R, V) of a grid."""
    found = []
    for row, length in runs:
        group, first = divmod(row, grid.shape[1])
        found.append(grid[group, first : first + length])
    return found


def load(
    grid: Tensor, runs: list[Run], workspace: Tensor, logit_scale: float, softcap: float | None
) -> Tensor:
    """u of the rows, (R, V): in the workspace, or the logits as they lie if they serve."""
    sources = views(grid, runs)
    if len(sources) == 1:
        if grid.dtype == workspace.dtype and softcap is None:
            return sources[0]
        workspace.copy_(sources[0])
    else:
        for source, place in zip(sources, split_like(workspace, sources), strict=True):
            place.copy_(source)
    return cap_(workspace, logit_scale, softcap)


def split_like(x: Tensor, parts: list[Tensor]) -> tuple[Tensor, ...]:
    """Views of (R, V) with as many rows each as the parts have."""
    return torch.split_with_sizes(x, [len(part) for part in parts])


class Workspace:
    """Room for the exponents of a block of rows, in which a row's bits do not depend on the others.

    torch.exp2 computes 2 vectors at a time, and what remains at the end of each thread's share by
    another routine, which rounds differently. So it is run over a length that leaves no remainder.
    """

    def __init__(self, logits: Tensor, num_rows: int, dtype: torch.dtype) -> None:
        self.vocab_size = logits.shape[-1]
        self.max_rows = max(1, min(num_rows, BUFFER_NUMEL // self.vocab_size))
        numel = _without_remainder(self.max_rows * self.vocab_size)
        self.flat = torch.empty(numel, dtype=dtype, device=logits.device)

    def rows(self, num_rows: int) -> Tensor:
        """View (num_rows, V)."""
        return self.flat[: num_rows * self.vocab_size].view(num_rows, self.vocab_size)

    def exp2_(self, num_rows: int) -> None:
        """2 ** x in place, of the first rows and of some elements behind them."""
        torch.exp2(x := self.flat[: _without_remainder(num_rows * self.vocab_size)], out=x)


def _without_remainder(numel: int) -> int:
    """The next length that threads share in multiples of 32, two of the longest vectors."""
    num_threads = torch.get_num_threads()
    step = GRAIN if numel <= num_threads * GRAIN else 32 * num_threads
    return -(-numel // step) * step
