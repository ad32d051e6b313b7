"""All that a training needs: model, pairs as tokens, and the reference's log-probabilities."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from causal_lm import (
    add_lora,
    find_smollm2,
    is_adapter,
    load_model,
    load_tokenizer,
    max_positions,
    save_whole,
)
from command_line import checked_max_length
from preference_training import permutation
from torch.utils.data import ConcatDataset

from dpo_triton.data import TokenRows, tokenise_files
from dpo_triton.precompute import RefLogps, precompute_ref_logps


class Setup(NamedTuple):
    """All that training needs."""

    model: Any
    tokenizer: Any
    train_rows: TokenRows
    held_out_rows: TokenRows
    train_ref: RefLogps
    held_out_ref: RefLogps


def prepare(args: argparse.Namespace) -> Setup:
    """Read the data, load the model, score the reference, and make the policy."""
    folder = args.model or find_smollm2()
    tokenizer, config = load_tokenizer(folder)
    max_length = checked_max_length(args.max_length, max_positions(config))
    vocab_size = config.get_text_config().vocab_size
    train_rows = read_rows(args, args.data, "tokens", tokenizer, max_length, vocab_size)
    if args.eval_data:
        held_out_rows = read_rows(
            args, args.eval_data, "eval_tokens", tokenizer, max_length, vocab_size
        )
    else:
        train_rows, held_out_rows = split(train_rows, args.holdout, args.seed)
    model = load_model(folder, args.device, torch.float32)
    ref_logps = precompute_ref_logps(
        model,
        ConcatDataset([train_rows, held_out_rows]) if len(held_out_rows) else train_rows,  # type: ignore[arg-type, list-item]
        args.output / "ref_logps.safetensors",
        tokenizer=tokenizer,
        batch_size=args.batch_size,
        backend=args.backend,
    )
    parts = zip(*(field.tensor_split([len(train_rows)]) for field in ref_logps), strict=True)
    train_ref, held_out_ref = (RefLogps(*part) for part in parts)
    if not args.full:
        if is_adapter(folder):  # or the new adapter's base would be in no folder
            base = (args.output / "base").resolve()
            if not base.exists():
                save_whole(model, tokenizer, base)
            model.name_or_path = str(base)
        model = add_lora(model, args.lora_rank, args.seed)
    return Setup(model, tokenizer, train_rows, held_out_rows, train_ref, held_out_ref)


def read_rows(
    args: argparse.Namespace,
    paths: Sequence[Path],
    name: str,
    tokenizer: Any,
    max_length: int,
    vocab_size: int,
) -> TokenRows:
    """Return the pairs both of whose answers have a token, and say what became of the others."""
    rows = tokenise_files(
        paths,
        args.output / name,
        tokenizer,
        max_length=max_length,
        vocab_size=vocab_size,
        limit=args.limit,
        skip_bad_rows=args.skip_bad_rows,
    )
    print(f"{', '.join(map(str, paths))}:", *rows.report.lines(), sep="\n")
    (kept,) = np.nonzero((rows.scored > 0).all(axis=1))
    if len(kept) == 0:
        raise ValueError(f"--max-length {max_length} leaves no answer in {paths[0]}; pass more")
    return rows.select(kept)


def split(rows: TokenRows, holdout: float, seed: int) -> tuple[TokenRows, TokenRows]:
    """Return the rows to train on and a share of `holdout`, drawn by the seed, to evaluate."""
    num_held_out = round(holdout * len(rows))
    if num_held_out == len(rows):
        raise ValueError(
            f"--holdout {holdout} of {len(rows)} pairs leaves none to train on; pass less, or more "
            "--data"
        )
    is_held_out = np.zeros(len(rows), dtype=bool)
    is_held_out[permutation(len(rows), seed, -1)[:num_held_out].numpy()] = True
    return rows.select(np.flatnonzero(~is_held_out)), rows.select(np.flatnonzero(is_held_out))
