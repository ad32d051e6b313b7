"""How the stages walk the logits: scored rows, as many at a time as fit a buffer."""

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

Places = slice | Tensor  # of R rows: neighbours are a slice, which needs no copy, others (R,)


def exponent_scale(scaling: Scaling, dtype: torch.dtype) -> float:
    """The scaling's, as a number of dtype: all three stages must use the same."""
    scale = scaling.exponent_scale
    return scale if dtype == torch.float64 else float(np.float32(scale))


def row_grid(x: Tensor) -> Tensor:
    """View (B, T, V) as (1, B * T, V) where strides allow: fewer groups of rows."""
    batch, seq_len, vocab_size = x.shape
    if seq_len == 1:
        return x.transpose(0, 1)
    if batch == 1 or x.stride(0) == seq_len * x.stride(1):
        return x.view(1, batch * seq_len, vocab_size)
    return x


def own_columns(labels: Tensor, first_column: int, num_columns: int) -> Tensor:
    """Labels (M,) as columns (M, 1) of those from first_column on: -1 if before them, num_columns
    if after."""
    return (labels.long()[:, None] - first_column).clamp_(-1, num_columns)


class Workspace:
    """Room for some rows in float32 (or float64), from logits to exponentials.

    PyTorch runs an elementwise operation two vectors at a time, and what remains at the end of a
    row, or of a thread's share, through scalar code that rounds differently. So rows are padded to
    a length, and blocks to a number of rows, that leave no remainder: a row's bits are then its
    own. Padding is computed and never read.
    """

    def __init__(self, logits: Tensor, rows: Tensor, dtype: torch.dtype) -> None:
        num_threads = torch.get_num_threads()
        self.grid, self.rows = row_grid(logits), rows
        self.num_columns = logits.shape[-1]
        # One column more at least: it takes what is written to a target in other columns.
        step = 2 * LONGEST_VECTOR * num_threads
        pitch = -(-(self.num_columns + 1) // step) * step
        self.max_rows = max(1, min(len(rows), BUFFER_NUMEL // pitch))
        self.min_rows = -(-num_threads * GRAIN // pitch)  # below that, not all threads take part
        shape = (max(self.max_rows, self.min_rows), pitch)
        self.padded = torch.empty(shape, dtype=dtype, device=logits.device)

    def blocks(self) -> Iterator[tuple[slice, int, Places]]:
        """Which of the rows, their group in the grid, and their places in it."""
        height = self.grid.shape[1]
        ends = torch.searchsorted(
            self.rows, torch.arange(1, len(self.grid) + 1, device=self.rows.device) * height
        )
        first = 0
        for g, end in enumerate(ends.tolist()):
            for start in range(first, end, self.max_rows):
                here = slice(start, min(start + self.max_rows, end))
                places = self.rows[here] - g * height
                low, high = places[[0, -1]].tolist()
                are_neighbours = high - low + 1 == len(places)
                yield here, g, slice(low, high + 1) if are_neighbours else places
            first = end

    def load(self, g: int, places: Places, scaling: Scaling) -> Tensor:
        """Fill with u of a group's rows, and return them without their padding, (R, V)."""
        x = self.grid[g][places]
        u = self.padded[: len(x), : self.num_columns]
        u.copy_(x)
        scaling.cap_(self.block(len(u)))
        return u

    def to_exponents_(self, offsets: Tensor, scale: float) -> None:
        """The first R rows from u to scale * u + offsets (R, 1), rounded once."""
        block = self.block(len(offsets))
        padding = offsets.new_zeros(max(0, self.min_rows - len(offsets)), 1)
        torch.add(torch.cat([offsets, padding]), block, alpha=scale, out=block)

    def block(self, num_rows: int) -> Tensor:
        """The first rows with all padding, which no operation takes apart."""
        return self.padded[: max(num_rows, self.min_rows)]

    def fill_target_(self, y: Tensor, value: float | Tensor) -> None:
        """Write value, or values (R, 1), to column y[r] of each of the first R rows; for a target
        in other columns, to padding."""
        self.padded[: len(y)].scatter_(1, y % self.padded.shape[1], value)
