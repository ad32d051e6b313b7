"""How scored rows and columns are cut into tiles, where tiles are, and their products."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Columns of a tile: a constant, so that a row's sums end where they do in any other batch. Wide
# enough for a matrix product, and so narrow that thousands of rows fit into a tile.
TILE_V = 4096


class Columns(NamedTuple):
    """Which columns of a vocabulary a head makes: `width` from `first` on, of `vocab_size`. What
    rows its weight has beyond them are padding."""

    first: int
    width: int
    vocab_size: int


class Rows(NamedTuple):
    """What belongs to the M scored tokens."""

    tokens: Tensor  # (M,) int64: their places among labels
    places: Tensor  # (M,) int64: those of the hidden states that score them
    hidden: Tensor  # (M, H) in the dtype of the products
    labels: Tensor  # (M,)
    weights: Tensor  # (M,)


class Tile(NamedTuple):
    split: int  # which columns, counted
    columns: slice
    rows: slice
    logits: Tensor  # (R, C): room for them, not filled yet
    is_kept: bool  # from the forward pass to the backward


class Tiles:
    """The walk over the tiles of M rows, and the memory that they take.

    They share one room (`scratch`), except for the last ones, which `kept` has room for: those of a
    small batch are all there in the backward pass, those of a large one are made again.
    """

    def __init__(
        self, num_rows: int, vocab_size: int, tile_bytes: int, kept: Tensor, dtype: torch.dtype
    ) -> None:
        self.num_rows, self.vocab_size, self.kept = num_rows, vocab_size, kept
        self.width = min(TILE_V, vocab_size)
        self.num_splits = num_splits(vocab_size)
        self.num_blocks = -(-num_rows // rows_in(tile_bytes, vocab_size, dtype))
        # Blocks of one height: a product of the few rows that were left would be slow.
        self.height = -(-num_rows // max(1, self.num_blocks))
        self.scratch = torch.empty(self.height * self.width, dtype=dtype, device=kept.device)

    def __iter__(self) -> Iterator[Tile]:
        remaining, offset = self.num_rows * self.vocab_size, 0
        for split in range(self.num_splits):
            columns = slice(split * TILE_V, min((split + 1) * TILE_V, self.vocab_size))
            for block in range(self.num_blocks):
                rows = slice(block * self.height, min((block + 1) * self.height, self.num_rows))
                is_kept = remaining <= self.kept.numel()
                room = _room(self.kept[offset:] if is_kept else self.scratch, rows, columns)
                yield Tile(split, columns, rows, room, is_kept)
                remaining -= room.numel()
                offset += room.numel() * is_kept

    def room_like(self, tile: Tile) -> Tensor:
        """(R, C) that no tile is kept in."""
        return _room(self.scratch, tile.rows, tile.columns)


def _room(flat: Tensor, rows: slice, columns: slice) -> Tensor:
    shape = (rows.stop - rows.start, columns.stop - columns.start)
    return flat[: shape[0] * shape[1]].view(shape)


def rows_in(tile_bytes: int, vocab_size: int, dtype: torch.dtype) -> int:
    """Rows of a tile that takes no more than tile_bytes, at least one."""
    return max(1, tile_bytes // (min(TILE_V, vocab_size) * dtype.itemsize))


def num_splits(vocab_size: int) -> int:
    """Entries of the partials for each token."""
    return -(-vocab_size // TILE_V)


def kept_numel(num_tokens: int, vocab_size: int, tile_bytes: int, dtype: torch.dtype) -> int:
    """Logits to keep for the backward pass: what tile_bytes leave beside one tile."""
    height = min(num_tokens, rows_in(tile_bytes, vocab_size, dtype))
    room = tile_bytes // dtype.itemsize - height * min(TILE_V, vocab_size)
    return max(0, min(room, num_tokens * vocab_size))


def scored_rows(
    hidden: Tensor, labels: Tensor, weights: Tensor, shift: bool, dtype: torch.dtype
) -> Rows:
    """The scored tokens. Their number is a shape: a GPU is waited for here."""
    tokens = weights.flatten().nonzero().squeeze(1)
    places = tokens - int(shift)
    return Rows(
        tokens,
        places,
        hidden.reshape(-1, hidden.shape[-1]).index_select(0, places).to(dtype),
        labels.flatten().index_select(0, tokens),
        weights.flatten().index_select(0, tokens),
    )


def fill_(tile: Tile, rows: Rows, weight: Tensor, bias: Tensor | None) -> None:
    """Fill the tile with the logits of its rows and columns."""
    dtype = tile.logits.dtype
    hidden, of_columns = rows.hidden[tile.rows], weight[tile.columns].to(dtype).t()
    if bias is None:
        torch.mm(hidden, of_columns, out=tile.logits)
    else:
        torch.addmm(bias[tile.columns].to(dtype), hidden, of_columns, out=tile.logits)


def add_product(total: Tensor, a: Tensor, b: Tensor, is_first: bool) -> None:
    """total = a @ b if it is the first, total += a @ b if it is not; total may be float32 for
    16-bit factors. A CPU's product of those is rounded to 16 bits before it is added."""
    if a.dtype == total.dtype:
        if is_first:
            torch.mm(a, b, out=total)
        else:
            torch.addmm(total, a, b, out=total)
        return
    if a.is_cuda and torch.version.hip is None:
        product = torch.mm(a, b, out_dtype=total.dtype)
    else:
        product = torch.mm(a, b)
    if is_first:
        total.copy_(product)
    else:
        total.add_(product)
