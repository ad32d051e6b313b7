"""The benchmark of a DPO step: its batch, its parts, and that it refuses wrong results."""

import math
from types import SimpleNamespace

import pytest
import torch
from bench_programs import quiet_machine, read_csv  # noqa: F401  (a fixture)

from benchmarks import bench_dpo_step
from benchmarks.dpo_step import batch as batches
from benchmarks.dpo_step import peers
from benchmarks.dpo_step.rows import PARTS


class FakeTokenizer:
    """A token a character, modulo 61: a prime, so that the head's V is odd."""

    eos_token, eos_token_id = "\x02", 2
    chat_template = "yes"

    def get_chat_template(self, *, tools):
        return self.chat_template

    def apply_chat_template(
        self, messages, *, tokenize, tools, chat_template, add_generation_prompt=False
    ):
        text = "".join(f"<{m['role']}>{m['content']}\n" for m in messages)
        return text + "<assistant>" * add_generation_prompt

    def convert_ids_to_tokens(self, ids):
        return ["x"] * len(ids)

    def __call__(self, texts, add_special_tokens=True):
        if isinstance(texts, str):
            return SimpleNamespace(input_ids=[ord(c) % 61 for c in texts])
        return SimpleNamespace(input_ids=[[ord(c) % 61 for c in text] for text in texts])


@pytest.fixture
def bench(monkeypatch, quiet_machine):  # noqa: F811
    """The program with a tiny model; TRL cannot take its tokenizer."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    config.quantization_config = {"quant_method": "gguf"}  # as of a GGUF file: it must not survive
    model = transformers.LlamaForCausalLM(config)
    loaded = (model, FakeTokenizer())
    monkeypatch.setattr(batches, "load_causal_lm", lambda folder: loaded)

    def refuse(*inputs):
        raise TypeError("no tokenizer of transformers")

    monkeypatch.setattr(peers, "make_trainer", refuse)
    monkeypatch.setattr("benchmarks.common.peers.why_not", lambda name: None)
    return bench_dpo_step


def test_rows_and_what_was_not_run(bench, capsys, tmp_path):
    path = tmp_path / "rows.csv"
    options = ["--seq-len", "96", "--rounds", "2", "--no-plot"]
    assert bench.main([*options, "--csv", str(path)]) == 0
    out, _ = capsys.readouterr()
    rows = read_csv(path)
    assert [row["impl"] for row in rows] == ["logits", "dpo_triton"]
    for row in rows:
        assert float(row["loss"]) == pytest.approx(math.log(2), abs=1e-5)  # policy is reference
        assert float(row["value_error"]) < 1e-4
        parts = [float(row[part]) for part in PARTS]
        assert min(parts) > 0
        assert 0 < float(row["head_share"]) < 1
        assert 0 < int(row["scored"]) < int(row["tokens"]) == 4 * 96
    assert "not run: TRL: TypeError: no tokenizer of transformers" in out
    assert "share of head and log-probs of a step" in out


@pytest.mark.parametrize(
    "wrong", [lambda v: v + 0.01, lambda v: v + (v * 0.1 - v.detach() * 0.1)], ids=["value", "grad"]
)
def test_refuses_to_time_wrong_results(bench, monkeypatch, capsys, tmp_path, wrong):
    right = peers.fused_linear_seq_logprob
    monkeypatch.setattr(peers, "fused_linear_seq_logprob", lambda *a, **k: wrong(right(*a, **k)))
    path = tmp_path / "rows.csv"
    options = ["--seq-len", "96", "--rounds", "1", "--no-plot", "--csv", str(path)]
    assert bench.main(options) == 1
    assert "wrong results, so nothing is timed" in capsys.readouterr().err
    assert not path.exists()


def test_pairs_follow_one_another_until_a_sequence_is_full():
    batch = batches.make_batch(FakeTokenizer(), batches.DATA, 300)
    assert batch.input_ids.shape == (4, 300)
    # A prompt again after the first answer: more than one pair in each sequence.
    starts = (batch.completion_mask.diff(dim=1) == 1).sum(1)
    assert (starts >= 2).all()
    # Chosen and rejected begin with one prompt.
    num_prompt = int(batch.completion_mask[0].argmax())
    assert torch.equal(batch.input_ids[0, :num_prompt], batch.input_ids[2, :num_prompt])
