"""precompute_ref_logps: values, a file whole or absent, going on after any stop, refusals."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dpo_triton.precompute import (
    RefLogps,
    _precompute,
    _ref_file,
    collate,
    model_fingerprint,
    precompute_ref_logps,
    tokenizer_fingerprint,
)

safetensors = pytest.importorskip("safetensors")

VOCAB_SIZE = 37
NUM_ROWS = 7  # and batches of 2: the last one is short
TESTS = Path(__file__).parent


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


def exact_logps(model, prompt, answer):
    """Token log-probabilities of one answer, alone, in float64."""
    wide = TinyModel().double().eval()
    wide.load_state_dict(model.state_dict())
    ids = torch.tensor([[*prompt, *answer]])
    log_p = wide(ids).logits[0].log_softmax(-1)
    return torch.stack([log_p[t - 1, ids[0, t]] for t in range(len(prompt), ids.shape[1])])


def test_values_are_those_of_each_answer_alone_in_float64(tmp_path):
    model, dataset = TinyModel(), draw_dataset()
    ref_logps = run(model, dataset, tmp_path / "ref.safetensors")
    assert [field.shape for field in ref_logps] == [(NUM_ROWS,)] * 4
    assert ref_logps.chosen.dtype == torch.float32
    for side in ("chosen", "rejected"):
        exact = [exact_logps(model, row["prompt_ids"], row[f"{side}_ids"]) for row in dataset]
        assert getattr(ref_logps, f"{side}_lengths").tolist() == [len(e) for e in exact]
        at = ("chosen", "rejected").index(side)
        for reduction, truth in (("sum", torch.Tensor.sum), ("mean", torch.Tensor.mean)):
            values = ref_logps.logps(reduction)[at]
            expected = torch.stack([truth(e) for e in exact])
            torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match='reduction must be "sum" or "mean"'):
        ref_logps.logps("max")


def test_a_float64_model_keeps_its_digits(tmp_path):
    model, dataset = TinyModel().double(), draw_dataset(1)
    row = dataset[0]
    for _ in range(2):  # computed, then read
        ref_logps = run(model, dataset, tmp_path / "ref.safetensors")
        assert ref_logps.chosen.dtype == torch.float64
        exact = exact_logps(model, row["prompt_ids"], row["chosen_ids"]).sum()
        assert ref_logps.chosen[0] == pytest.approx(exact.item(), rel=1e-12)


def test_a_whole_file_is_read_and_nothing_computed(tmp_path):
    model, dataset, path = TinyModel(), draw_dataset(), tmp_path / "new" / "ref.safetensors"
    first = run(model, dataset, path)
    assert model.batches == [4, 4, 4, 2]  # chosen and rejected
    content = path.read_bytes()
    again = run(model, dataset, path, batch_size=5)  # how it was made does not matter
    assert len(model.batches) == 4
    assert equal(first, again)
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == [path.name]
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == _ref_file.FORMAT
    assert set(metadata) == {"format", "model", "tokenizer", "num_rows", "dpo_triton"}


def journal_of(model, dataset, path, monkeypatch):
    """A whole journal, as it is before it becomes the file."""

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_precompute, "write_file", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(model, dataset, path)
    return path.with_name(path.name + ".partial")


def test_it_goes_on_from_a_journal_that_ends_anywhere(tmp_path, monkeypatch):
    model, dataset, path = TinyModel(), draw_dataset(), tmp_path / "ref.safetensors"
    expected = run(model, dataset, path)
    path.unlink()
    journal = journal_of(model, dataset, path, monkeypatch)
    content, record = journal.read_bytes(), _ref_file.RECORD.itemsize
    header = len(content) - NUM_ROWS * record
    # Within the header, after it, within a record, after a record of a batch, after each batch.
    ends = [0, 1, header - 1, header, header + 1, header + record, header + 2 * record]
    ends += [header + 3 * record + 17, header + 6 * record, len(content) - 1, len(content)]
    for end in ends:
        path.unlink(missing_ok=True)
        journal.write_bytes(content[:end])
        model.batches.clear()
        assert equal(run(model, dataset, path), expected), end
        assert equal(run(model, dataset, path), expected), end  # as read
        assert not journal.exists()
        num_whole = max(0, end - header) // record  # rows
        num_kept = num_whole if num_whole == NUM_ROWS else num_whole // 2 * 2
        assert sum(model.batches) == 2 * (NUM_ROWS - num_kept), end


def test_another_batch_size_may_go_on(tmp_path, monkeypatch):
    model, dataset, path = TinyModel(), draw_dataset(), tmp_path / "ref.safetensors"
    expected = run(model, dataset, path)
    path.unlink()
    journal = journal_of(model, dataset, path, monkeypatch)
    journal.write_bytes(journal.read_bytes()[: -_ref_file.RECORD.itemsize])
    ours = run(model, dataset, path, batch_size=4)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


KILLED = """
import os, signal, sys
import torch
from test_precompute import TinyModel, run
dataset = torch.load(sys.argv[1])
fsync, calls = os.fsync, []
def fsync_or_die(descriptor):
    calls.append(1)
    if len(calls) == 3:  # the third batch is written, and perhaps on the disk
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)
os.fsync = fsync_or_die
run(TinyModel(), dataset, sys.argv[2])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
def test_a_killed_process_loses_no_row_and_repeats_none(tmp_path):
    model, dataset, path = TinyModel(), draw_dataset(), tmp_path / "ref.safetensors"
    torch.save(dataset, tmp_path / "dataset.pt")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "dataset.pt"), str(path)]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not path.exists()
    resumed = run(model, dataset, path)
    assert sum(model.batches) == 2  # the last row of 7
    assert equal(resumed, run(model, dataset, tmp_path / "whole.safetensors"))


def test_killed_between_file_and_journal(tmp_path, monkeypatch):
    model, dataset, path = TinyModel(), draw_dataset(), tmp_path / "ref.safetensors"
    journal = journal_of(model, dataset, path, monkeypatch)
    content = journal.read_bytes()
    expected = run(model, dataset, path)
    journal.write_bytes(content)
    assert equal(run(model, dataset, path), expected)
    assert not journal.exists()


def others(model, dataset):
    """What the file was not made for: model, tokenizer, data set, and the complaint."""
    config = TinyModel(rope_theta=2.0)
    shorter, longer = dataset[:-1], [*dataset, dataset[0]]
    swapped = [dataset[1], dataset[0], *dataset[2:]]
    changed = [dict(row) for row in dataset]
    changed[4]["rejected_ids"] = [*changed[4]["rejected_ids"], 5]
    moved = [dict(row) for row in dataset]  # the same tokens, another border
    moved[2]["prompt_ids"] = [*moved[2]["prompt_ids"], moved[2]["chosen_ids"][0]]
    moved[2]["chosen_ids"] = moved[2]["chosen_ids"][1:]
    return {
        "weights": (TinyModel(seed=1), None, dataset, "made for another model"),
        "dtype": (TinyModel().double(), None, dataset, "made for another model"),
        "configuration": (config, None, dataset, "made for another model"),
        "tokenizer": (model, FakeTokenizer(), dataset, "made for another tokenizer"),
        "fewer": (model, None, shorter, "made for another number of rows"),
        "more": (model, None, longer, "made for another number of rows"),
        "order": (model, None, swapped, r"row 0 is not the one .* \(2 of 7 differ\)"),
        "row": (model, None, changed, r"row 4 is not the one .* \(1 of 7 differ\)"),
        "border": (model, None, moved, "row 2 is not the one"),
    }


class FakeTokenizer:
    special_tokens_map = {"eos_token": "</s>"}  # noqa: RUF012
    chat_template = "{{ messages }}"

    def get_vocab(self):
        return {"</s>": 0, "a": 1}


@pytest.mark.parametrize("is_complete", [True, False], ids=["file", "journal"])
def test_another_model_tokenizer_or_data_set_is_refused(is_complete, tmp_path, monkeypatch):
    model, path = TinyModel(), tmp_path / "ref.safetensors"
    dataset = draw_dataset()
    dataset[0]["chosen_ids"] = [1, 2]  # unlike row 1, whatever was drawn
    dataset[1]["chosen_ids"] = [2, 1]
    if is_complete:
        run(model, dataset, path)
        kept = path
    else:
        kept = journal_of(model, dataset, path, monkeypatch)
    content = kept.read_bytes()
    for name, (other, tokenizer, rows, complaint) in others(model, dataset).items():
        with pytest.raises(ValueError, match=complaint) as error:
            run(other, rows, path, tokenizer=tokenizer)
        assert "delete" in str(error.value), name
        assert kept.read_bytes() == content, name
    run(model, dataset, path)


def test_where_a_model_came_from_does_not_matter(tmp_path):
    dataset, path = draw_dataset(), tmp_path / "ref.safetensors"
    run(TinyModel(_name_or_path="here", transformers_version="5.0"), dataset, path)
    run(TinyModel(_name_or_path="there", transformers_version="5.1"), dataset, path)


def test_a_tokenizer_is_known_by_vocabulary_special_tokens_and_template():
    assert tokenizer_fingerprint(FakeTokenizer()) == tokenizer_fingerprint(FakeTokenizer())
    other_vocab, other_special, other_template = (FakeTokenizer() for _ in range(3))
    other_vocab.get_vocab = lambda: {"</s>": 0, "b": 1}
    other_special.special_tokens_map = {"eos_token": "a"}
    other_template.chat_template = "{{ messages[0] }}"
    every = [FakeTokenizer(), other_vocab, other_special, other_template, None]
    assert len({tokenizer_fingerprint(tokenizer) for tokenizer in every}) == 5


def test_every_tensor_of_a_model_counts_and_its_first_and_late_elements():
    base = model_fingerprint(TinyModel())
    assert base == model_fingerprint(TinyModel())
    for name in ("embedding.weight", "head.weight"):
        for at in (0, -VOCAB_SIZE * 8 // 64):  # the last of 64 elements, spread over all
            model = TinyModel()
            model.get_parameter(name).data.view(-1)[at] += 1e-3
            assert model_fingerprint(model) != base, (name, at)


@pytest.mark.parametrize("empty", ["chosen_ids", "rejected_ids"])
def test_an_empty_answer_gives_zero_and_is_reported(empty, tmp_path):
    dataset = draw_dataset()
    dataset[3][empty] = []
    for _ in range(2):  # reported when read, too
        with pytest.warns(UserWarning, match="1 of 7 rows have an answer without a token.*: 3;"):
            ref_logps = run(TinyModel(), dataset, tmp_path / f"{empty}.safetensors")
    side = empty.removesuffix("_ids")
    assert getattr(ref_logps, side)[3] == 0
    assert getattr(ref_logps, f"{side}_lengths")[3] == 0
    assert all(values.isfinite().all() for values in ref_logps.logps("mean"))


def test_a_data_set_without_rows(tmp_path):
    for _ in range(2):
        ref_logps = run(TinyModel(), [], tmp_path / "ref.safetensors")
        assert [field.shape for field in ref_logps] == [(0,)] * 4


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (dict(chosen_ids=[1, VOCAB_SIZE]), r"chosen_ids must be in \[0, 37\), got 37"),
        (dict(rejected_ids=[-100, 1]), r"rejected_ids must be in \[0, 37\), got -100"),
        (dict(chosen_ids=[0.5]), "chosen_ids must be a list of token ids"),
        (dict(chosen_ids=[[1], [2]]), "chosen_ids must be a list of token ids"),
        (dict(chosen_ids="text"), "chosen_ids must be a list of token ids"),
        (dict(prompt_ids=[]), "prompt_ids must have a token at least"),
        (None, "must have prompt_ids, chosen_ids, rejected_ids, got prompt, chosen_ids"),
    ],
)
def test_a_row_that_cannot_be_scored_is_an_error_before_any_is(change, complaint, tmp_path):
    model, dataset = TinyModel(), draw_dataset()
    if change is None:
        dataset[5] = dict(prompt="text", chosen_ids=[1])
    else:
        dataset[5].update(change)
    with pytest.raises(ValueError, match=f"row 5: {complaint}"):
        run(model, dataset, tmp_path / "ref.safetensors")
    assert not model.batches
    assert not list(tmp_path.iterdir())


def test_a_value_that_is_not_finite_is_an_error_that_names_the_row(tmp_path):
    model, dataset = TinyModel(), draw_dataset()
    for row in dataset:
        for ids in row.values():
            ids[:] = [i % 30 for i in ids]
    dataset[3]["chosen_ids"] = [1, 33, 2]  # the embedding of 33 alone is NaN
    model.embedding.weight.data[33] = torch.nan
    with pytest.raises(ValueError, match="row 3: log-probabilities must be finite, got nan"):
        run(model, dataset, tmp_path / "ref.safetensors")


def test_the_model_keeps_its_modes_and_is_scored_without_dropout(tmp_path):
    model, dataset = TinyModel(), draw_dataset()
    model.train()
    model.embedding.eval()
    ours = run(model, dataset, tmp_path / "train.safetensors")
    assert (model.training, model.embedding.training, model.dropout.training) == (True, False, True)
    assert equal(ours, run(model.eval(), dataset, tmp_path / "eval.safetensors"))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_another_file_is_refused_and_left(tmp_path):
    path = tmp_path / "ref.safetensors"
    for content in (b"", b"text", safetensors.serialize({}, {"format": "pt"})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"ref\.safetensors"):
            run(TinyModel(), draw_dataset(), path)
        assert path.read_bytes() == content
    path.unlink()
    journal = tmp_path / "ref.safetensors.partial"
    for content in (b"text", b"text\n", b"[1]\n"):
        journal.write_bytes(content)
        with pytest.raises(ValueError, match="is no journal of precompute_ref_logps"):
            run(TinyModel(), draw_dataset(), path)
        assert journal.read_bytes() == content


def test_two_writers_are_noticed(tmp_path, monkeypatch):
    model, dataset, path = TinyModel(), draw_dataset(), tmp_path / "ref.safetensors"
    journal = journal_of(model, dataset, path, monkeypatch)
    with open(journal, "ab") as file:
        file.write(journal.read_bytes()[-_ref_file.RECORD.itemsize :])
    with pytest.raises(ValueError, match="must have at most 7 rows, got 8; two processes"):
        run(model, dataset, path)


def test_ranks_but_the_first_read_and_do_not_write(tmp_path, monkeypatch):
    model, dataset, path = TinyModel(), draw_dataset(), tmp_path / "ref.safetensors"
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    with pytest.raises(RuntimeError, match="must be made by rank 0, this is rank 1"):
        run(model, dataset, path)
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "get_rank", lambda: 0)
        expected = run(model, dataset, path)
    assert equal(run(model, dataset, path), expected)


def test_what_is_not_installed_is_named_with_its_cure(tmp_path, monkeypatch):
    model, dataset, path = TinyModel(), draw_dataset(), tmp_path / "ref.safetensors"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tqdm.auto", None)
        with pytest.raises(ModuleNotFoundError, match="pip install tqdm, or pass progress=False"):
            run(model, dataset, path, progress=True)
        run(model, dataset, path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ModuleNotFoundError, match="pip install safetensors"):
        run(model, dataset, path)


def test_the_progress_bar_counts_pairs_and_starts_where_it_goes_on(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tqdm")
    model, dataset, path = TinyModel(), draw_dataset(), tmp_path / "ref.safetensors"
    journal = journal_of(model, dataset, path, monkeypatch)
    journal.write_bytes(journal.read_bytes()[: -3 * _ref_file.RECORD.itemsize])
    capsys.readouterr()
    run(model, dataset, path, progress=True)
    shown = capsys.readouterr().err
    assert " 4/7 " in shown
    assert " 7/7 " in shown
    assert " 0/7 " not in shown


def test_batch_size_is_checked(tmp_path):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        run(TinyModel(), draw_dataset(), tmp_path / "ref.safetensors", batch_size=0)


def test_a_journal_is_readable_by_its_header(tmp_path, monkeypatch):
    path = tmp_path / "ref.safetensors"
    journal = journal_of(TinyModel(), draw_dataset(), path, monkeypatch)
    header = json.loads(journal.read_bytes().partition(b"\n")[0])
    assert header["num_rows"] == "7"
    assert header["tokenizer"] == "none"


def test_rows_of_other_sequences_than_lists(tmp_path):
    """NumPy arrays and tensors, as data sets may give them, are the same rows."""
    model, dataset, path = TinyModel(), draw_dataset(), tmp_path / "ref.safetensors"
    expected = run(model, dataset, path)
    for kind in (np.array, torch.tensor):
        rows = [{name: kind(ids) for name, ids in row.items()} for row in dataset]
        assert equal(run(model, rows, path), expected)
        assert equal(run(model, rows, tmp_path / f"{kind.__name__}.safetensors"), expected)


def test_masks_come_from_lengths():
    ids, num_prompt = [[0, 2, 0, 2, 2], [5, 2, 0], [5, 6]], [2, 1, 2]
    input_ids, attention_mask, mask = collate(ids, num_prompt, torch.device("cpu"))
    assert input_ids[:, :2].tolist() == [[0, 2], [5, 2], [5, 6]]
    assert attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    assert mask.tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]


def test_a_transformers_model_and_its_tokenizer(tmp_path):
    """Peculiar to them: where they were loaded from, and a chat template."""
    transformers = pytest.importorskip("transformers")
    from tiny_llama import save_tiny_llama

    folder = save_tiny_llama(tmp_path / "tiny")
    load = transformers.AutoModelForCausalLM.from_pretrained
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [{k: [i % 19 for i in ids] for k, ids in row.items()} for row in draw_dataset()]
    path = tmp_path / "ref.safetensors"
    expected = run(load(folder), rows, path, tokenizer=tokenizer)
    assert isinstance(expected, RefLogps)
    (folder / "copy").mkdir()
    load(folder).save_pretrained(folder / "copy")  # another place, the same model
    assert equal(run(load(folder / "copy"), rows, path, tokenizer=tokenizer), expected)
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(ValueError, match="made for another tokenizer"):
        run(load(folder), rows, path, tokenizer=tokenizer)
