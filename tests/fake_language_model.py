"""A tokenizer of characters and a model that is a table, for the examples; and rows for them."""

import gzip
import json
from types import SimpleNamespace

import torch
from torch import nn


class FakeTokenizer:
    """A token a character, modulo 64. Id 2 is eos and pads, as in SmolLM2; 1 begins a text."""

    eos_token, eos_token_id = "\x02", 2
    chat_template = "yes"
    is_prefix_stable = True

    @property
    def special_tokens_map(self):
        return {"eos_token": self.eos_token}

    def get_vocab(self):
        return {}

    def __call__(self, texts, add_special_tokens=True):
        def ids(text):
            return [1] * add_special_tokens + [ord(c) % 64 for c in text]

        if isinstance(texts, str):
            return SimpleNamespace(input_ids=ids(texts))
        return SimpleNamespace(input_ids=[ids(text) for text in texts])

    def convert_ids_to_tokens(self, ids):
        return ["x"] * len(ids)

    def get_chat_template(self, *, tools):
        return self.chat_template

    def apply_chat_template(
        self, messages, *, tokenize, tools, chat_template, add_generation_prompt=False
    ):
        assert not tokenize
        text = "".join(f"<{m['role']}>{m['content']}\n" for m in messages)
        if not self.is_prefix_stable and not add_generation_prompt:
            text = text.upper()
        return text + ("<assistant>" if add_generation_prompt else "")


class FakeModel(nn.Module):
    """Logits of the next token from a table: (B, T) -> (B, T, 64)."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = 3 * torch.randn(64, 64, generator=generator)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=64))
        self.batches = []

    def forward(self, input_ids, *, attention_mask, use_cache):
        self.batches.append(tuple(input_ids.shape))
        logits = self.table.to(input_ids.device)[input_ids]
        return SimpleNamespace(logits=logits.masked_fill(attention_mask[..., None] == 0, torch.nan))

    def log_p(self, row, side):
        """log p of the answer's tokens of one sequence, in float64, each token by its own."""
        log_p = self.table.double().log_softmax(1)
        ids, first = row["prompt_ids"] + row[side], len(row["prompt_ids"])
        return torch.stack([log_p[ids[t - 1], ids[t]] for t in range(first, len(ids))])


def message(role, content):
    return {"role": role, "content": content}


def chat_row(prompt="hi there", chosen="yes", rejected="no, never"):
    return dict(
        prompt=[message("user", prompt)],
        chosen=[message("assistant", chosen)],
        rejected=[message("assistant", rejected)],
    )


def write_rows(path, rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


PLAIN = dict(prompt="one and", chosen=" two", rejected=" too many of them")
