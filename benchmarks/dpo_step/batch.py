"""A real model twice, and real preference pairs as one batch."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.command import ROOT
from dpo_triton.data import PairTokenizer, read_pairs

NUM_PAIRS = 2
DATA = Path(__file__).with_name("pairs.jsonl")  # long answers, as data sets have them
sys.path.append(str(ROOT / "examples"))


@dataclass(frozen=True)
class Batch:
    input_ids: Tensor  # (2 * pairs, T), right padded, chosen before rejected
    attention_mask: Tensor
    completion_mask: Tensor  # at the label, as input_ids

    @property
    def inputs(self) -> dict[str, Any]:
        """What a model is called with."""
        return dict(input_ids=self.input_ids, attention_mask=self.attention_mask, use_cache=False)

    @property
    def scored(self) -> Tensor:
        """(2 * pairs, T - 1), where the logits of a token have a label to score."""
        return self.completion_mask[:, 1:]


def load_causal_lm(folder: Path | None) -> tuple[Any, Any]:
    """The model and its tokenizer, as the examples load them."""
    from causal_lm import CURE, find_smollm2, load_model, load_tokenizer

    try:
        folder = folder or find_smollm2()
        tokenizer, _ = load_tokenizer(folder)
        return load_model(folder, torch.device("cpu"), torch.float32), tokenizer
    except ImportError as error:
        raise SystemExit(f"error: {error}{CURE}") from error


def trainable_copy(model: Any) -> Any:
    """The same weights in a model that trains: transformers tags one from a GGUF file as quantised,
    which its weights are not any more."""
    config = type(model.config).from_dict(
        {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    )
    copy = type(model)(config)
    copy.load_state_dict(model.state_dict())
    return copy.train()


def make_batch(tokenizer: Any, data: Path, seq_len: int) -> Batch:
    """Return NUM_PAIRS pairs; a sequence is as many pairs, one after another, as fill seq_len."""
    pairs = read_pairs(data)
    encode = PairTokenizer(tokenizer, max_length=seq_len)
    sides: dict[str, list[tuple[list[int], list[int]]]] = {"chosen": [], "rejected": []}
    for _ in range(NUM_PAIRS):
        rows: dict[str, tuple[list[int], list[int]]] = {side: ([], []) for side in sides}
        while min(len(ids) for ids, _ in rows.values()) < seq_len:
            pair = next(pairs, None)
            if pair is None:
                break
            (encoded,) = encode([pair])
            if isinstance(encoded, ValueError):
                raise SystemExit(f"error: {encoded}")
            prompt_ids = encoded["prompt_ids"]
            for side, (ids, mask) in rows.items():
                ids += [*prompt_ids, *encoded[f"{side}_ids"]]
                mask += [0] * len(prompt_ids) + encoded[f"{side}_mask"]
        for side, (ids, mask) in rows.items():
            if 1 not in mask[1:seq_len]:
                raise SystemExit(
                    f"error: {data}: a sequence without a token of an answer; more pairs are needed"
                    f" for {NUM_PAIRS}, or a --seq-len beyond {seq_len}"
                )
            sides[side].append((ids[:seq_len], mask[:seq_len]))
    sequences = [*sides["chosen"], *sides["rejected"]]

    def padded(rows: list[list[int]]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in rows], batch_first=True
        )

    return Batch(
        padded([ids for ids, _ in sequences]),
        padded([[1] * len(ids) for ids, _ in sequences]),
        padded([mask for _, mask in sequences]),
    )
