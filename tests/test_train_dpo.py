"""examples/train_dpo.py on a tiny Llama: steps, resuming, evaluation, comparison, bad input."""

import copy
import json
import os
from pathlib import Path

import comparison
import preference_training
import preparation
import pytest
import torch
import train_dpo
from causal_lm import load_model, load_tokenizer, without_quantisation
from tiny_llama import save_tiny_llama

from dpo_triton.losses import LOSSES
from dpo_triton.precompute import RefLogps

os.environ.setdefault("HF_HUB_OFFLINE", "1")
for package in ("transformers", "peft", "safetensors", "tqdm", "matplotlib"):
    pytest.importorskip(package)

ROWS = [
    dict(prompt="hi there", chosen="yes one two", rejected="no never"),
    dict(prompt="one and", chosen="two", rejected="too many of them"),
    dict(prompt="two and", chosen="three", rejected="many many"),
    dict(
        prompt=[dict(role="user", content="hi")],
        chosen=[dict(role="assistant", content="yes yes")],
        rejected=[dict(role="assistant", content="no , no , never")],
    ),
    dict(prompt="no", chosen="never", rejected="hi hi hi hi hi hi"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "pairs.jsonl", ROWS)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(tiny, data, output, *more):
    """A short run; later options win."""
    options = dict(model=tiny, data=data, output=output, steps=4, lr=1e-2, holdout=0.4)
    options["batch-size"] = 2
    return [x for k, v in options.items() for x in (f"--{k}", str(v))] + [str(m) for m in more]


def losses_of(output):
    return [step["loss"] for step in json.loads((output / "report.json").read_text())["steps"]]


def test_trains_and_writes_all_that_it_says(tiny, data, tmp_path, capsys):
    assert train_dpo.main(command(tiny, data, tmp_path / "out", "--steps", 30)) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    losses = losses_of(tmp_path / "out")
    assert losses[0] == pytest.approx(0.6931472, abs=1e-6)  # policy and reference are one
    assert sum(losses[-5:]) / 5 < 0.4
    assert (report["train_pairs"], report["held_out_pairs"]) == (3, 2)
    before, after = report["evaluations"]
    assert before["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert (before["margin"], before["reward_accuracy"]) == (0, 0.5)
    assert after != before
    assert (tmp_path / "out" / "training.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "model" / "adapter_config.json").exists()
    printed = capsys.readouterr().out
    assert "5 pairs, 0 answers cut short" in printed
    assert "2 held-out pairs" in printed


@pytest.mark.parametrize("more", [(), ("--full", "--loss", "simpo")], ids=["lora", "full"])
def test_a_stopped_run_goes_on_with_the_losses_of_one_that_was_not(
    tiny, data, tmp_path, monkeypatch, capsys, more
):
    whole = command(tiny, data, tmp_path / "whole", "--steps", 5, *more)
    assert train_dpo.main(whole) == 0
    stopped = command(tiny, data, tmp_path / "stopped", "--steps", 5, "--save-every", 2, *more)
    clip, calls = preference_training.nn.utils.clip_grad_norm_, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 4:  # the fourth step, after the checkpoint of the second
            raise KeyboardInterrupt
        return clip(*args)

    with monkeypatch.context() as patch:
        patch.setattr(preference_training.nn.utils, "clip_grad_norm_", killed)
        with pytest.raises(KeyboardInterrupt):
            train_dpo.main(stopped)
    assert train_dpo.main(stopped) == 2  # neither overwritten nor resumed unasked
    assert "--resume" in capsys.readouterr().err
    assert train_dpo.main([*stopped, "--resume"]) == 0
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "whole")
    weights = "model.safetensors" if more else "adapter_model.safetensors"
    contents = [(tmp_path / run / "model" / weights).read_bytes() for run in ("stopped", "whole")]
    assert contents[0] == contents[1]


def test_a_run_resumes_with_its_own_settings_and_data_alone(tiny, data, tmp_path, capsys):
    run = command(tiny, data, tmp_path / "out", "--resume")
    assert train_dpo.main(run) == 0
    assert "starting at step 0" in capsys.readouterr().out
    for option, value in (("--lr", "1e-4"), ("--accumulate", "2"), ("--loss", "ipo")):
        assert train_dpo.main([*run, option, value]) == 2
        assert f"{option} must be" in capsys.readouterr().err
    (tmp_path / "changed").mkdir()
    changed = write(tmp_path / "changed" / data.name, [*ROWS[:-1], ROWS[0]])
    other = command(tiny, changed, tmp_path / "out", "--resume")
    assert train_dpo.main(other) == 2
    assert "--data must be ['pairs.jsonl (" in capsys.readouterr().err


@pytest.fixture(scope="module")
def start(tiny, data, tmp_path_factory):
    """A start for each loss in turn: loading it is what takes time."""
    argv = command(tiny, data, tmp_path_factory.mktemp("setup"))
    setup = train_dpo.prepare(train_dpo.parse_args(argv))
    return setup, copy.deepcopy(setup.model.state_dict())


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_every_loss_moves_the_policy(loss, start, tiny, data, tmp_path):
    setup, weights = start
    setup.model.load_state_dict(weights)
    more = ("--loss-option", "kl=0") if loss == "kto" else ()
    argv = command(tiny, data, tmp_path / "out", "--loss", loss, "--beta", "0.5", *more)
    args = train_dpo.parse_args(argv)
    before = {k: p.clone() for k, p in setup.model.named_parameters() if p.requires_grad}
    score = preference_training.fused_scorer("auto")
    steps = preference_training.train(
        setup.model, setup.train_rows, setup.train_ref, train_dpo.options_of(args), score
    )
    assert all(torch.isfinite(torch.tensor(step)).all() for step in steps)
    after = dict(setup.model.named_parameters())
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_compare_finds_the_same_losses_with_and_without_logits(
    tiny, data, tmp_path, monkeypatch, capsys
):
    alone = command(tiny, data, tmp_path / "alone")
    assert train_dpo.main(alone) == 0
    argv = command(tiny, data, tmp_path / "out", "--compare", 3)
    assert train_dpo.main(argv) == 0
    printed = capsys.readouterr().out
    assert "The first 3 steps took without logits" in printed
    table = printed.partition("difference\n")[2].splitlines()
    steps = [line.split() for line in table if line[:1].isdigit()][:3]
    assert all(float(difference) <= 1e-5 for *_, difference in steps)
    assert float(steps[0][1]) != float(steps[-1][1])  # it did train
    assert any(line.startswith("seconds") for line in table)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [len(result["losses"]) for result in report["comparison"]] == [3, 3]
    assert losses_of(tmp_path / "out") == losses_of(tmp_path / "alone")  # the policy was put back

    def wrong(*args):
        values, lengths = correct(*args)
        return values * 1.001, lengths

    correct = comparison.score_materialised
    monkeypatch.setattr(comparison, "score_materialised", wrong)
    monkeypatch.setattr(preference_training, "MAX_FIRST_DIFFERENCE", 1.0)
    argv = command(tiny, data, tmp_path / "wrong", "--compare", 3)
    assert train_dpo.main(argv) == 1
    assert "losses differ" in capsys.readouterr().err


def test_evaluation_counts_a_tie_as_half_and_knows_sums_from_means():
    # Pairs: longer chosen answers, with the smaller sum and the larger mean; then a tie.
    policy = RefLogps(
        torch.tensor([-4.0, -1.0]),
        torch.tensor([-3.0, -1.0]),
        torch.tensor([8, 1]),
        torch.tensor([1, 1]),
    )
    reference = RefLogps(torch.tensor([-6.0, -1.0]), torch.tensor([-3.0, -1.0]), *policy[2:])
    options = preference_training.Options("sigmoid", 0.5, {}, 1.0, 1, 1, 0)
    result = preference_training.evaluate(options, policy, reference)
    assert result.margin == pytest.approx(0.5)  # beta times (2 - 0), and 0
    assert result.reward_accuracy == 0.75
    assert result.sum_accuracy == 0.25
    assert result.mean_accuracy == 0.75


def test_an_epoch_has_each_row_once_in_another_order():
    numbers = [preference_training.batch_numbers(7, 3, 5, step) for step in range(7)]
    flat = [number for step in numbers for number in step]
    epochs = [flat[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert numbers == [preference_training.batch_numbers(7, 3, 5, step) for step in range(7)]


def test_an_answer_that_truncation_empties_is_left_out_and_reported(tiny, tmp_path, capsys):
    long = dict(prompt="hi " * 20, chosen="yes", rejected="no")
    path = write(tmp_path / "pairs.jsonl", [*ROWS, long])
    tokenizer, _ = load_tokenizer(tiny)
    args = train_dpo.parse_args(command(tiny, path, tmp_path / "out"))
    rows = preparation.read_rows(args, [path], "tokens", tokenizer, 6, 20)
    assert [row["source"] for row in rows] == [f"{path}:{n}" for n in range(1, 6)]
    printed = capsys.readouterr().out
    assert "6 pairs, 6 answers cut short" in printed
    assert f"1 with an answer that is empty, or cut to nothing: {path}:6" in printed
    assert max(len(row["prompt_ids"]) + len(row["rejected_ids"]) for row in rows) == 6
    with pytest.raises(ValueError, match="--max-length 1 leaves no answer"):
        preparation.read_rows(args, [path], "tokens", tokenizer, 1, 20)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "no pairs in"),
        ('{"prompt": "hi", "chosen": "yes"}\n', "pairs.jsonl:1: a row must have rejected"),
        (json.dumps(ROWS[0]) + "\n{\n", "pairs.jsonl:2: a row must be one JSON object"),
        (json.dumps(ROWS[0]) + "\n", "leaves none to train on"),
    ],
    ids=["empty", "missing key", "broken line", "none left"],
)
def test_bad_data_is_an_error_that_names_it(text, expected, tiny, tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    assert train_dpo.main(command(tiny, path, tmp_path / "out", "--holdout", "0.9")) == 2
    assert expected in capsys.readouterr().err


def test_a_label_outside_the_models_vocabulary_is_an_error_that_names_the_line(
    data, tmp_path, capsys
):
    small = save_tiny_llama(tmp_path / "small", vocab_size=12)
    assert train_dpo.main(command(small, data, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "pairs.jsonl:1: token ids must be in [0, 12)" in error


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--loss-option", "simpo_gamma=1"), "simpo_gamma is an option of simpo"),
        (("--loss-option", "gamma=1"), "is no option of any loss"),
        (("--loss", "kto"), "kl is needed"),
        (("--beta", "0"), "beta must be positive"),
        (("--model", "absent"), "--model must be a folder"),
        (("--data", "absent.jsonl"), "absent.jsonl"),
    ],
)
def test_an_option_that_does_not_fit_is_an_error(more, expected, tiny, data, tmp_path, capsys):
    assert train_dpo.main(command(tiny, data, tmp_path / "out", *more)) == 2
    assert expected in capsys.readouterr().err


def test_held_out_pairs_of_their_own_file(tiny, data, tmp_path):
    argv = command(tiny, data, tmp_path / "out", "--eval-data", data, "--limit", 2, "--steps", 1)
    assert train_dpo.main(argv) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["train_pairs"], report["held_out_pairs"]) == (2, 2)


def test_without_a_held_out_pair_it_trains_and_draws(tiny, data, tmp_path):
    argv = command(tiny, data, tmp_path / "out", "--holdout", 0, "--steps", 1)
    assert train_dpo.main(argv) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["evaluations"] == []
    assert (tmp_path / "out" / "training.png").exists()


def test_a_model_that_is_tagged_as_quantised_is_copied(tiny):
    model = load_model(tiny, torch.device("cpu"), torch.float32)
    model.config.quantization_config = {"quant_method": "gguf"}
    copied = without_quantisation(model)
    assert copied is not model
    assert not hasattr(copied.config, "quantization_config")
    assert hasattr(model.config, "quantization_config")
    ids = torch.randint(19, (2, 5))
    assert torch.equal(copied(ids).logits, model(ids).logits)
