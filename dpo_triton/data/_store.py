"""Tokenised pairs in a folder, mapped into memory: 300,000 rows take no more of it than three."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ._tokenising import Row

NUM_NAMED = 5  # rows that a report names
SIDES = ("chosen", "rejected")
# One row: where its tokens begin, and how many there are of prompt, chosen and rejected.
ENTRY = np.dtype(
    [
        ("file", "<i4"),
        ("line", "<i8"),
        ("start", "<i8"),
        ("prompt", "<i4"),
        ("chosen", "<i4"),
        ("rejected", "<i4"),
        ("chosen_scored", "<i4"),
        ("rejected_scored", "<i4"),
        ("chosen_is_cut", "?"),
        ("rejected_is_cut", "?"),
    ]
)


class Report(NamedTuple):
    """What became of the rows of the files."""

    pairs: int = 0  # that were tokenised
    answers_cut: int = 0  # at max_length
    empty: int = 0  # pairs an answer of which has no scored token
    empty_sources: tuple[str, ...] = ()  # of the first of them
    bad: int = 0  # rows that could not be used and were left out
    bad_reasons: tuple[str, ...] = ()  # of the first of them, with file and line

    def lines(self) -> list[str]:
        """What to tell a user, a line each."""
        lines = [f"{self.pairs} pairs, {self.answers_cut} answers cut short"]
        if self.empty:
            named = ", ".join(self.empty_sources) + (", ..." if self.empty > NUM_NAMED else "")
            lines.append(f"  {self.empty} with an answer that is empty, or cut to nothing: {named}")
        if self.bad:
            lines.append(f"  {self.bad} rows left out, since they cannot be used:")
            lines += [f"    {reason}" for reason in self.bad_reasons]
            lines += ["    ..."] * (self.bad > NUM_NAMED)
        return lines


class TokenRows(Sequence[Row]):
    """The rows of a folder that `tokenise_files` wrote: `len()`, `[i]`, and views of some of them.

    A row is what `PairTokenizer` gives, read from the disk each time.
    """

    def __init__(self, folder: Path, numbers: npt.NDArray[np.int64] | None = None) -> None:
        header = json.loads((folder / "header.json").read_text(encoding="utf-8"))
        self.folder = folder
        self.report = Report(**header["report"])
        self._paths: list[str] = header["paths"]
        self._entries = _mapped(folder / "rows.bin", ENTRY)
        self._tokens = _mapped(folder / "tokens.bin", np.dtype("<i4"))
        self._mask = _mapped(folder / "mask.bin", np.dtype("u1"))
        self._numbers = np.arange(len(self._entries)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return TokenRows(self.folder, self._numbers[i])
        entry = self._entries[self._numbers[i]]
        at = int(entry["start"])
        row: Row = dict(source=f"{self._paths[entry['file']]}:{entry['line']}")
        for name in ("prompt", *SIDES):
            end = at + int(entry[name])
            row[f"{name}_ids"] = self._tokens[at:end].tolist()
            if name in SIDES:
                row[f"{name}_mask"] = self._mask[at:end].tolist()
                row[f"{name}_is_cut"] = bool(entry[f"{name}_is_cut"])
            at = end
        return row

    def select(self, numbers: npt.ArrayLike) -> "TokenRows":
        """A view of the rows of these numbers, in their order."""
        return TokenRows(self.folder, self._numbers[np.asarray(numbers, dtype=np.int64)])

    @property
    def scored(self) -> npt.NDArray[np.int64]:
        """(N, 2) numbers of scored tokens, chosen and rejected."""
        return self._lengths("chosen_scored", "rejected_scored")

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(N, 2) numbers of tokens of prompt and answer, chosen and rejected."""
        return self._lengths("chosen", "rejected") + self._lengths("prompt")

    def _lengths(self, *names: str) -> npt.NDArray[np.int64]:
        columns = [self._entries[name][self._numbers] for name in names]
        return np.stack(columns, axis=1).astype(np.int64)


def _mapped(path: Path, dtype: Any) -> Any:
    """The file's elements; an empty file cannot be mapped."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


class TokenWriter:
    """Writes a folder of rows, which is there whole or not at all."""

    def __init__(self, folder: Path, paths: Sequence[str]) -> None:
        self.folder = folder
        self.report = Report()
        self._paths = list(paths)
        self._new = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        self._new.mkdir(parents=True)
        names = ("rows.bin", "tokens.bin", "mask.bin")
        self._files = [open(self._new / name, "wb") for name in names]  # noqa: SIM115
        self._num_tokens = 0

    def add(self, file: int, row: Row) -> None:
        """Append a row of the paths' file of that number."""
        entry = np.zeros((), ENTRY)
        entry["file"], entry["line"] = file, int(row["source"].rpartition(":")[2])
        entry["start"], entry["prompt"] = self._num_tokens, len(row["prompt_ids"])
        for name in SIDES:
            entry[name] = len(row[f"{name}_ids"])
            entry[f"{name}_scored"] = sum(row[f"{name}_mask"])
            entry[f"{name}_is_cut"] = row[f"{name}_is_cut"]
        tokens = np.array([*row["prompt_ids"], *row["chosen_ids"], *row["rejected_ids"]], "<i4")
        mask = [0] * len(row["prompt_ids"]) + row["chosen_mask"] + row["rejected_mask"]
        parts = (entry, tokens, np.array(mask, "u1"))
        for written, part in zip(self._files, parts, strict=True):
            written.write(part.tobytes())
        self._num_tokens += len(tokens)
        report = self.report
        self.report = report._replace(
            pairs=report.pairs + 1,
            answers_cut=report.answers_cut + sum(row[f"{name}_is_cut"] for name in SIDES),
        )
        if not all(entry[f"{name}_scored"] for name in SIDES):
            named = (*report.empty_sources, row["source"])[:NUM_NAMED]
            self.report = self.report._replace(empty=report.empty + 1, empty_sources=named)

    def leave_out(self, reason: str) -> None:
        """Count a row that cannot be used."""
        reasons = (*self.report.bad_reasons, reason)[:NUM_NAMED]
        self.report = self.report._replace(bad=self.report.bad + 1, bad_reasons=reasons)

    def finish(self, made_from: dict[str, Any]) -> None:
        """Move the folder to its place, with what it was made from."""
        self.close()
        header = dict(made_from=made_from, paths=self._paths, report=self.report._asdict())
        text = json.dumps(header, indent=1, ensure_ascii=False)
        (self._new / "header.json").write_text(text, encoding="utf-8")
        shutil.rmtree(self.folder, ignore_errors=True)
        os.replace(self._new, self.folder)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def discard(self) -> None:
        """Remove what was written."""
        self.close()
        shutil.rmtree(self._new, ignore_errors=True)


def made_from(folder: Path) -> dict[str, Any] | None:
    """What the rows of a folder were made from; None where there are none."""
    try:
        header = json.loads((folder / "header.json").read_text(encoding="utf-8"))
        found = header["made_from"]
    except (OSError, ValueError, KeyError):
        return None
    return found if isinstance(found, dict) else None
