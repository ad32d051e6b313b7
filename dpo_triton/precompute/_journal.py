"""The journal of a run: records appended a batch at a time, and cut where a run was stopped."""

import contextlib
import errno
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ._records import RECORD, Records, find, is_intact
from ._ref_file import check_origin

# Of file systems that cannot lock a file.
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class Journal:
    """An open journal: a line of JSON that says what it belongs to, then records; `records` are
    those that it had when it was opened."""

    def __init__(self, file: BinaryIO, head_size: int, records: Records) -> None:
        self.records = records
        self._file, self._head_size = file, head_size

    def cut(self, num_records: int) -> None:
        """Keep the first records, and drop a torn one after them."""
        self.records = self.records[:num_records]
        self._file.truncate(self._head_size + num_records * RECORD.itemsize)

    def append(self, records: Records) -> None:
        """Write a batch; it is on the disk on return."""
        self._file.write(records.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())


@contextlib.contextmanager
def open_journal(path: Path, header: Mapping[str, str]) -> Iterator[Journal]:
    """Open or begin a journal, which is this process's alone meanwhile.

    Raises:
        RuntimeError: another process has it open.
        ValueError: it is none, or of something else.
    """
    head = json.dumps(header).encode() + b"\n"
    with open(path, "a+b") as file:
        _lock(file, path)
        file.seek(0)
        content = file.read()
        if head.startswith(content):  # new, or killed within its header
            file.truncate(0)
            file.write(head)
            content = head
        line, _, body = content.partition(b"\n")
        check_origin(_header(line, path), header, path)
        yield Journal(file, len(line) + 1, _whole_records(body, path))


def drop_journal(path: Path, kept: Records) -> None:
    """Delete a journal whose rows are all in the file; on a read-only disk it stays."""
    with contextlib.suppress(OSError):
        records = _read_records(path.read_bytes().partition(b"\n")[2])
        if (find(records["row_hash"], kept) >= 0).all():
            path.unlink()


def _header(line: bytes, path: Path) -> dict[str, str]:
    with contextlib.suppress(ValueError):
        header = json.loads(line)
        if isinstance(header, dict):
            return header
    raise ValueError(f"{path} is no journal of precompute_ref_logps; delete it")


def _whole_records(body: bytes, path: Path) -> Records:
    """Those before the first broken one: what a disk lost is at the end."""
    records = _read_records(body)
    intact = is_intact(records)
    if intact.all():
        return records
    first = int(np.argmin(intact))
    warnings.warn(
        f"{path}: record {first} of {len(records)} is broken (a crash, or a disk at fault); it and "
        f"the {len(records) - first - 1} after it are scored again",
        stacklevel=2,
    )
    return records[:first]


def _read_records(body: bytes) -> Records:
    return np.frombuffer(body, RECORD, count=len(body) // RECORD.itemsize)


def _lock(file: BinaryIO, path: Path) -> None:
    """Until the file is closed, or its process ends."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise RuntimeError(
            f"{path} is being written by another process; wait for it, or give each run a path of "
            "its own"
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warnings.warn(
            f"{path} cannot be locked on this file system; see that no other process writes it",
            stacklevel=2,
        )
