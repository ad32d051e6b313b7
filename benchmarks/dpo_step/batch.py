"""A real model twice, and real preference pairs as one batch."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.command import ROOT

NUM_PAIRS = 2
DATA = ROOT / "examples" / "preferences.jsonl"


@dataclass(frozen=True)
class Batch:
    input_ids: Tensor  # (2 * pairs, T), right padded, chosen before rejected
    attention_mask: Tensor
    completion_mask: Tensor  # at the label, as input_ids

    @property
    def scored(self) -> Tensor:
        """(2 * pairs, T - 1), where the logits of a token have a label to score."""
        return self.completion_mask[:, 1:]


def load_demo() -> Any:
    """The example as a module: it reads pairs, loads a model, and encodes."""
    path = ROOT / "examples" / "score_preferences.py"
    spec = importlib.util.spec_from_file_location("score_preferences", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_causal_lm(demo: Any, folder: Path | None) -> tuple[Any, Any]:
    try:
        return demo.load_model(folder or demo.find_smollm2(), torch.device("cpu"), torch.float32)
    except ImportError as error:
        raise SystemExit(f"error: {error}{demo.CURE}") from error


def trainable_copy(model: Any) -> Any:
    """The same weights in a model that trains: transformers tags one from a GGUF file as quantised,
    which its weights are not any more."""
    config = type(model.config).from_dict(
        {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    )
    copy = type(model)(config)
    copy.load_state_dict(model.state_dict())
    return copy.train()


def make_batch(demo: Any, tokenizer: Any, data: Path, seq_len: int) -> Batch:
    """Return NUM_PAIRS pairs; a sequence is as many pairs, one after another, as fill seq_len."""
    pairs = iter(demo.read_pairs(data))
    sides: list[list[tuple[list[int], list[int]]]] = [[], []]  # chosen, rejected: ids and mask
    for _ in range(NUM_PAIRS):
        rows: list[tuple[list[int], list[int]]] = [([], []), ([], [])]
        while min(len(ids) for ids, _ in rows) < seq_len:
            pair = next(pairs, None)
            if pair is None:
                break
            for (ids, mask), answer in zip(rows, (pair.chosen, pair.rejected), strict=True):
                encoded = demo.encode(tokenizer, pair.source, pair.prompt, answer, seq_len)
                num_answer = len(encoded.ids) - encoded.num_prompt
                ids += encoded.ids
                mask += [0] * (len(encoded.ids) - max(0, num_answer)) + [1] * max(0, num_answer)
        for side, (ids, mask) in zip(sides, rows, strict=True):
            if 1 not in mask[1:seq_len]:
                raise SystemExit(
                    f"error: {data}: a sequence without a token of an answer; more pairs are needed"
                    f" for {NUM_PAIRS}, or a --seq-len beyond {seq_len}"
                )
            side.append((ids[:seq_len], mask[:seq_len]))
    sequences = [*sides[0], *sides[1]]

    def padded(rows: list[list[int]]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in rows], batch_first=True
        )

    return Batch(
        padded([ids for ids, _ in sequences]),
        padded([[1] * len(ids) for ids, _ in sequences]),
        padded([mask for _, mask in sequences]),
    )
