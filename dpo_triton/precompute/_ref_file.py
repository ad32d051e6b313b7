"""The journal and the file of reference log-probabilities: records appended, cut, checked, read."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._version import __version__
from ..seq_logprob import Reduction
from ._fingerprints import ROW_HASH

FORMAT = "dpo_triton.ref_logps.1"
# One row of the journal. Sums are float32 or float64 numbers, which float64 holds exactly.
RECORD = np.dtype(
    [
        ("row_hash", ROW_HASH),
        ("chosen", "<f8"),
        ("rejected", "<f8"),
        ("chosen_length", "<i8"),
        ("rejected_length", "<i8"),
    ]
)
Records = np.ndarray[Any, np.dtype[np.void]]  # (n,) of RECORD
Hashes = np.ndarray[Any, np.dtype[np.void]]  # (n,) of ROW_HASH


class RefLogps(NamedTuple):
    """Log-probabilities of the answers of N pairs, in the data set's order, on the CPU."""

    chosen: Tensor  # (N,) sums over the answer's tokens, nats; 0 for an empty answer
    rejected: Tensor  # (N,) likewise
    chosen_lengths: Tensor  # (N,) int64, scored tokens
    rejected_lengths: Tensor  # (N,) int64

    def logps(self, reduction: Reduction) -> tuple[Tensor, Tensor]:
        """The chosen's and the rejected's "sum" or "mean" over their tokens, each (N,) in nats."""
        if reduction not in ("sum", "mean"):
            raise ValueError(f'reduction must be "sum" or "mean", got {reduction!r}')
        if reduction == "sum":
            return self.chosen, self.rejected
        return (
            self.chosen / self.chosen_lengths.clamp(min=1),
            self.rejected / self.rejected_lengths.clamp(min=1),
        )


def open_journal(journal: Path, header: Mapping[str, str], hashes: Hashes, batch_size: int) -> int:
    """Start a journal, or cut one to whole batches of checked rows; return how many rows it has.

    A batch that was torn is scored again whole: alone, its rows could get other bits.
    """
    head = _head_line(header)
    if not journal.exists() or head.startswith(journal.read_bytes()):  # killed within its header
        journal.write_bytes(head)
        return 0
    records = read_journal(journal, header)
    check_rows(records["row_hash"], hashes, journal)
    done = len(records)
    done -= 0 if done == len(hashes) else done % batch_size
    os.truncate(journal, len(head) + done * RECORD.itemsize)
    return done


def _head_line(header: Mapping[str, str]) -> bytes:
    return json.dumps(header).encode() + b"\n"


def read_journal(journal: Path, header: Mapping[str, str]) -> Records:
    """Return its whole records, (n,) of RECORD."""
    head, _, body = journal.read_bytes().partition(b"\n")
    try:
        found = json.loads(head)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{journal} is no journal of precompute_ref_logps; delete it")
    check_header(found, header, journal)
    return np.frombuffer(body, RECORD, count=len(body) // RECORD.itemsize)


def check_header(found: Mapping[str, str], expected: Mapping[str, str], path: Path) -> None:
    """Refuse a file that was made from something else."""
    other = [name for name, value in expected.items() if found.get(name) != value]
    if other:
        name = other[0]
        what = {"format": "format", "num_rows": "number of rows"}.get(name, name)
        raise ValueError(
            f"{path} was made for another {what}: {name} must be {expected[name]}, the file has "
            f"{found.get(name)}; pass another path, or delete the file to score anew"
        )


def check_rows(found: Hashes, hashes: Hashes, path: Path) -> None:
    """Refuse a file whose rows are not the data set's first."""
    if len(found) > len(hashes):
        raise ValueError(
            f"{path} must have at most {len(hashes)} rows, got {len(found)}; two processes wrote "
            "it: delete it, and give each run a path of its own"
        )
    (changed,) = np.nonzero(found != hashes[: len(found)])
    if len(changed):
        raise ValueError(
            f"row {changed[0]} is not the one that {path} was made for: its ids have changed, or "
            f"rows changed places ({len(changed)} of {len(found)} differ); pass the same data set, "
            "or delete the file to score anew"
        )


def write_file(
    safetensors: Any,
    path: Path,
    records: Records,
    header: Mapping[str, str],
    dtype: torch.dtype,
) -> None:
    """Write the file under a name of its own, and only then under its path."""
    row_hashes = records["row_hash"].copy().view(np.uint8).reshape(-1, ROW_HASH.itemsize)
    tensors = {
        "chosen": torch.tensor(records["chosen"], dtype=dtype),
        "rejected": torch.tensor(records["rejected"], dtype=dtype),
        "chosen_lengths": torch.tensor(records["chosen_length"]),
        "rejected_lengths": torch.tensor(records["rejected_length"]),
        "row_hashes": torch.tensor(row_hashes),  # (N, bytes) uint8
    }
    written = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        metadata = {**header, "dpo_triton": __version__}
        written.write_bytes(safetensors.save(tensors, metadata=metadata))
        with open(written, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(written, path)
    finally:
        written.unlink(missing_ok=True)


def read_file(safetensors: Any, path: Path) -> tuple[RefLogps, Hashes, dict[str, str]]:
    """Return the values, the hashes of the rows, and the metadata."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # SafetensorError, which is no subclass of anything useful
        raise ValueError(f"{path} is no whole safetensors file ({error}); delete it") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} must have been written by precompute_ref_logps, in format {FORMAT}, got "
            f"{metadata.get('format')}; pass another path"
        )
    hashes = tensors["row_hashes"].numpy().reshape(-1).view(ROW_HASH)
    return RefLogps(*(tensors[name] for name in RefLogps._fields)), hashes, metadata


def import_safetensors() -> Any:
    """The module for torch, with safe_open."""
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "precompute_ref_logps writes a safetensors file: pip install safetensors"
        ) from error
    return safetensors.torch
