"""precompute_ref_logps: values, a file whole or absent, going on after any stop, refusals."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_reference import (
    NUM_ROWS,
    TinyModel,
    draw_dataset,
    equal,
    journal_of,
    run,
)

from dpo_triton.precompute import _fingerprints, _journal, _records, _ref_file, collate

safetensors = pytest.importorskip("safetensors")

TESTS = Path(__file__).parent


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
    assert set(metadata) == {"format", "model", "autocast", "tokenizer", "dpo_triton"}


def test_it_goes_on_from_a_journal_that_ends_anywhere(tmp_path, monkeypatch):
    model, dataset, path = TinyModel(), draw_dataset(), tmp_path / "ref.safetensors"
    expected = run(model, dataset, path)
    path.unlink()
    journal = journal_of(model, dataset, path, monkeypatch)
    content, record = journal.read_bytes(), _records.RECORD.itemsize
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


def test_a_full_disk_loses_no_whole_batch(tmp_path, monkeypatch):
    """Of the journal's third batch, half is written; then of the file."""
    model, dataset, path = TinyModel(), draw_dataset(), tmp_path / "ref.safetensors"
    expected = run(model, dataset, tmp_path / "whole.safetensors")
    append, calls = _journal.Journal.append, []

    def append_half(journal, records):
        calls.append(1)
        if len(calls) == 3:
            journal._file.write(records.tobytes()[: records.nbytes // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        append(journal, records)

    with monkeypatch.context() as patch:
        patch.setattr(_journal.Journal, "append", append_half)
        with pytest.raises(OSError, match="No space left"):
            run(model, dataset, path)
    model.batches.clear()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            run(model, dataset, path)
    assert sorted(os.listdir(tmp_path)) == ["ref.safetensors.partial", "whole.safetensors"]
    assert equal(run(model, dataset, path), expected)
    assert model.batches == [4, 2]


def test_two_writers_are_refused_at_the_start(tmp_path):
    """The first has the journal open; when it has ended, killed or not, the second goes on."""
    model, dataset, path = TinyModel(), draw_dataset(), tmp_path / "ref.safetensors"
    header = {"format": _ref_file.FORMAT, **_fingerprints.origin(model, None)}
    with (
        _journal.open_journal(tmp_path / "ref.safetensors.partial", header),
        pytest.raises(RuntimeError, match=r"written by another process.*a path of its own"),
    ):
        run(model, dataset, path)
    assert not model.batches
    run(model, dataset, path)


def test_another_batch_size_may_go_on(tmp_path, monkeypatch):
    model, dataset, path = TinyModel(), draw_dataset(), tmp_path / "ref.safetensors"
    expected = run(model, dataset, path)
    path.unlink()
    journal = journal_of(model, dataset, path, monkeypatch)
    journal.write_bytes(journal.read_bytes()[: -_records.RECORD.itemsize])
    ours = run(model, dataset, path, batch_size=4)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


KILLED = """
import os, signal, sys
import torch
from tiny_reference import TinyModel, run
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
    journal.write_bytes(journal.read_bytes()[: -3 * _records.RECORD.itemsize])
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
    assert header["format"] == _ref_file.FORMAT
    assert header["autocast"] == "no autocast"
    assert json.loads(header["tokenizer"]) == {}
    tensors = json.loads(header["model"])["tensors"]
    assert tensors["embedding.weight"].startswith("float32 (37, 8) ")


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


def test_masks_come_from_lengths():
    ids, num_prompt = [[0, 2, 0, 2, 2], [5, 2, 0], [5, 6]], [2, 1, 2]
    input_ids, attention_mask, mask = collate(ids, num_prompt, torch.device("cpu"))
    assert input_ids[:, :2].tolist() == [[0, 2], [5, 2], [5, 6]]
    assert attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    assert mask.tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]
