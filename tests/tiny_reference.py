"""A tiny reference model without transformers, rows for it, and a journal of them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dpo_triton.precompute import _precompute, precompute_ref_logps

VOCAB_SIZE = 37
NUM_ROWS = 7  # and batches of 2: the last one is short


class Config:
    def __init__(self, **options):
        self.options = options

    def to_dict(self):
        return dict(self.options)


class TinyModel(nn.Module):
    """A causal model without transformers: what is before a token, averaged, and a head."""

    def __init__(self, seed=0, **options):
        super().__init__()
        self.config = Config(**options)
        self.embedding = nn.Embedding(VOCAB_SIZE, 8)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, VOCAB_SIZE, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.batches = []

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, use_cache=None, return_dict=None):
        self.batches.append(len(input_ids))
        count = torch.arange(1, 1 + input_ids.shape[1])[:, None]
        hidden = self.dropout(self.embedding(input_ids)).cumsum(1) / count
        return SimpleNamespace(logits=self.head(hidden))


def draw_ids(least, most):
    size = int(torch.randint(least, most + 1, ()))
    return torch.randint(VOCAB_SIZE, (size,)).tolist()


def draw_dataset(num_rows=NUM_ROWS):
    return [
        dict(prompt_ids=draw_ids(1, 5), chosen_ids=draw_ids(1, 9), rejected_ids=draw_ids(1, 9))
        for _ in range(num_rows)
    ]


def run(model, dataset, path, **options):
    return precompute_ref_logps(
        model, dataset, path, **{"batch_size": 2, "progress": False} | options
    )


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def journal_of(model, dataset, path, monkeypatch):
    """A whole journal, as it is before it becomes the file."""

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_precompute, "write_file", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(model, dataset, path)
    return path.with_name(path.name + ".partial")


class FakeTokenizer:
    special_tokens_map = {"eos_token": "</s>"}  # noqa: RUF012
    chat_template = "{{ messages }}"

    def get_vocab(self):
        return {"</s>": 0, "a": 1}
