"""Rows of token ids: checked, and known by a hash."""

import hashlib
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NAMES = ("prompt_ids", "chosen_ids", "rejected_ids")  # TRL's
MASKS = ("chosen_mask", "rejected_mask")  # of a row that has them
ROW_HASH = np.dtype("V16")

PreferenceRow = Mapping[str, Any]  # prompt_ids, chosen_ids, rejected_ids: each a list of ints
Hashes = np.ndarray[Any, np.dtype[np.void]]  # (n,) of ROW_HASH


def row_hash(row: PreferenceRow) -> np.void:
    """BLAKE2 of the three lists of ids and their lengths, and of a mask that leaves an id out."""
    digest = hashlib.blake2b(digest_size=ROW_HASH.itemsize)
    for name in NAMES:
        ids = np.asarray(row[name], dtype="<i8")
        digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
    for name in MASKS:
        mask = row.get(name)
        if mask is not None and not np.all(mask):
            digest.update(name.encode() + np.asarray(mask, dtype="<i8").tobytes())
    return np.void(digest.digest())


def checked_hashes(dataset: Sequence[PreferenceRow], vocab_size: int) -> Hashes:
    """Hashes of all rows, which are checked before the first is scored."""
    hashes = np.empty(len(dataset), ROW_HASH)
    for i in range(len(dataset)):
        row = dataset[i]
        _check_row(row, i, vocab_size)
        hashes[i] = row_hash(row)
    return hashes


def _check_row(row: PreferenceRow, number: int, vocab_size: int) -> None:
    for name in NAMES:
        if not isinstance(row, Mapping) or name not in row:
            got = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
            raise ValueError(
                f"row {number}: must have {', '.join(NAMES)}, got {got}; tokenise the "
                "data set first, as TRL's DPOTrainer does"
            )
        ids = np.asarray(row[name])
        if (ids.size and ids.dtype.kind not in "iu") or ids.ndim != 1:
            raise ValueError(
                f"row {number}: {name} must be a list of token ids, got "
                f"{reprlib.repr(row[name])}; tokenise the data set first"
            )
        if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
            outside = ids[(ids < 0) | (ids >= vocab_size)]
            raise ValueError(
                f"row {number}: {name} must be in [0, {vocab_size}), got {outside[0]}; the "
                "tokenizer is not the model's, or -100 came in with labels"
            )
    for name, mask_name in zip(NAMES[1:], MASKS, strict=True):
        mask = row.get(mask_name)
        if mask is not None and (
            len(mask) != len(row[name]) or not np.isin(np.asarray(mask), (0, 1)).all()
        ):
            raise ValueError(
                f"row {number}: {mask_name} must have a 0 or 1 for each of {len(row[name])} "
                f"{name}, got {len(mask)}; leave it out where the whole answer counts"
            )
    if len(row["prompt_ids"]) == 0:
        raise ValueError(
            f"row {number}: prompt_ids must have a token at least, since it predicts the answer's "
            "first; begin the prompt with the tokenizer's bos or a chat template's header"
        )
