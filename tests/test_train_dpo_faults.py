"""examples/train_dpo.py where something is wrong: stopped at once, in a line, with nothing lost."""

import importlib.util
import json

import preference_training
import pytest
import torch
import train_dpo
import training_plot
from causal_lm import load_model
from checkpoints import locked
from test_train_dpo import ROWS, command, losses_of, write
from tiny_llama import save_tiny_llama, save_tokenizer

from dpo_triton import _backends

for package in ("transformers", "peft", "safetensors", "tqdm", "matplotlib"):
    pytest.importorskip(package)

LN_2 = 0.6931472
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory):
    """With dropout, and positions for 12 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = save_tokenizer(tmp_path_factory.mktemp("gpt2"))
    torch.manual_seed(0)
    sizes = dict(n_embd=16, n_layer=2, n_head=2, n_positions=12, vocab_size=20)
    rates = dict(resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    GPT2LMHeadModel(GPT2Config(initializer_range=0.5, **sizes, **rates)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "pairs.jsonl", ROWS)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """It takes most of a short run's time."""
    monkeypatch.setattr(training_plot, "plot", lambda *args: None)


def refused(argv, capsys):
    """What an unusable input is answered with, which is one line."""
    assert train_dpo.main(argv) == 2
    printed = capsys.readouterr().err
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in printed
    return errors[0]


def test_an_adapter_as_model_is_merged_and_the_next_one_stands_on_it(tiny, data, tmp_path, capsys):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    assert train_dpo.main(command(tiny, data, first)) == 0
    assert train_dpo.main(command(first / "model", data, second)) == 0
    assert "is an adapter: merged into its base" in capsys.readouterr().out
    assert losses_of(second)[0] == pytest.approx(LN_2, abs=1e-5)

    # The second adapter's base is the first merged, and any program finds it.
    ids = torch.randint(19, (2, 5))
    merged = load_model(first / "model", CPU, torch.float32)(ids).logits
    base = load_model(second / "base", CPU, torch.float32)(ids).logits
    torch.testing.assert_close(base, merged)
    from peft import AutoPeftModelForCausalLM

    theirs = AutoPeftModelForCausalLM.from_pretrained(second / "model").eval()(ids).logits
    ours = load_model(second / "model", CPU, torch.float32)(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, merged, atol=1e-2)

    assert train_dpo.main(command(second / "model", data, third, "--full", "--lr", 0)) == 0
    before, after = json.loads((third / "report.json").read_text())["evaluations"]
    assert after == pytest.approx(before, abs=1e-5)

    config = second / "model" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(second / "base"), "elsewhere"))
    error = refused(command(second / "model", data, tmp_path / "fourth"), capsys)
    assert "base_model_name_or_path in" in error
    assert "got elsewhere" in error


def test_dropout_is_off_unless_asked_for(tiny_gpt2, data, tmp_path):
    runs = {}
    for name, more in {"off": (), "on": ("--dropout",)}.items():
        argv = command(tiny_gpt2, data, tmp_path / name, "--steps", 2, *more)
        assert train_dpo.main(argv) == 0
        runs[name] = losses_of(tmp_path / name)
    assert runs["off"][0] == pytest.approx(LN_2, abs=1e-6)
    assert abs(runs["on"][0] - LN_2) > 1e-3


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_a_policy_that_is_not_its_reference_at_first_stops_the_run(
    loss, tiny, data, tmp_path, monkeypatch, capsys
):
    right = train_dpo.fused_scorer

    def noisy(backend):
        def score(*args):
            values, lengths = right(backend)(*args)
            return values + torch.arange(len(values)) * 0.5, lengths

        return score

    monkeypatch.setattr(train_dpo, "fused_scorer", noisy)
    error = refused(command(tiny, data, tmp_path / "out", "--loss", loss), capsys)
    assert "the first loss must be" in error
    assert not (tmp_path / "out" / "model").exists()


def test_training_stops_at_the_first_loss_that_is_no_number_and_keeps_the_last_good_weights(
    tiny, data, tmp_path, capsys
):
    out = tmp_path / "out"
    argv = command(tiny, data, out, "--lr", 1e30, "--steps", 8, "--save-every", 1)
    assert train_dpo.main(argv) == 1
    error = capsys.readouterr().err
    assert "error: step " in error
    assert "checkpoint.pt has the last good weights" in error
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert 0 < len(state["steps"]) < 8
    assert all(torch.isfinite(p).all() for p in state["parameters"].values())
    assert not (out / "model").exists()
    assert not (out / "report.json").exists()


def test_weights_that_are_no_numbers_are_not_saved(tiny, data, tmp_path, monkeypatch, capsys):
    def spoil(parameters, max_norm):
        next(iter(parameters)).grad.fill_(float("nan"))
        return torch.tensor(1.0)  # of a gradient that overflows after it was measured

    monkeypatch.setattr(preference_training.nn.utils, "clip_grad_norm_", spoil)
    assert train_dpo.main(command(tiny, data, tmp_path / "out", "--save-every", 1)) == 1
    assert "is not finite" in capsys.readouterr().err
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def test_a_folder_in_use_is_refused_before_any_work(tiny, data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr(train_dpo, "prepare", lambda args: pytest.fail("worked"))
    with locked(out):
        assert "is in use by another run" in refused(command(tiny, data, out), capsys)
    monkeypatch.undo()
    monkeypatch.setattr(training_plot, "plot", lambda *args: None)
    assert train_dpo.main(command(tiny, data, out, "--steps", 1)) == 0


@pytest.fixture
def done(tiny, data, tmp_path):
    """The command of a run of four steps, and its folder."""
    argv = command(tiny, data, tmp_path / "out")
    assert train_dpo.main(argv) == 0
    return argv, tmp_path / "out"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_checkpoint_that_is_empty_or_cut_is_refused_before_any_work(
    share, done, monkeypatch, capsys
):
    argv, out = done
    content = (out / "checkpoint.pt").read_bytes()
    (out / "checkpoint.pt").write_bytes(content[: int(share * len(content))])
    monkeypatch.setattr(train_dpo, "prepare", lambda args: pytest.fail("worked"))
    assert "checkpoint.pt is no whole checkpoint" in refused([*argv, "--resume"], capsys)


def test_a_full_disk_leaves_the_last_checkpoint(done, monkeypatch, capsys):
    argv, out = done
    content = (out / "checkpoint.pt").read_bytes()

    def full(state, path):
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    error = refused([*argv, "--resume", "--steps", "6"], capsys)
    assert "checkpoint.pt cannot be written, the last one stays" in error
    assert (out / "checkpoint.pt").read_bytes() == content
    assert not list(out.glob("*.tmp"))


def test_a_run_resumes_with_more_steps_and_not_with_fewer(done, capsys):
    argv, out = done
    losses = losses_of(out)
    assert "--steps must be at least 4" in refused([*argv, "--resume", "--steps", "3"], capsys)
    assert train_dpo.main([*argv, "--resume", "--steps", "6"]) == 0
    assert "--steps 6, once 4: from step 4 on the learning rate" in capsys.readouterr().out
    assert losses_of(out)[:4] == losses
    assert len(losses_of(out)) == 6


def test_a_resumed_run_has_the_tokens_that_it_began_with(done, tiny, monkeypatch):
    argv, out = done
    tokens = (out / "tokens" / "tokens.bin").stat()
    monkeypatch.setattr("dpo_triton.data.PairTokenizer.__call__", lambda *a: pytest.fail("again"))
    assert train_dpo.main([*argv, "--resume", "--steps", "5"]) == 0
    assert (out / "tokens" / "tokens.bin").stat().st_mtime_ns == tokens.st_mtime_ns


@pytest.mark.parametrize("loss", ["sigmoid", "orpo", "sft", "cpo"])
def test_a_batch_in_parts_gives_the_losses_of_the_whole(loss, tiny, data, tmp_path):
    runs = []
    for parts in (1, 2, 3):
        argv = command(tiny, data, tmp_path / str(parts), "--batch-size", 3, "--loss", loss)
        assert train_dpo.main([*argv, "--accumulate", str(parts)]) == 0
        runs.append(losses_of(tmp_path / str(parts)))
    assert runs[1] == pytest.approx(runs[0], rel=1e-3)
    assert runs[2] == pytest.approx(runs[0], rel=1e-3)
    assert runs[0][0] != runs[0][-1]


def test_rows_longer_than_the_models_positions_are_cut_or_refused(
    tiny_gpt2, data, tmp_path, capsys
):
    long = [*ROWS, dict(prompt="hi " * 9, chosen="yes " * 9, rejected="no")]
    path = write(tmp_path / "pairs.jsonl", long)
    assert train_dpo.main(command(tiny_gpt2, path, tmp_path / "out", "--steps", 1)) == 0
    assert "6 pairs, 1 answers cut short" in capsys.readouterr().out
    argv = command(tiny_gpt2, path, tmp_path / "more", "--max-length", 13)
    assert "--max-length must be at most 12, the model's, got 13" in refused(argv, capsys)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--backend", "triton"), "--backend triton on cpu"),
        (("--eval-data", "absent.jsonl"), "absent.jsonl"),
        (("--accumulate", "3"), "--accumulate must be at most --batch-size, got 3"),
        (("--accumulate", "2", "--loss", "aot"), "--loss aot sorts the batch"),
        (("--lr", "nan"), "--lr must be finite"),
    ],
)
def test_an_option_that_cannot_be_served_is_refused_before_any_work(
    more, expected, tiny, data, tmp_path, monkeypatch, capsys
):
    if torch.cuda.is_available():
        pytest.skip("a GPU serves Triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(_backends, "_resolved", _backends._resolved.__wrapped__)
    monkeypatch.setattr(train_dpo, "prepare", lambda args: pytest.fail("worked"))
    assert expected in refused(command(tiny, data, tmp_path / "out", *more), capsys)


@pytest.mark.parametrize("name", ["matplotlib", "peft"])
def test_a_missing_package_is_named_before_any_work(
    name, tiny, data, tmp_path, monkeypatch, capsys
):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == name else found(n))
    error = refused(command(tiny, data, tmp_path / "out"), capsys)
    assert error == f"error: {name} must be installed, and is not"


def test_an_output_that_cannot_be_made_is_refused(tiny, data, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "file" in refused(command(tiny, data, tmp_path / "file" / "out"), capsys)


def test_a_bad_row_is_refused_or_left_out_and_a_template_that_raises_names_it(
    tiny, tmp_path, capsys
):
    bad = dict(ROWS[3], tools=[{"name": "f"}])
    path = write(tmp_path / "pairs.jsonl", [*ROWS, bad])
    argv = command(tiny, path, tmp_path / "out", "--steps", 1)
    assert "pairs.jsonl:6: the row has tools" in refused(argv, capsys)
    assert train_dpo.main([*argv, "--skip-bad-rows"]) == 0
    printed = capsys.readouterr().out
    assert "1 rows left out, since they cannot be used:" in printed
    assert "pairs.jsonl:6: the row has tools" in printed


def test_only_the_assistants_turns_are_trained_on(tiny, tmp_path):
    turns = [
        dict(role="assistant", content="yes"),
        dict(role="user", content="one two three"),
        dict(role="assistant", content="two"),
    ]
    rows = [dict(ROWS[3], chosen=turns)] * 4
    path = write(tmp_path / "pairs.jsonl", rows)
    args = train_dpo.parse_args(command(tiny, path, tmp_path / "out"))
    setup = train_dpo.prepare(args)
    assert setup.train_ref.chosen_lengths.tolist() == [4, 4]  # yes <end> two <end>


def test_the_verdict_knows_learning_from_chance():
    assert "has learnt the preference" in preference_training.verdict(0.96, 50)
    for accuracy, num_pairs in ((0.5, 50), (0.6, 50), (1.0, 4), (0.0, 50)):
        assert "may be chance" in preference_training.verdict(accuracy, num_pairs)
    assert "in 48 (96%" in preference_training.verdict(0.96, 50)
