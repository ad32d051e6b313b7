"""How scored rows and columns are cut into tiles, where tiles are, and their products."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._backends import backend_named
from .._records import Columns, Partials, Tokens


class Weights(NamedTuple):
    """What the logits are made of: hidden @ weight.T + bias."""

    hidden: Tensor  # (B, T, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)


class Plan(NamedTuple):
    """How the two passes of a call go."""

    dtype: torch.dtype  # of the products, and so of the logits
    tile_bytes: int  # memory for logits
    needs: tuple[bool, bool, bool]  # whether hidden, weight and bias require a gradient
    backend: str

    @property
    def head_trains(self) -> bool:
        return self.needs[1] or self.needs[2]

    @property
    def makes_grad(self) -> bool:
        """Whether the gradient of hidden is made in the forward pass."""
        return self.needs[0] and not self.head_trains

    def tile_width(self, num_columns: int) -> int:
        return min(backend_named(self.backend).tile_width, num_columns)

    def rows_in(self, num_columns: int) -> int:
        """Rows of a tile that takes no more than tile_bytes, at least one."""
        return max(1, self.tile_bytes // (self.tile_width(num_columns) * self.dtype.itemsize))

    def kept_numel(self, num_tokens: int, num_columns: int) -> int:
        """Logits to keep for the backward pass: what tile_bytes leave beside one tile."""
        if not self.head_trains:
            return 0
        height = min(num_tokens, self.rows_in(num_columns))
        room = self.tile_bytes // self.dtype.itemsize - height * self.tile_width(num_columns)
        return max(0, min(room, num_tokens * num_columns))

    def num_splits(self, num_columns: int) -> int:
        """Entries of the partials for each token: those of all tiles."""
        width, splits = self.tile_width(num_columns), backend_named(self.backend).num_splits
        whole, rest = divmod(num_columns, width)
        return whole * splits(width) + (splits(rest) if rest else 0)


class Rows(NamedTuple):
    """What belongs to the M scored tokens."""

    tokens: Tensor  # (M,) int64: their places among labels
    places: Tensor  # (M,) int64: those of the hidden states that score them
    hidden: Tensor  # (M, H) in the dtype of the products
    labels: Tensor  # (1, M)
    weights: Tensor  # (1, M)

    @property
    def number(self) -> int:
        return self.tokens.shape[0]

    def as_tokens(self, rows: slice) -> Tokens:
        """Some of them, as the first stage takes them."""
        return Tokens(self.labels[:, rows], self.weights[:, rows], None, False, -1)


def scored_rows(hidden: Tensor, labels: Tensor, weights: Tensor, shift: bool, plan: Plan) -> Rows:
    """The scored tokens. Their number is a shape: a GPU is waited for here."""
    tokens = weights.flatten().nonzero().squeeze(1)
    places = tokens - int(shift)
    return Rows(
        tokens,
        places,
        hidden.reshape(-1, hidden.shape[-1]).index_select(0, places).to(plan.dtype),
        labels.flatten().index_select(0, tokens)[None],
        weights.flatten().index_select(0, tokens)[None],
    )


class Tile(NamedTuple):
    columns: slice
    rows: slice
    splits: slice  # of the partials
    logits: Tensor  # (1, R, C): room for them, not filled yet
    matrix: Tensor  # (R, C), the same
    is_kept: bool  # from the forward pass to the backward


class Tiles:
    """The walk over the tiles of M rows, and the memory that they take.

    They share one room (`scratch`), except for the last ones, which `kept` has room for: those of a
    small batch are all there in the backward pass, those of a large one are made again.
    """

    def __init__(self, num_rows: int, num_columns: int, plan: Plan, kept: Tensor) -> None:
        self.num_rows, self.num_columns, self.kept = num_rows, num_columns, kept
        self.splits = backend_named(plan.backend).num_splits
        self.width = plan.tile_width(num_columns)
        num_blocks = -(-num_rows // plan.rows_in(num_columns))
        # Blocks of one height: a product of the few rows that were left would be slow.
        height = max(1, -(-num_rows // max(1, num_blocks)))
        self.blocks = [slice(lo, min(lo + height, num_rows)) for lo in range(0, num_rows, height)]
        self.scratch = torch.empty(height * self.width, dtype=plan.dtype, device=kept.device)
        self._rooms: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def __iter__(self) -> Iterator[Tile]:
        remaining, offset, first_split = self.num_rows * self.num_columns, 0, 0
        for start in range(0, self.num_columns, self.width):
            columns = slice(start, min(start + self.width, self.num_columns))
            num_splits = self.splits(columns.stop - start)
            splits = slice(first_split, first_split + num_splits)
            first_split += num_splits
            for rows in self.blocks:
                shape = (rows.stop - rows.start, columns.stop - columns.start)
                is_kept = remaining <= self.kept.numel()
                room = _room(self.kept[offset:], *shape) if is_kept else self._scratch_room(*shape)
                yield Tile(columns, rows, splits, *room, is_kept)
                numel = shape[0] * shape[1]
                remaining -= numel
                offset += numel * is_kept

    def room_like(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """(1, R, C) and (R, C), the same, that no tile is kept in."""
        return self._scratch_room(*tile.matrix.shape)

    def _scratch_room(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Most tiles have one shape, and views of it take the host as long as their product."""
        if (height, width) not in self._rooms:
            self._rooms[height, width] = _room(self.scratch, height, width)
        return self._rooms[height, width]


def _room(flat: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    matrix = flat[: height * width].view(height, width)
    return matrix.unsqueeze(0), matrix


def columns_of(tile: Tile, columns: Columns) -> Columns:
    """Those of the vocabulary that a tile has."""
    width = tile.columns.stop - tile.columns.start
    return Columns(columns.first + tile.columns.start, width, columns.vocab_size)


def rows_of(partials: Partials, rows: slice) -> Partials:
    """Those of some rows."""
    sums, target, weights = partials
    return Partials(sums[:, :, rows], target[rows], weights[:, rows])


def fill_(tile: Tile, hidden: Tensor, head: Weights) -> None:
    """Fill the tile with the logits of its rows and columns; hidden is (M, H)."""
    logits = tile.matrix
    rows, of_columns = hidden[tile.rows], head.weight[tile.columns].to(logits.dtype).t()
    if head.bias is None:
        torch.mm(rows, of_columns, out=logits)
    else:
        torch.addmm(head.bias[tile.columns].to(logits.dtype), rows, of_columns, out=logits)


def add_product(total: Tensor, a: Tensor, b: Tensor, is_first: bool) -> None:
    """total = a @ b if it is the first, total += a @ b if it is not; total may be float32 for
    16-bit factors. A product of those is rounded to bfloat16 before it is added on a CPU, and on an
    AMD GPU, whose PyTorch has no `out_dtype`; float16, whose range it may leave, is widened there.
    """
    has_out_dtype = a.is_cuda and torch.version.hip is None
    if a.dtype == torch.float16 and not has_out_dtype:
        a, b = a.to(total.dtype), b.to(total.dtype)
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=0.0 if is_first else 1.0, out=total)
    elif has_out_dtype:
        if is_first:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif is_first:
        total.copy_(torch.mm(a, b))
    else:
        total.add_(torch.mm(a, b))
