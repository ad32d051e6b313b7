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
from .._language_model import output_head
from ..model import seq_logprob_from_model
from ._fingerprints import origin
from ._journal import drop_journal, open_journal
from ._records import RECORD, VALUES, Records, find, rows_to_score, seals
from ._ref_file import FORMAT, RefLogps, import_safetensors, read_file, ref_logps_of, write_file
from ._rows import MASKS, NAMES, Hashes, PreferenceRow, checked_hashes, row_hash


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
    file at path, whole or not at all. A file that has all rows is only read.

    Rows are found by the hashes of their ids: of a data set that grew, changed or was shuffled,
    those that the file lacks are scored and come to it. None is lost that it had.

    The file belongs to one model and tokenizer: to the model's configuration, as far as it changes
    a value, all values of its tensors, and autocast; to the tokenizer's vocabulary, special tokens
    but the padding, and chat template. Each row has a checksum: what a disk changed is scored
    again, with a warning that counts.

    Args:
        model: as `seq_logprob_from_model` takes it; scored in eval mode, which is undone after.
            PEFT's: call this inside of `model.disable_adapter()`; the file is then the base
            model's, before and after training.
        dataset: N mappings with "prompt_ids", "chosen_ids" and "rejected_ids", lists of token ids
            as in TRL; the answers' end with eos where the policy is to learn it; beside them
            "chosen_mask" and "rejected_mask" where not all of an answer counts. Read by len() and
            [i], once to check it and once to score it; no row is kept. The prompt has a token at
            least, for it predicts the answer's first.
        path: of the file, customarily .safetensors.
        tokenizer: a transformers tokenizer, for its fingerprint; None is a tokenizer like another.
        batch_size: pairs in a batch.
        progress: show a progress bar.
        backend: see `seq_logprob_from_model`.

    Returns:
        RefLogps, float32, or float64 for a float64 model. Empty answers give 0, and a warning that
        counts and names their rows. Equal rows have equal values.

    Raises:
        ValueError: a file of another model or tokenizer, and what differs; a row that cannot be
            scored, by its number; weights that are elsewhere.
        RuntimeError: called on a rank other than 0 before the file is complete; another process
            writes the file.
        ModuleNotFoundError: safetensors, or with progress tqdm, is not installed.
    """
    safetensors = import_safetensors()
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    path = Path(path)
    journal_path = path.with_name(path.name + ".partial")
    head = output_head(model)
    header = {"format": FORMAT, **origin(model, tokenizer)}
    hashes = checked_hashes(dataset, head.weight.shape[0])
    # Of seq_logprob_from_model's values.
    kept, dtype = np.empty(0, RECORD), torch.promote_types(head.weight.dtype, torch.float32)
    if path.exists():
        kept, dtype = read_file(safetensors, path, header)
    if not path.exists() or len(rows_to_score(hashes, kept)):
        _check_rank(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_journal(journal_path, header) as journal:
            done = len(journal.records)
            if len(rows_to_score(hashes, np.concatenate([kept, journal.records]))):
                done -= done % batch_size  # alone, the rows of a torn batch could get other bits
            journal.cut(done)
            kept = np.concatenate([kept, journal.records])
            numbers = rows_to_score(hashes, kept)
            num_found = int((find(hashes, kept) >= 0).sum())
            with (
                _progress_bar(progress, num_found + len(numbers), num_found) as advance,
                _eval_mode(model),
            ):
                parts = [kept]
                for start in range(0, len(numbers), batch_size):
                    batch = numbers[start : start + batch_size]
                    parts.append(_score(model, dataset, batch, hashes, backend))
                    journal.append(parts[-1])
                    advance(len(batch))
            write_file(safetensors, path, _in_order(hashes, np.concatenate(parts)), header, dtype)
        kept, dtype = read_file(safetensors, path, header)
    drop_journal(journal_path, kept)
    at = find(hashes, kept)
    if (at < 0).any():
        raise OSError(f"{path} does not hold what was just written to it; see to the disk")
    ref_logps = ref_logps_of(kept[at], dtype)
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


def _score(
    model: nn.Module,
    dataset: Sequence[PreferenceRow],
    numbers: Any,
    hashes: Hashes,
    backend: BackendName,
) -> Records:
    """Records of the rows of these numbers, as one batch."""
    rows = [dataset[int(i)] for i in numbers]
    scored = score_pairs(model, rows, backend=backend)
    records = np.zeros(len(rows), RECORD)
    records["row_hash"] = [row_hash(row) for row in rows]
    for name, values in zip(VALUES, scored, strict=True):
        records[name] = values.numpy()
    for i, record in zip(numbers, records, strict=True):
        if record["row_hash"] != hashes[i]:
            raise ValueError(
                f"row {i}: dataset[{i}] must give the same ids each time, got others than before; "
                "tokenise the data set once, and keep what came of it"
            )
        if not np.isfinite([record["chosen"], record["rejected"]]).all():
            raise ValueError(
                f"row {i}: log-probabilities must be finite, got {record['chosen']} "
                f"(chosen) and {record['rejected']} (rejected); the model's weights or dtype are "
                "at fault (float16 overflows), or the head bans one of the answer's tokens"
            )
    records["seal"] = seals(records)
    return records


def _in_order(hashes: Hashes, records: Records) -> Records:
    """The data set's records in its order, then those of rows that it has no more."""
    at = find(hashes, records)
    _, first = np.unique(at, return_index=True)
    own = at[np.sort(first)]
    return np.concatenate([records[own], np.delete(records, own)])


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
