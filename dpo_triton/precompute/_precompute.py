"""Rows checked, scored batch by batch, and written as they come."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .._backends import BackendName
from ..model import output_head, seq_logprob_from_model
from ._fingerprints import (
    MASKS,
    NAMES,
    ROW_HASH,
    PreferenceRow,
    model_fingerprint,
    row_hash,
    tokenizer_fingerprint,
)
from ._ref_file import (
    FORMAT,
    RECORD,
    Hashes,
    Records,
    RefLogps,
    check_header,
    check_rows,
    import_safetensors,
    open_journal,
    read_file,
    read_journal,
    write_file,
)


def precompute_ref_logps(
    model: nn.Module,
    dataset: Sequence[PreferenceRow],
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    batch_size: int = 8,
    progress: bool = True,
    backend: BackendName = "auto",
) -> RefLogps:
    """Log-probabilities of every answer of a data set under a reference model, from or to a file.

    Rows are scored in order and kept batch by batch in a journal, `path` + ".partial". Killed at
    any moment, the same call goes on where the journal ends, with the bits of a run that was never
    stopped (given the same batch_size). The last batch done, the journal becomes the safetensors
    file at path, whole or not at all. Where that is there, it is checked and read.

    The file belongs to one model, tokenizer and data set, of which it holds hashes: of the model's
    configuration and of names, shapes, dtypes and 64 elements of each tensor; of the tokenizer's
    vocabulary, special tokens and chat template; and of each row.

    Args:
        model: as `seq_logprob_from_model` takes it; scored in eval mode, which is undone after.
            PEFT's: call this inside of `model.disable_adapter()` or before adding the adapter.
        dataset: N mappings with "prompt_ids", "chosen_ids" and "rejected_ids", lists of token ids
            as in TRL; the answers' end with eos where the policy is to learn it; beside them
            "chosen_mask" and "rejected_mask" where not all of an answer counts. Read by len() and
            [i]. The prompt has a token at least, for it predicts the answer's first.
        path: of the file, customarily .safetensors.
        tokenizer: a transformers tokenizer, for its fingerprint; None is a tokenizer like another.
        batch_size: pairs in a batch.
        progress: show a progress bar.
        backend: see `seq_logprob_from_model`.

    Returns:
        RefLogps, float32, or float64 for a float64 model. Empty answers give 0, and a warning that
        counts and names their rows.

    Raises:
        ValueError: a file of another model, tokenizer or data set, or a row that cannot be scored,
            by its number.
        RuntimeError: called on a rank other than 0 before the file is complete.
        ModuleNotFoundError: safetensors, or with progress tqdm, is not installed.
    """
    safetensors = import_safetensors()
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    path = Path(path)
    journal = path.with_name(path.name + ".partial")
    header = {
        "format": FORMAT,
        "model": model_fingerprint(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "num_rows": str(len(dataset)),
    }
    hashes = _checked_hashes(dataset, output_head(model).weight.shape[0])
    if not path.exists():
        _check_rank(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        done = open_journal(journal, header, hashes, batch_size)
        _append(journal, done, model, dataset, batch_size, progress, backend)
        records = read_journal(journal, header)
        check_rows(records["row_hash"], hashes, journal)
        write_file(safetensors, path, records, header, _value_dtype(model))
    ref_logps, found, metadata = read_file(safetensors, path)
    check_header(metadata, header, path)
    check_rows(found, hashes, path)
    journal.unlink(missing_ok=True)
    _report_empty(ref_logps)
    return ref_logps


@torch.no_grad()
def score_pairs(
    model: nn.Module, rows: Sequence[PreferenceRow], *, backend: BackendName = "auto"
) -> RefLogps:
    """Score one batch of rows as `precompute_ref_logps` does, in the model's present mode."""
    device = next(model.parameters()).device
    input_ids, attention_mask, mask = collate_pairs(rows, device)
    values, stats = seq_logprob_from_model(
        model,
        input_ids,
        attention_mask,
        mask=mask,
        reduction="sum",
        stats=("lengths",),
        backend=backend,
    )
    chosen, rejected = values.cpu().chunk(2)
    return RefLogps(chosen, rejected, *stats["lengths"].cpu().long().chunk(2))


def collate_pairs(
    rows: Sequence[PreferenceRow], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """`collate` of B pairs: all chosen, then all rejected; each (2B, T).

    A row may have "chosen_mask" and "rejected_mask", 0 at ids of an answer that do not count.
    """
    answers = [(row["prompt_ids"], row[name]) for name in NAMES[1:] for row in rows]
    ids = [[*prompt, *answer] for prompt, answer in answers]
    collated = collate(ids, [len(prompt) for prompt, _ in answers], device)
    mask = collated[2]
    masks = [row.get(name) for name in MASKS for row in rows]
    for b, (answer_mask, (prompt, _)) in enumerate(zip(masks, answers, strict=True)):
        if answer_mask is not None:
            end = len(prompt) + len(answer_mask)
            mask[b, len(prompt) : end] = torch.as_tensor(answer_mask, device=device)
    return collated


def collate(
    ids: Sequence[Sequence[int]], num_prompt: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded input_ids, attention_mask and the mask of the answers, each (B, T) int64.

    ids[b][num_prompt[b]:] is the answer. Both masks come from lengths: the id that pads is a real
    token of many a sequence, often eos.
    """
    input_ids = pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
    position = torch.arange(input_ids.shape[1])
    is_real = position < torch.tensor([len(row) for row in ids])[:, None]
    is_answer = is_real & (position >= torch.tensor(num_prompt)[:, None])
    return input_ids.to(device), is_real.long().to(device), is_answer.long().to(device)


def _append(
    journal: Path,
    done: int,
    model: nn.Module,
    dataset: Sequence[PreferenceRow],
    batch_size: int,
    progress: bool,
    backend: BackendName,
) -> None:
    """Score the rows from `done` on, and append a batch at a time, each on the disk at once."""
    with (
        _progress_bar(progress, len(dataset), done) as advance,
        _eval_mode(model),
        open(journal, "ab") as file,
    ):
        for start in range(done, len(dataset), batch_size):
            rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
            records = _records(rows, score_pairs(model, rows, backend=backend), start)
            file.write(records.tobytes())
            file.flush()
            os.fsync(file.fileno())
            advance(len(rows))


def _records(rows: Sequence[PreferenceRow], scored: RefLogps, start: int) -> Records:
    records = np.empty(len(rows), RECORD)
    records["row_hash"] = [row_hash(row) for row in rows]
    for name, values in zip(RECORD.names[1:], scored, strict=True):  # type: ignore[index]
        records[name] = values.numpy()
    for i, record in enumerate(records):
        if not np.isfinite([record["chosen"], record["rejected"]]).all():
            raise ValueError(
                f"row {start + i}: log-probabilities must be finite, got {record['chosen']} "
                f"(chosen) and {record['rejected']} (rejected); the model's weights or dtype are "
                "at fault (float16 overflows), or the head bans one of the answer's tokens"
            )
    return records


def _checked_hashes(dataset: Sequence[PreferenceRow], vocab_size: int) -> Hashes:
    """Hashes of all rows, which are checked before the first is scored."""
    hashes = np.empty(len(dataset), ROW_HASH)
    for i in range(len(dataset)):
        row = dataset[i]
        _check_row(row, i, vocab_size)
        hashes[i] = row_hash(row)
    return hashes


def _check_row(row: PreferenceRow, number: int, vocab_size: int) -> None:
    for name in NAMES:
        if name not in row:
            raise ValueError(
                f"row {number}: must have {', '.join(NAMES)}, got {', '.join(row)}; tokenise the "
                "data set first, as TRL's DPOTrainer does"
            )
        ids = np.asarray(row[name])
        if ids.size and (ids.ndim != 1 or ids.dtype.kind not in "iu"):
            raise ValueError(
                f"row {number}: {name} must be a list of token ids, got {type(row[name]).__name__} "
                f"of {ids.dtype} with shape {ids.shape}"
            )
        outside = ids[(ids < 0) | (ids >= vocab_size)]
        if len(outside):
            raise ValueError(
                f"row {number}: {name} must be in [0, {vocab_size}), got {outside[0]}; the "
                "tokenizer is not the model's, or -100 came in with labels"
            )
    for name, mask_name in zip(NAMES[1:], MASKS, strict=True):
        mask = row.get(mask_name)
        if mask is not None and (len(mask) != len(row[name]) or not set(mask) <= {0, 1}):
            raise ValueError(
                f"row {number}: {mask_name} must have a 0 or 1 for each of {len(row[name])} "
                f"{name}, got {len(mask)}; leave it out where the whole answer counts"
            )
    if len(row["prompt_ids"]) == 0:
        raise ValueError(
            f"row {number}: prompt_ids must have a token at least, since it predicts the answer's "
            "first; begin the prompt with the tokenizer's bos or a chat template's header"
        )


def _value_dtype(model: nn.Module) -> torch.dtype:
    """Of seq_logprob_from_model's values."""
    return torch.promote_types(output_head(model).weight.dtype, torch.float32)


def _report_empty(ref_logps: RefLogps) -> None:
    is_empty = (ref_logps.chosen_lengths == 0) | (ref_logps.rejected_lengths == 0)
    rows = is_empty.nonzero()[:, 0].tolist()
    if rows:
        named = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
        warnings.warn(
            f"{len(rows)} of {len(is_empty)} rows have an answer without a token, whose "
            f"log-probability is 0: {named}; leave them out, or truncate less",
            stacklevel=3,
        )


def _check_rank(path: Path) -> None:
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        raise RuntimeError(
            f"{path} must be made by rank 0, this is rank {dist.get_rank()}; call "
            "torch.distributed.barrier() before this on every other rank, and after it on rank 0"
        )


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """No dropout, for the time being; each module gets its own mode back."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True


@contextlib.contextmanager
def _progress_bar(progress: bool, total: int, initial: int) -> Iterator[Callable[[int], object]]:
    """Yield a function that takes the number of rows done since."""
    if not progress:
        yield lambda num_rows: None
        return
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "progress=True needs tqdm: pip install tqdm, or pass progress=False"
        ) from error
    with tqdm(total=total, initial=initial, unit="pair", desc="reference") as bar:
        yield bar.update
