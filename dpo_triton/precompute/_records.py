"""A row's values as a record of fixed size, sealed by a checksum, and found by the row's hash."""

import hashlib
from typing import Any

import numpy as np

from ._rows import ROW_HASH, Hashes

SEAL = np.dtype("V8")
# Sums are float32 or float64 numbers, which float64 holds exactly.
RECORD = np.dtype(
    [
        ("row_hash", ROW_HASH),
        ("chosen", "<f8"),
        ("rejected", "<f8"),
        ("chosen_length", "<i8"),
        ("rejected_length", "<i8"),
        ("seal", SEAL),
    ]
)
VALUES = ("chosen", "rejected", "chosen_length", "rejected_length")
Records = np.ndarray[Any, np.dtype[np.void]]  # (n,) of RECORD


def seals(records: Records) -> np.ndarray[Any, np.dtype[np.void]]:
    """(n,) of SEAL: BLAKE2 of all that is before it in a record."""
    size = RECORD.itemsize - SEAL.itemsize
    content = records.tobytes()
    starts = range(0, len(content), RECORD.itemsize)
    digests = (hashlib.blake2b(content[i : i + size], digest_size=8).digest() for i in starts)
    return np.frombuffer(b"".join(digests), SEAL)


def is_intact(records: Records) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(n,): whether a record's seal is its own."""
    return np.asarray(seals(records) == records["seal"], dtype=bool)


def find(hashes: Hashes, records: Records) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(n,) index of each row's record, -1 where there is none."""
    if len(records) == 0:
        return np.full(len(hashes), -1)
    known = np.ascontiguousarray(records["row_hash"])
    order = np.argsort(known, kind="stable")
    at = np.searchsorted(known, hashes, sorter=order).clip(max=len(known) - 1)
    return np.where(known[order[at]] == hashes, order[at], -1)


def rows_to_score(hashes: Hashes, records: Records) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Numbers of the rows that have no record, in order; of equal rows the first."""
    missing = np.flatnonzero(find(hashes, records) < 0)
    _, first = np.unique(hashes[missing], return_index=True)
    return missing[np.sort(first)]
