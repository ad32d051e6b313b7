"""How the stages walk the logits: rows in blocks that fit a buffer; the scale of exponents."""

import itertools
import math
import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .._records import Scaling

# Elements of the buffer, 6.5 MiB of float32: enough to hide the cost of starting an operation.
BUFFER_NUMEL = 13 << 17
# PyTorch gives a thread at least so many elements (at::internal::GRAIN_SIZE) ...
GRAIN = 32768
# ... and its vectors hold at most so many float32 (AVX-512).
LONGEST_VECTOR = 16

Run = tuple[int, int]  # first row, number of rows


def exponent_scale(scaling: Scaling, dtype: torch.dtype) -> float:
    """The scaling's, as a number of dtype: all three stages must use the same."""
    scale = scaling.exponent_scale
    return scale if dtype == torch.float64 else float(np.float32(scale))


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


def split_like(x: Tensor, parts: list[Tensor]) -> tuple[Tensor, ...]:
    """Views of (R, V) with as many rows each as the parts have."""
    return torch.split_with_sizes(x, [len(part) for part in parts])


def own_columns(labels: Tensor, first_column: int, num_columns: int) -> Tensor:
    """Labels (M,) as columns (M, 1) of those from first_column on: -1 if before them, num_columns
    if after."""
    return (labels.long()[:, None] - first_column).clamp_(-1, num_columns)


class Workspace:
    """The rows of a block in float32 (or float64), from logits to exponentials.

    PyTorch runs an elementwise operation two vectors at a time, and what remains at the end of a
    row, or of a thread's share, through scalar code that rounds differently: its multiply-add is
    not fused, its exp2 another. So rows are padded to a length, and blocks to a number of rows,
    that leave no remainder: a row's bits are then its own. Padding is computed and never read.
    """

    def __init__(self, logits: Tensor, num_rows: int, dtype: torch.dtype) -> None:
        num_threads = torch.get_num_threads()
        self.num_columns = logits.shape[-1]
        # One column more at least: it takes what is written to a target in other columns.
        pitch = _round_up(self.num_columns + 1, 2 * LONGEST_VECTOR * num_threads)
        self.max_rows = max(1, min(num_rows, BUFFER_NUMEL // pitch))
        self.min_rows = -(-num_threads * GRAIN // pitch)  # below that, not all threads take part
        shape = (max(self.max_rows, self.min_rows), pitch)
        self.padded = _kept_buffer(math.prod(shape), dtype, logits.device).view(shape)

    def load(self, grid: Tensor, runs: list[Run], scaling: Scaling) -> Tensor:
        """Fill with u of the runs' rows, and return them as a view (R, V)."""
        sources = views(grid, runs)
        u = self.rows(sum(length for _, length in runs))
        for source, place in zip(sources, split_like(u, sources), strict=True):
            place.copy_(source)
        scaling.cap_(self.block(len(u)))
        return u

    def rows(self, num_rows: int) -> Tensor:
        """The first rows without their padding, (R, V)."""
        return self.padded[:num_rows, : self.num_columns]

    def block(self, num_rows: int) -> Tensor:
        """The first rows with all padding."""
        return self.padded[: max(num_rows, self.min_rows)]

    def to_exponents(self, num_rows: int, offsets: Tensor, scale: float) -> None:
        """u to scale * u + offset, rounded once; offsets (>= R, 1) are `pad`'s."""
        block = self.block(num_rows)
        torch.add(offsets[: len(block)], block, alpha=scale, out=block)

    def exp2_(self, num_rows: int) -> None:
        """Exponents to exponentials."""
        self.block(num_rows).exp2_()

    def fill_target_(self, y: Tensor, value: float | Tensor) -> None:
        """Write value, or values (R, 1), to column y[r] of each of the first R rows; for a target
        in other columns, to padding."""
        self.padded[: len(y)].scatter_(1, y % self.padded.shape[1], value)

    def pad(self, offsets: Tensor) -> Tensor:
        """(M, 1), with as many more as the padding of the last block takes."""
        return torch.cat([offsets, offsets.new_zeros(self.min_rows, 1)])


class _Kept(threading.local):
    """Buffers of this thread: fresh ones would cost their page faults again in every call."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}


_kept = _Kept()


def _kept_buffer(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A view (numel,) of the thread's buffer, which holds whatever it last did."""
    buffer = _kept.buffers.get((dtype, device))
    if buffer is None or buffer.numel() < numel:
        with torch.inference_mode(False):  # else it could not be written to outside of it
            buffer = torch.zeros(numel, dtype=dtype, device=device)
        _kept.buffers[dtype, device] = buffer
    return buffer[:numel]


def exponent_error(peak: Tensor, scale: float) -> Tensor:
    """How far the rounded scale * peak, which exponents are relative to, is above the exact one."""
    return (peak * scale).double() - peak.double() * scale


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step
