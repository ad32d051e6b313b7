"""What travels together, from a public function to the stages: one immutable record an idea.

Nothing here computes but `Scaling`: the one place where temperature, logit scale and softcap become
what the stages multiply by. `kernels/` imports nothing of this package; it is handed these records.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

LN2 = math.log(2.0)

Stats = Sequence[str]  # of tokens, in the order of the partials' channels


class Scaling(NamedTuple):
    """The treatment of logits: z = cap(logit_scale * x) / temperature, with
    cap(v) = softcap * tanh(v / softcap), or v without a softcap.

    The stages compute z = slope * u. With a softcap u is the capped logit; without one it is the
    logit itself, and logit_scale is part of the slope.
    """

    temperature: float
    logit_scale: float
    softcap: float | None

    @property
    def slope(self) -> float:
        """Of z in u."""
        return (1.0 if self.softcap is not None else self.logit_scale) / self.temperature

    @property
    def exponent_scale(self) -> float:
        """Slope of z / ln 2 in u: temperature, scale and the base of exp2 in one multiplication."""
        return self.slope / LN2

    def cap_(self, x: Tensor) -> Tensor:
        """Logits to u, in place."""
        if self.softcap is None:
            return x
        return x.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap)

    def chain(self, u: Tensor) -> Tensor | float:
        """du / dx."""
        if self.softcap is None:
            return 1.0
        return self.logit_scale * (1.0 - (u / self.softcap).square())


class Tokens(NamedTuple):
    """Which tokens are scored, and how much each of them counts."""

    labels: Tensor  # (B, T), int64 or int32; (N,) where a caller packs
    mask: Tensor | None  # shape of labels: weights
    cu_seqlens: Tensor | None  # (S + 1,): sequences of a batch of one, padding after the last
    shift: bool
    ignore_index: int

    def num_sequences(self, reduction: str) -> int:
        """Entries of values and lengths: none with reduction "none"."""
        if reduction == "none":
            return 0
        if self.cu_seqlens is None:
            return self.labels.shape[0]
        return self.cu_seqlens.shape[0] - 1

    def as_batch(self) -> "Tokens":
        """Packed tokens are a batch of one to the stages."""
        if self.cu_seqlens is None:
            return self
        mask = None if self.mask is None else self.mask[None]
        return self._replace(labels=self.labels[None], mask=mask)


class Columns(NamedTuple):
    """Which columns of a vocabulary are here: `width` from `first` on, of `vocab_size`."""

    first: int
    width: int
    vocab_size: int

    @classmethod
    def all_of(cls, vocab_size: int) -> "Columns":
        return cls(0, vocab_size, vocab_size)

    @property
    def is_whole(self) -> bool:
        return self.width == self.vocab_size


class VocabShard(NamedTuple):
    """Columns [start, stop) of the vocabulary: those that this rank of `group` has.

    The ranks' shards cover the vocabulary from 0 on, each column once; they may differ in width,
    and any rank may have any of them. What logits, or rows of a head, are passed with a shard
    beyond the first stop - start are padding: they are not read, and their gradient is 0.

    Args:
        start, stop: numbers of tokens, 0 <= start < stop.
        group: a process group of `torch.distributed`; None is the default group.

    Bytes that a rank sends to each other rank, of M scored tokens and its own K splits (of 16384
    columns with Triton, of a tile's from hidden states, 4096 on a CPU; the other backends take
    logits as one):

        forward     (8 K + 4) M, twice that in float64, and 4 K M more for each of `stats`
        backward    nothing for logits; from hidden states one all-reduce of 4 H M (8 H M in
                    float64), if hidden requires a gradient
        and a note of 1024 in each of these passes, and one status of 4

    On a GPU the notes are waited for, once a pass.
    """

    start: int
    stop: int
    group: ProcessGroup | None = None


class Partials(NamedTuple):
    """What the first stage says of N = B * T tokens; anything where a token is not scored."""

    sums: Tensor  # (C, K, N): peak and total of each split, then what each stat asks for
    target: Tensor  # (N,): u of the target, -inf where it is not in these columns
    weights: Tensor  # (B, T): 0 where a token is not scored

    @classmethod
    def empty(
        cls, tokens: Tokens, columns: Columns, num_splits: int, num_stats: int, dtype: torch.dtype
    ) -> "Partials":
        """Room for those of some columns: nothing is written but the -inf of absent targets."""
        labels = tokens.labels
        weights = torch.empty_like(labels, dtype=dtype, memory_format=torch.contiguous_format)
        num_tokens = labels.numel()
        target = weights.new_empty(num_tokens)
        if not columns.is_whole:
            target.fill_(-math.inf)
        return cls(weights.new_empty(2 + num_stats, num_splits, num_tokens), target, weights)

    def among(self, places: Tensor, weights: Tensor) -> "Partials":
        """Those of the M scored tokens at their places among all, of weights (B, T)."""
        channels, splits, _ = self.sums.shape
        sums = weights.new_empty(channels, splits, weights.numel())
        target = weights.new_empty(weights.numel())
        return Partials(
            sums.index_copy_(2, places, self.sums),
            target.index_copy_(0, places, self.target),
            weights,
        )


class RowSoftmax(NamedTuple):
    """What the gradient takes of each token, the rows of (4, N); anything where it is not scored.

    p[j] = share * 2 ** (u[j] * exponent_scale - reference)    of a token j that is not the target
    """

    complement: Tensor  # (N,): 1 - p[y], exact at either end
    reference: Tensor
    share: Tensor
    exponent_scale: Tensor  # that of the scaling, but for logits beyond float32's exponents


class Combined(NamedTuple):
    """What the second stage makes of partials. Only softmax is for the gradient alone: no other
    tensor shares its memory."""

    values: Tensor  # (S,): empty with reduction "none"
    lengths: Tensor  # (S,): sums of weights, likewise
    logps: Tensor  # (B, T), 0 where not scored
    softmax: Tensor  # (4, N): a RowSoftmax
    stats: Tensor  # (E, B, T), 0 where not scored

    @classmethod
    def empty(cls, weights: Tensor, num_sequences: int, num_stats: int) -> "Combined":
        """Room for those of weights (B, T)."""
        return cls(
            weights.new_empty(num_sequences),
            weights.new_empty(num_sequences),
            torch.empty_like(weights),
            weights.new_empty(4, weights.numel()),
            weights.new_empty(num_stats, *weights.shape),
        )


class Scored(NamedTuple):
    """What the third stage knows of the tokens."""

    labels: Tensor  # (B, T)
    weights: Tensor  # (B, T): 0 where a token is not scored
    shift: bool


class Backend(NamedTuple):
    """The three stages on a kind of device; `kernels/` says what each of them takes and writes."""

    name: str
    partials: Callable[[Tensor, Tokens, Columns, Scaling, Stats, Partials], None]
    combine: Callable[[Partials, Tensor | None, str, int, Scaling, Stats, Combined], None]
    grad: Callable[[Tensor, Tensor, Scored, Tensor, Columns, Scaling, Tensor | None], Tensor]
    num_splits: Callable[[int], int]  # columns -> K, entries of the partials of each token
    tile_width: int  # columns of a head's tile: a constant, so that a row's bits stay its own
    # Tokens, weights, vocab_size: raises what is wrong with values, if they may be waited for.
    check: Callable[[Tokens, Tensor, int], None]


class Request(NamedTuple):
    """What is asked of a call, checked, as the stages take it."""

    scaling: Scaling
    symbols: Tensor | None  # the scaling's numbers where a graph does not know them
    reduction: str  # "mean", "sum", or "none"
    stats: Stats
    wants_lengths: bool
    wants_logps: bool
    backend: str  # as it was asked for: the operators resolve it


class Scores(NamedTuple):
    """What a public function returns, before its stats get their names."""

    result: Tensor  # (S,), or (B, T) with reduction "none"; the one that is differentiable
    lengths: Tensor | None  # (S,), a copy that nobody else reads
    logps: Tensor | None  # (B, T)
    stats: Tensor | None  # (E, B, T)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of weights, partials and results, for logits or products of dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32
