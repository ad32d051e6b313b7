"""The other ranks of a call, for what lies between its stages."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .._head.backward import Sum
from .._records import Columns, Combined, Partials, Tokens, VocabShard
from .._weights import token_weights
from ._exchange import Exchange


class Peers:
    """The other ranks of one call of a public function, for what lies between its stages."""

    def __init__(self, shard: VocabShard | None, sequence_group: ProcessGroup | None) -> None:
        if torch.compiler.is_compiling():
            raise NotImplementedError(
                "vocab_shard and sequence_group cannot be compiled; "
                "call the function under torch.compiler.disable"
            )
        if shard is not None and not isinstance(shard, VocabShard):
            raise TypeError(f"vocab_shard must be a VocabShard, got {type(shard).__name__}")
        self.shard = shard
        self.vocab = None if shard is None else Exchange(shard.group, "vocab_shard")
        self.sequence = (
            None if sequence_group is None else Exchange(sequence_group, "sequence_group")
        )
        self.columns: Columns | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "Peers":
        # The vocabulary's comes first in every pass, so that its errors reach the other's ranks.
        for exchange in (self.sequence, self.vocab):
            if exchange is not None:
                self._stack.enter_context(exchange)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def columns_of(self, width: int) -> Columns:
        """Those that are here: all, unless the vocabulary is sharded."""
        return Columns.all_of(width) if self.columns is None else self.columns

    def local_reduction(self, reduction: str) -> str:
        """Where a sequence's tokens are sharded, only the sum of those that are here is known."""
        return "sum" if self.sequence is not None else reduction

    def agree(
        self,
        tokens: Tokens,
        dtype: torch.dtype,  # of the partials
        width: int,  # columns that are here, padding included
        num_splits: Callable[[int], int],
        same: dict[str, Any],
    ) -> None:
        """Compare what the ranks were given; all of `same` must be."""
        labels, _, cu_seqlens, shift, _ = tokens
        num_sequences = tokens.num_sequences("sum")
        if self.sequence is not None and shift:
            raise ValueError(
                "sequence_group needs shift=False: the label that a rank's last position predicts "
                "is on the next rank; align before the sequences are split, with "
                "labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index), "
                "and the mask likewise with 0"
            )
        same = {"number of sequences": num_sequences, **same}
        if self.vocab is not None and self.shard is not None:
            weights = token_weights(tokens, dtype)
            start, stop = _check_range(self.shard, width)
            num_scored = int(weights.count_nonzero())
            of_tokens = {
                "shape of labels": list(labels.shape),
                "number of scored tokens": num_scored,
                "checksum of labels, mask and cu_seqlens": _checksum(labels, weights, cu_seqlens),
            }
            own = {"start": start, "stop": stop, "splits": num_splits(stop - start)}
            shards = self.vocab.agree({**same, "shift": shift, **of_tokens}, own)
            self.columns = Columns(start, stop - start, _covered(shards, self.vocab))
            self._splits = [one["splits"] for one in shards]
            self._order = sorted(range(len(shards)), key=lambda r: shards[r]["start"])
            channels = 2 + len(same["stats"])
            numels = [num_scored * (1 + channels * splits) for splits in self._splits]
            self.vocab.expect(numels, dtype, labels.device)
        if self.sequence is not None:
            self.sequence.agree(same, {})
            numels = [3 * num_sequences] * len(self.sequence.ranks)
            self.sequence.expect(numels, torch.float64, labels.device)

    def gather_partials(self, partials: Partials) -> Partials:
        """Those of the M scored tokens, with sums (C, K, M): of these columns to of all."""
        if self.vocab is None:
            return partials
        sums, target, weights = partials
        num_channels, _, num_scored = sums.shape
        received = self.vocab.gather(target, sums)
        targets = torch.stack([flat[:num_scored] for flat in received])
        shape = (num_channels, -1, num_scored)
        if num_scored == 0:
            return Partials(sums.new_empty((num_channels, sum(self._splits), 0)), target, weights)
        every = [received[r][num_scored:].view(shape) for r in self._order]
        return Partials(torch.cat(every, 1), targets.amax(0), weights)  # a NaN stays

    def gather_all_partials(self, partials: Partials) -> Partials:
        """The same with places for tokens that are not scored, never sent."""
        if self.vocab is None:
            return partials
        sums, target, weights = partials
        scored = weights.flatten().nonzero().squeeze(1)
        of_scored = Partials(sums.index_select(2, scored), target.index_select(0, scored), weights)
        return self.gather_partials(of_scored).among(scored, weights)

    def sum_sequences(
        self, combined: Combined, weights: Tensor, cu_seqlens: Tensor | None, reduction: str
    ) -> Combined:
        """With values and lengths (S,) of whole sequences, from sums and lengths of what is here.

        Added in float64, in the order of the ranks.
        """
        sums, lengths = combined.values, combined.lengths
        if self.sequence is None:
            return combined
        scored = (weights != 0).double()
        if cu_seqlens is None:
            counts = scored.sum(1)
        else:
            before = torch.cat([scored.new_zeros(1), scored.flatten().cumsum(0)])
            counts = before[cu_seqlens.long().clamp(0, before.numel() - 1)].diff()
        received = self.sequence.gather(sums, lengths, counts)
        total = received[0].clone()
        for flat in received[1:]:
            total += flat
        values, whole_lengths, counts = total.view(3, -1)
        if reduction == "mean":
            values = values / whole_lengths.where(counts > 0, 1.0)
        whole = dict(values=values.to(sums.dtype), lengths=whole_lengths.to(lengths.dtype))
        return combined._replace(**whole)

    @contextmanager
    def backward(self, needs_hidden: bool) -> Iterator[Sum]:
        """What adds up the ranks' gradients of hidden, if anything does."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: the gradient of a sharded head cannot be differentiated again; "
                "for second derivatives use dpo_triton.reference on the whole head"
            )
        if self.vocab is None or not needs_hidden:
            yield None
            return
        with Exchange(self.vocab.group, "vocab_shard") as exchange:
            yield exchange.sum_


def _check_range(shard: VocabShard, width: int) -> tuple[int, int]:
    start, stop = shard.start, shard.stop
    if not all(type(bound) is int for bound in (start, stop)) or not 0 <= start < stop:
        raise ValueError(
            f"vocab_shard must have integers 0 <= start < stop, got start={start!r}, stop={stop!r}"
        )
    if width < stop - start:
        raise ValueError(
            f"vocab_shard [{start}, {stop}) has {stop - start} columns, but {width} were passed; "
            "pass this rank's own logits, or rows of the head, with start and stop of the whole "
            "vocabulary's numbering"
        )
    return start, stop


def _covered(shards: list[dict[str, int]], exchange: Exchange) -> int:
    """The size of the vocabulary that the shards cover."""
    order = sorted(range(len(shards)), key=lambda r: shards[r]["start"])
    end = 0
    for r in order:
        if shards[r]["start"] != end:
            exchange.is_over = True
            got = ", ".join(
                f"[{one['start']}, {one['stop']}) on rank {rank}"
                for one, rank in zip(shards, exchange.ranks, strict=True)
            )
            raise ValueError(
                f"vocab_shard: the shards must cover the vocabulary from 0 on, each column once, "
                f"got {got}; column {min(end, shards[r]['start'])} is the first that is "
                f"{'missing' if shards[r]['start'] > end else 'there twice'}"
            )
        end = shards[r]["stop"]
    return end


def _checksum(labels: Tensor, weights: Tensor, cu_seqlens: Tensor | None) -> int:
    """Of what must be the same on every rank: which tokens are scored, as what, by what weight."""
    numbers = torch.where(weights != 0, labels.long() * 0x9E3779B1, 0).flatten()
    numbers += weights.flatten().double().view(torch.int64) >> 16
    if cu_seqlens is not None:
        numbers = torch.cat([numbers, cu_seqlens.long()])
    places = torch.arange(1, 2 * numbers.numel(), 2, device=numbers.device)
    return int((numbers * places).sum())  # wraps
