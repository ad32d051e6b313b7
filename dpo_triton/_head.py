"""The head in tiles: products of hidden states and weight around the three stages, as the operators
`linear_partials` and `linear_grad`.

A tile is the logits of some scored rows and TILE_V columns. Columns are walked outside and rows
inside, so that the weight is read once, its gradient is written once, and what is summed over tiles
is no larger than the hidden states. Rows that are not scored are dropped first.

    forward     tile = hidden @ weight[columns].T -> partials -> combine
    backward    tile again, unless it was kept    -> grad -> three products:
                d hidden += d @ weight[columns]     d weight[columns] = d.T @ hidden

Of a head that does not train the gradient of hidden is made in the forward pass, up to the factor
of each token that only the backward pass knows. A row's total is not known yet when its tile is
there, so that sums are relative to the total so far, as in FlashAttention (Dao et al. 2022,
arXiv:2205.14135), and the target's column is left out of them: its part keeps its digits.

    d logp[n] / d hidden[n] = slope * ((1 - p[n, y]) * weight[y]
                                       - sum over j != y of p[n, j] * weight[j])
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._backends import Backend, resolve_backend
from ._checks import check_cu_seqlens_values, check_scored_labels
from ._ops import NAMESPACE, SCALING, forbid_double_backward
from ._weights import token_weights

# Columns of a tile: a constant, so that a row's sums end where they do in any other batch. Wide
# enough for a matrix product, and so narrow that thousands of rows fit into a tile.
TILE_V = 4096
# Unnormalised probabilities, times dz / dx over its largest, reach up to this: the middle of
# float16's range.
UNIT = 2.0**10


class Scaling(NamedTuple):
    """From logits to z = slope * u, as in the stages."""

    temperature: float
    logit_scale: float
    softcap: float | None

    @property
    def slope(self) -> float:
        return (1.0 if self.softcap is not None else self.logit_scale) / self.temperature

    @property
    def steepest(self) -> float:
        """The largest dz / dx."""
        return self.logit_scale / self.temperature

    def gradient(self, u: Tensor) -> Tensor | float:
        """dz / dx."""
        if self.softcap is None:
            return self.steepest
        return self.steepest * (1.0 - (u / self.softcap).square())


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


_PRODUCTS = "Tensor hidden, Tensor weight, Tensor? bias"
_PARTIALS = (
    f"({_PRODUCTS}, Tensor labels, Tensor? mask, Tensor? cu_seqlens, bool shift, "
    f"int ignore_index, {SCALING}, str[] stats, ScalarType dtype, int tile_bytes, "
    "bool keep_tiles, bool make_grad, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_GRAD = (
    f"(Tensor grad_logps, {_PRODUCTS}, Tensor labels, Tensor weights, Tensor complement, "
    f"Tensor reference, Tensor share, Tensor kept, Tensor unit_grad, bool shift, {SCALING}, "
    "ScalarType dtype, int tile_bytes, bool[] needs, str backend) -> (Tensor, Tensor, Tensor)"
)


@torch.library.custom_op(f"{NAMESPACE}::linear_partials", mutates_args=(), schema=_PARTIALS)
def linear_partials(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    shift: bool,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    stats: Sequence[str],
    dtype: torch.dtype,
    tile_bytes: int,
    keep_tiles: bool,
    make_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Partials (C, K, N), targets (N,) and weights (B, T) as those of `partials`; logits that
    linear_grad need not make again, flat; with make_grad d logp / d hidden, (N, H), else empty."""
    return head_partials(
        hidden,
        weight,
        bias,
        labels,
        mask,
        cu_seqlens,
        shift,
        ignore_index,
        temperature,
        logit_scale,
        softcap,
        stats,
        dtype,
        tile_bytes,
        keep_tiles,
        make_grad,
        backend,
        columns=Columns(0, weight.shape[0], weight.shape[0]),
        gather=lambda partials, target: (partials, target),
    )


def head_partials(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    shift: bool,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    stats: Sequence[str],
    dtype: torch.dtype,
    tile_bytes: int,
    keep_tiles: bool,
    make_grad: bool,
    backend: str,
    *,
    columns: Columns,
    gather: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`linear_partials` of some columns: `gather` makes of their partials (C, K, M) and targets
    (M,) those of the whole vocabulary, and d logp / d hidden is these columns' part of it."""
    scaling = Scaling(temperature, logit_scale, softcap)
    stages = resolve_backend(backend, hidden.device, dtype)
    first_column, num_columns, vocab_size = columns
    if stages.checks_values and cu_seqlens is not None:
        check_cu_seqlens_values(cu_seqlens, labels.numel())
    weights = token_weights(labels, mask, cu_seqlens, shift, ignore_index, _sum_dtype(dtype))
    if stages.checks_values:
        check_scored_labels(labels, weights, vocab_size, cu_seqlens is not None)
    rows = _scored_rows(hidden, labels, weights, shift, dtype)
    num_rows, num_tokens = len(rows.tokens), labels.numel()
    kept = hidden.new_empty(
        kept_numel(num_tokens, num_columns, tile_bytes, dtype) if keep_tiles else 0, dtype=dtype
    )
    partials = weights.new_empty((2 + len(stats), num_splits(num_columns), num_rows))
    target = torch.full_like(rows.weights, -torch.inf)
    sums = _HiddenGrad(rows, scaling, stages, columns) if make_grad else None
    for tile in Tiles(num_rows, num_columns, tile_bytes, kept, dtype):
        _logits_(tile, rows, weight, bias)
        here, of_tile, _ = stages.partials(
            tile.logits[None],
            rows.labels[None, tile.rows],
            rows.weights[None, tile.rows],
            None,
            False,
            ignore_index,
            first_column + tile.columns.start,
            vocab_size,
            *scaling,
            stats,
        )
        partials[:, tile.split, tile.rows] = here[:, 0]
        target[tile.rows] = torch.maximum(target[tile.rows], of_tile)  # NaN stays
        if sums is not None:
            sums.add(tile, here, weight)
    partials, target = gather(partials, target)
    unit_grad = weights.new_empty(0)
    if sums is not None:
        unit_grad = weights.new_zeros(num_tokens, hidden.shape[-1])
        unit_grad.index_copy_(0, rows.places, sums.finish(partials[:2], target, weight))
    return (
        partials.new_empty((*partials.shape[:2], num_tokens)).index_copy_(2, rows.tokens, partials),
        target.new_empty(num_tokens).index_copy_(0, rows.tokens, target),
        weights,
        kept,
        unit_grad,
    )


@linear_partials.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    shift: bool,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    stats: Sequence[str],
    dtype: torch.dtype,
    tile_bytes: int,
    keep_tiles: bool,
    make_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_tokens, vocab_size = labels.numel(), weight.shape[0]
    num_kept = kept_numel(num_tokens, vocab_size, tile_bytes, dtype) if keep_tiles else 0
    weights = labels.new_empty(labels.shape, dtype=_sum_dtype(dtype))
    return (
        weights.new_empty((2 + len(stats), num_splits(vocab_size), num_tokens)),
        weights.new_empty(num_tokens),
        weights,
        hidden.new_empty(num_kept, dtype=dtype),
        weights.new_empty((num_tokens, hidden.shape[-1]) if make_grad else 0),
    )


@torch.library.custom_op(f"{NAMESPACE}::linear_grad", mutates_args=(), schema=_GRAD)
def linear_grad(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    complement: Tensor,
    reference: Tensor,
    share: Tensor,
    kept: Tensor,
    unit_grad: Tensor,
    shift: bool,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    dtype: torch.dtype,
    tile_bytes: int,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, each empty if `needs` does not ask for it.

    grad_logps is (B, T), of any strides, and not read where a token is not scored.
    """
    return head_grad(
        grad_logps,
        hidden,
        weight,
        bias,
        labels,
        weights,
        complement,
        reference,
        share,
        kept,
        unit_grad,
        shift,
        temperature,
        logit_scale,
        softcap,
        dtype,
        tile_bytes,
        needs,
        backend,
        columns=Columns(0, weight.shape[0], weight.shape[0]),
        sum_=None,
    )


def head_grad(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    complement: Tensor,
    reference: Tensor,
    share: Tensor,
    kept: Tensor,
    unit_grad: Tensor,
    shift: bool,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    dtype: torch.dtype,
    tile_bytes: int,
    needs: Sequence[bool],
    backend: str,
    *,
    columns: Columns,
    sum_: Callable[[Tensor], None] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_grad` of some columns: `sum_` adds to the gradient of the scored hidden states
    (M, H), in place, what the other columns say of it, before it is rounded."""
    needs_hidden, needs_weight, needs_bias = needs
    grad_hidden = hidden.new_zeros(hidden.shape if needs_hidden else 0)
    grad_weight = torch.empty_like(weight) if needs_weight else weight.new_empty(0)
    grad_bias = weight.new_zeros(weight.shape[0] if needs_bias else 0, dtype=weights.dtype)

    def bias_result() -> Tensor:
        return grad_bias if bias is None else grad_bias.to(bias.dtype)

    if unit_grad.numel() > 0:
        coefficient = torch.where(weights != 0, grad_logps * weights, 0.0).flatten()
        # The first token is never scored by a shift: it leaves its 0 to the last hidden state.
        coefficient = coefficient.roll(-int(shift))[:, None]
        flat_grad = grad_hidden.view(unit_grad.shape)
        if sum_ is None:
            torch.mul(unit_grad, coefficient, out=flat_grad)
        else:
            places = weights.flatten().nonzero().squeeze(1) - int(shift)
            hidden_sum = unit_grad.index_select(0, places).mul_(coefficient[places])
            sum_(hidden_sum)
            flat_grad.index_copy_(0, places, hidden_sum.to(hidden.dtype))
        return grad_hidden, grad_weight, bias_result()

    stages = resolve_backend(backend, hidden.device, dtype)
    rows = _scored_rows(hidden, labels, weights, shift, dtype)
    num_rows = len(rows.tokens)
    if num_rows == 0:
        return grad_hidden, grad_weight.zero_(), bias_result()
    of_rows = [x.reshape(-1)[rows.tokens] for x in (grad_logps, complement, reference, share)]
    tiles = Tiles(num_rows, columns.width, tile_bytes, kept, dtype)
    hidden_sum = rows.hidden.new_empty(
        rows.hidden.shape if needs_hidden else 0, dtype=weights.dtype
    )
    # Several tiles of rows are summed in float32, a single one is rounded once by its product.
    is_once = tiles.num_blocks == 1 and weight.dtype == dtype
    is_direct = is_once or weight.dtype == weights.dtype
    weight_sum = weight.new_empty(
        0 if is_direct or not needs_weight else (tiles.width, weight.shape[1]), dtype=weights.dtype
    )
    for tile in tiles:
        if not tile.is_kept:
            _logits_(tile, rows, weight, bias)
        upstream, *of_tile = (x[tile.rows] for x in of_rows)
        d = tiles.room_like(tile)
        stages.grad(
            upstream[None],
            tile.logits[None],
            rows.labels[None, tile.rows],
            rows.weights[None, tile.rows],
            *of_tile,
            False,
            columns.first + tile.columns.start,
            temperature,
            logit_scale,
            softcap,
            out=d[None],
        )
        is_first = tile.rows.start == 0
        if needs_hidden:
            of_columns = weight[tile.columns].to(dtype)
            _add_product(hidden_sum[tile.rows], d, of_columns, tile.split == 0)
        if needs_weight:
            place = grad_weight[tile.columns]
            total = place if is_direct else weight_sum[: len(place)]
            _add_product(total, d.t(), rows.hidden[tile.rows], is_first)
            if not is_direct and tile.rows.stop == num_rows:
                place.copy_(total)
        if needs_bias:
            grad_bias[tile.columns] += d.sum(0, dtype=weights.dtype)
    if needs_weight:
        grad_weight[columns.width :] = 0
    if needs_hidden:
        if sum_ is not None:
            sum_(hidden_sum)
        grad_hidden.view(-1, hidden.shape[-1]).index_copy_(
            0, rows.places, hidden_sum.to(hidden.dtype)
        )
    return grad_hidden, grad_weight, bias_result()


@linear_grad.register_fake
def _(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *inputs: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    needs_hidden, needs_weight, needs_bias = inputs[-2]
    bias_dtype = inputs[1].dtype if bias is None else bias.dtype
    return (
        hidden.new_empty(hidden.shape if needs_hidden else 0),
        torch.empty_like(weight) if needs_weight else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if needs_bias else 0, dtype=bias_dtype),
    )


forbid_double_backward(f"{NAMESPACE}::linear_grad")


class _HiddenGrad:
    """d logp / d hidden of the scored rows, tile by tile; overwrites the tiles."""

    def __init__(self, rows: Rows, scaling: Scaling, stages: Backend, columns: Columns) -> None:
        self.rows, self.scaling, self.stages, self.columns = rows, scaling, stages, columns
        self.sum = torch.zeros_like(rows.hidden, dtype=rows.weights.dtype)
        # log2 of the largest split's total: what the sum is relative to.
        self.reference = torch.full_like(rows.weights, -(2.0**100))
        self.ones = torch.ones_like(rows.weights)

    def add(self, tile: Tile, partials: Tensor, weight: Tensor) -> None:
        """Add the columns of a tile, whose partials are (C, 1, R); the target's is left out."""
        peak, total = partials[:2, 0]
        reference = self.reference[tile.rows]
        log2_total = peak * (self.scaling.slope / math.log(2.0)) + total.log2()
        larger = torch.maximum(reference, log2_total)
        total_sum = self.sum[tile.rows]
        total_sum.mul_((reference - larger).exp2_()[:, None])
        reference.copy_(larger)
        ones = self.ones[tile.rows]
        self.stages.grad(
            ones[None] / self.scaling.steepest,
            tile.logits[None],
            self.rows.labels[None, tile.rows],
            ones[None],
            torch.zeros_like(ones),
            larger,
            ones * UNIT,
            False,
            self.columns.first + tile.columns.start,
            *self.scaling,
            out=tile.logits[None],
        )
        _add_product(total_sum, tile.logits, weight[tile.columns].to(tile.logits.dtype), False)

    def finish(self, partials: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """(M, H), from the partials (2, K, M) and targets (M,) of the whole vocabulary."""
        first, num_columns, vocab_size = self.columns
        _, _, _, complement, reference, share, _ = self.stages.combine(
            partials, target, self.ones[None], None, "none", vocab_size, *self.scaling, []
        )
        normaliser = share * (self.reference - reference).exp2() * (self.scaling.steepest / UNIT)
        of_target = complement * self.scaling.gradient(target)
        y = self.rows.labels.long() - first
        of_target.masked_fill_((y < 0) | (y >= num_columns), 0.0)  # others have it
        of_target = of_target[:, None] * weight[y.clamp(0, num_columns - 1)].to(
            self.rows.hidden.dtype
        )
        return self.sum.mul_(normaliser[:, None]).add_(of_target)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of what the products of dtype are summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scored_rows(
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


def _logits_(tile: Tile, rows: Rows, weight: Tensor, bias: Tensor | None) -> None:
    """Fill the tile with the logits of its rows and columns."""
    dtype = tile.logits.dtype
    hidden, of_columns = rows.hidden[tile.rows], weight[tile.columns].to(dtype).t()
    if bias is None:
        torch.mm(hidden, of_columns, out=tile.logits)
    else:
        torch.addmm(bias[tile.columns].to(dtype), hidden, of_columns, out=tile.logits)


def _add_product(total: Tensor, a: Tensor, b: Tensor, is_first: bool) -> None:
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
