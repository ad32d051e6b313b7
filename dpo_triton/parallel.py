"""Several ranks and one result: vocabularies and sequences that are sharded over a process group.

A rank of a sharded vocabulary runs the first stage on its own columns, as if they were some of the
splits. One gather later every rank has the partials of all, in the order of the columns, and runs
the same second stage on the same numbers; the third stage needs nothing from the others, but for
the sum of what the ranks say about the hidden states.

    partials -> [gather] -> combine                  grad -> [sum of the gradient of hidden]
                combine  -> [sums of sequences]

Every call of a group starts with a note of each rank to all others, NOTE_BYTES long whatever it
says: what the rank was given, or why it fails. So ranks that disagree, or one that fails, are an
error on every rank, and nobody is left waiting in a collective.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import (
    AbstractContextManager,
    ExitStack,
    contextmanager,
    nullcontext,
    suppress,
)
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ._head import Columns
from ._weights import token_weights

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Function = TypeVar("Function", bound=Callable[..., Any])

# A note is JSON, filled up with blanks.
NOTE_BYTES = 1024


class VocabShard(NamedTuple):
    """Columns [start, stop) of the vocabulary: those that this rank of `group` has.

    The ranks' shards cover the vocabulary from 0 on, each column once; they may differ in width,
    and any rank may have any of them. What logits, or rows of a head, are passed with a shard
    beyond the first stop - start are padding: they are not read, and their gradient is 0.

    Args:
        start, stop: numbers of tokens, 0 <= start < stop.
        group: a process group of `torch.distributed`; None is the default group.

    Bytes that a rank sends to each other rank, of M scored tokens and its own K splits (of 16384
    columns with Triton, of 4096 from hidden states; the PyTorch backend takes logits as one):

        forward     (8 K + 4) M, twice that in float64, and 4 K M more for each of `stats`
        backward    nothing for logits; from hidden states one all-reduce of 4 H M (8 H M in
                    float64), if hidden requires a gradient
        and a note of 1024 in each of these passes, and one status of 4

    On a GPU the notes are waited for, once a pass.
    """

    start: int
    stop: int
    group: "ProcessGroup | None" = None


class Exchange:
    """What the ranks of a group tell each other in one pass: a note each, then numbers once.

    As a context it sees to it that an error inside reaches the others, at whatever point it occurs.
    """

    def __init__(self, group: "ProcessGroup | None", argument: str) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                f"{argument} needs torch.distributed, which is not initialised; "
                "call torch.distributed.init_process_group first"
            )
        self.group = dist.group.WORLD if group is None else group
        self.argument = argument
        self.rank = dist.get_rank(self.group)
        if self.rank < 0:
            raise ValueError(
                f"{argument} got a group that this process, rank {dist.get_rank()}, is not in; "
                "pass the group that holds this rank's shard"
            )
        self.ranks = dist.get_process_group_ranks(self.group)
        self.is_agreed = self.is_over = False

    def __enter__(self) -> "Exchange":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.is_over or (error is not None and not isinstance(error, Exception)):
            return
        if error is None:
            if not self.is_agreed:
                self.agree({}, {})
            return
        # The others' end of this raises there. Here the error itself says more.
        with suppress(RuntimeError):
            if self.is_agreed:
                self._swap(self.payload(failed=True))
            else:
                self._swap_notes({"error": f"{type(error).__name__}: {error}"[:200]})

    def agree(self, same: dict[str, Any], own: dict[str, int]) -> list[dict[str, int]]:
        """Tell the others, and return what each rank said of `own`.

        Raises:
            RuntimeError: a rank failed.
            ValueError: `same` is not the same on all ranks.
        """
        notes = self._swap_notes({"same": same, "own": own})
        self.is_agreed = True  # of an error from here on everybody knows
        failed = {r: note["error"] for r, note in enumerate(notes) if "error" in note}
        if failed:
            raise RuntimeError(
                f"{self.argument}: {self._names(failed)} failed, and so every rank of the group "
                f"stops; {next(iter(failed.values()))}"
            )
        if any(note["same"] != notes[0]["same"] for note in notes):
            raise ValueError(self._disagreement([note["same"] for note in notes]))
        self.is_over = False
        return [note["own"] for note in notes]

    def expect(self, numels: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        """Numbers that each rank will send to each other one."""
        self.numels = [1 + numel for numel in numels]  # the first says whether the rank failed
        self.dtype, self.device = dtype, device

    def payload(self, *parts: Tensor, failed: bool = False) -> Tensor:
        status = torch.full((1,), float(failed), dtype=self.dtype, device=self.device)
        if failed:
            return torch.cat([status, status.new_zeros(self.numels[self.rank] - 1)])
        return torch.cat([status, *(part.flatten() for part in parts)])

    def gather(self, *parts: Tensor) -> list[Tensor]:
        """The flat numbers of each rank, in the order of the ranks.

        Raises:
            RuntimeError: a rank failed since the notes.
        """
        received = self._swap(self.payload(*parts))
        statuses = torch.stack([flat[0] for flat in received]).tolist()
        failed = [r for r, status in enumerate(statuses) if status != 0]
        if failed:
            raise RuntimeError(
                f"{self.argument}: {self._names(failed)} failed in this pass, and so every rank of "
                "the group stops; see the error there"
            )
        return [flat[1:] for flat in received]

    def sum_(self, numbers: Tensor) -> None:
        """Add the other ranks' numbers to these, in place, with the same bits on every rank."""
        self.agree({}, {})
        self.is_over = True
        dist.all_reduce(numbers, group=self.group)

    def _swap(self, payload: Tensor) -> list[Tensor]:
        # all_gather wants equal sizes, and would have to pad every shard to the widest one.
        self.is_over = True
        count = len(self.ranks)
        received = payload.new_empty(sum(self.numels))
        dist.all_to_all_single(
            received,
            payload.repeat(count),
            output_split_sizes=self.numels,
            input_split_sizes=[payload.numel()] * count,
            group=self.group,
        )
        return list(torch.split(received, self.numels))

    def _swap_notes(self, note: dict[str, Any]) -> list[dict[str, Any]]:
        self.is_over = True
        raw = json.dumps(note, ensure_ascii=False).encode().ljust(NOTE_BYTES)
        assert len(raw) == NOTE_BYTES, len(raw)
        mine = torch.frombuffer(bytearray(raw), dtype=torch.uint8).to(_note_device(self.group))
        received = [torch.empty_like(mine) for _ in self.ranks]
        dist.all_gather(received, mine, group=self.group)
        return [json.loads(bytes(one.tolist())) for one in received]

    def _names(self, ranks: Sequence[int] | dict[int, Any]) -> str:
        names = ", ".join(str(self.ranks[r]) for r in ranks)
        return f"rank {names}" if len(ranks) == 1 else f"ranks {names}"

    def _disagreement(self, notes: list[dict[str, Any]]) -> str:
        key = next(key for key in notes[0] if any(note.get(key) != notes[0][key] for note in notes))
        by_value: dict[str, list[int]] = {}
        for r, note in enumerate(notes):
            by_value.setdefault(str(note.get(key)), []).append(r)
        got = ", ".join(f"{value} on {self._names(ranks)}" for value, ranks in by_value.items())
        return f"{self.argument}: {key} must be the same on every rank of the group, got {got}"


class Peers:
    """The other ranks of one call of a public function, for what lies between its stages."""

    def __init__(self, shard: VocabShard | None, sequence_group: "ProcessGroup | None") -> None:
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

    def agree(
        self,
        labels: Tensor,  # (B, T)
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        shift: bool,
        ignore_index: int,
        dtype: torch.dtype,  # of the partials
        width: int,  # columns that are here, padding included
        num_splits: Callable[[int], int],
        same: dict[str, Any],
    ) -> None:
        """Compare what the ranks were given; all of `same` must be."""
        num_sequences = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if self.sequence is not None and shift:
            raise ValueError(
                "sequence_group needs shift=False: the label that a rank's last position predicts "
                "is on the next rank; align before the sequences are split, with "
                "labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index), "
                "and the mask likewise with 0"
            )
        same = {"number of sequences": num_sequences, **same}
        if self.vocab is not None and self.shard is not None:
            weights = token_weights(labels, mask, cu_seqlens, shift, ignore_index, dtype)
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

    def gather_partials(self, partials: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Partials (C, K, M) and targets (M,) of the scored tokens: of these columns to of all."""
        if self.vocab is None:
            return partials, target
        num_channels, _, num_scored = partials.shape
        received = self.vocab.gather(target, partials)
        targets = torch.stack([flat[:num_scored] for flat in received])
        shape = (num_channels, -1, num_scored)
        if num_scored == 0:
            return partials.new_empty((num_channels, sum(self._splits), 0)), target
        every = [received[r][num_scored:].view(shape) for r in self._order]
        return torch.cat(every, 1), targets.amax(0)  # a NaN stays

    def gather_all_partials(
        self, partials: Tensor, target: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same with places (C, K, N) and (N,) for tokens that are not scored, never sent."""
        if self.vocab is None:
            return partials, target
        scored = weights.flatten().nonzero().squeeze(1)
        every, targets = self.gather_partials(
            partials.index_select(2, scored), target.index_select(0, scored)
        )
        shape = (*every.shape[:2], target.numel())
        return (
            every.new_empty(shape).index_copy_(2, scored, every),
            target.index_copy_(0, scored, targets),
        )

    def sum_sequences(
        self,
        sums: Tensor,
        lengths: Tensor,
        weights: Tensor,
        cu_seqlens: Tensor | None,
        reduction: str,
    ) -> tuple[Tensor, Tensor]:
        """Values and lengths (S,) of whole sequences, from sums and lengths of what is here.

        Added in float64, in the order of the ranks.
        """
        if self.sequence is None:
            return sums, lengths
        scored = (weights != 0).double()
        if cu_seqlens is None:
            counts = scored.sum(1)
        else:
            before = torch.cat([scored.new_zeros(1), scored.flatten().cumsum(0)])
            counts = before[cu_seqlens.long()].diff()
        received = self.sequence.gather(sums, lengths, counts)
        total = received[0].clone()
        for flat in received[1:]:
            total += flat
        values, whole_lengths, counts = total.view(3, -1)
        if reduction == "mean":
            values = values / whole_lengths.where(counts > 0, 1.0)
        return values.to(sums.dtype), whole_lengths.to(lengths.dtype)

    @contextmanager
    def backward(self, needs_hidden: bool) -> Iterator[Callable[[Tensor], None] | None]:
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


def peers(
    shard: VocabShard | None, sequence_group: "ProcessGroup | None"
) -> AbstractContextManager[Peers | None]:
    """The peers of a call as its context, None where nothing is sharded."""
    if shard is None and sequence_group is None:
        return nullcontext()
    return Peers(shard, sequence_group)


def uncompiled(function: Function, peers: Peers | None) -> Function:
    """The function, which torch.compile does not look into where there are peers: their frames
    would be compiled one by one after `Peers` has refused."""
    if peers is None or "torch._dynamo" not in sys.modules:
        return function
    disabled: Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


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


def _note_device(group: Any) -> torch.device:
    """Where a group's notes are: on the host if it can send from there, which waits for no GPU."""
    if "cpu" in dist.get_backend_config(group):
        return torch.device("cpu")
    device = torch.accelerator.current_accelerator()
    assert device is not None
    return torch.device(device.type, torch.accelerator.current_device_index())
