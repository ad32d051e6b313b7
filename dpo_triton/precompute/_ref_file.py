"""The file of reference log-probabilities: written whole or not at all, checked, read."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._version import __version__
from ..seq_logprob import Reduction
from ._fingerprints import difference
from ._records import RECORD, VALUES, Records, is_intact

FORMAT = "dpo_triton.ref_logps.2"


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

    def columns(self) -> dict[str, list[float]]:
        """The sums as the columns that TRL's trainers read, N numbers each."""
        return {
            "ref_chosen_logps": self.chosen.tolist(),
            "ref_rejected_logps": self.rejected.tolist(),
        }


# The file's tensors and the record's fields that they hold.
COLUMNS = dict(zip(RefLogps._fields, VALUES, strict=True))
BYTES = {"row_hashes": "row_hash", "seals": "seal"}  # (N, bytes) uint8


def check_origin(found: Mapping[str, str], expected: Mapping[str, str], path: Path) -> None:
    """Refuse what was made from something else."""
    if found.get("format") != expected["format"]:
        raise ValueError(
            f"{path} must have been written by precompute_ref_logps, in format "
            f"{expected['format']}, got {found.get('format')}; pass another path, or delete it"
        )
    for name, now in expected.items():
        was = found.get(name)
        if was != now:
            raise ValueError(
                f"{path} was made for another {name}: {difference(name, was, now)}; pass what it "
                "was made for, or another path, or delete it to score anew"
            )


def write_file(
    safetensors: Any, path: Path, records: Records, header: Mapping[str, str], dtype: torch.dtype
) -> None:
    """Write the file under a name of its own, and only then under its path."""
    tensors = {
        name: torch.tensor(records[field], dtype=dtype if name == field else None)
        for name, field in COLUMNS.items()
    }
    for name, field in BYTES.items():
        raw = records[field].copy().view(np.uint8)
        tensors[name] = torch.tensor(raw.reshape(-1, RECORD[field].itemsize))
    written = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        metadata = {**header, "dpo_triton": __version__}
        written.write_bytes(safetensors.save(tensors, metadata=metadata))
        with open(written, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(written, path)
    finally:
        written.unlink(missing_ok=True)


def read_file(
    safetensors: Any, path: Path, header: Mapping[str, str]
) -> tuple[Records, torch.dtype]:
    """Return the records that are intact, and the dtype of their sums.

    Raises:
        ValueError: no such file, or one that was made from something else.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # SafetensorError, which is no subclass of anything useful
        raise ValueError(f"{path} is no whole safetensors file ({error}); delete it") from error
    check_origin(metadata, header, path)
    records = np.empty(len(tensors["seals"]), RECORD)
    for name, field in COLUMNS.items():
        records[field] = tensors[name].numpy()
    for name, field in BYTES.items():
        records[field] = tensors[name].numpy().reshape(-1).view(RECORD[field])
    intact = is_intact(records)
    if not intact.all():
        warnings.warn(
            f"{path}: {np.count_nonzero(~intact)} of {len(records)} rows do not have their "
            "checksums, so a disk or a copy changed them; they are scored again",
            stacklevel=3,
        )
    return records[intact], tensors["chosen"].dtype


def ref_logps_of(records: Records, dtype: torch.dtype) -> RefLogps:
    """The values of (n,) records, sums in `dtype`."""
    chosen, rejected, *lengths = (torch.tensor(records[field]) for field in VALUES)
    return RefLogps(chosen.to(dtype), rejected.to(dtype), *lengths)


def import_safetensors() -> Any:
    """The module for torch, with safe_open."""
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "precompute_ref_logps writes a safetensors file: pip install safetensors"
        ) from error
    return safetensors.torch
