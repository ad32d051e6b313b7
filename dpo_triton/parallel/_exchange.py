"""What ranks of a process group tell each other in one pass; see `parallel`."""

import json
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# A note is JSON, filled up with blanks.
NOTE_BYTES = 1024


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


def _note_device(group: Any) -> torch.device:
    """Where a group's notes are: on the host if it can send from there, which waits for no GPU."""
    if "cpu" in dist.get_backend_config(group):
        return torch.device("cpu")
    device = torch.accelerator.current_accelerator()
    assert device is not None
    return torch.device(device.type, torch.accelerator.current_device_index())
