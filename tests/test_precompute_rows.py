"""Rows of a reference file: checked, found by hash, scored again where a disk changed them."""

import errno
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_reference import NUM_ROWS, VOCAB_SIZE, TinyModel, draw_dataset, equal, journal_of, run

from dpo_triton.precompute import RefLogps

safetensors = pytest.importorskip("safetensors.torch")


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


def test_rows_of_other_sequences_than_lists(tmp_path):
    """NumPy arrays and tensors, as data sets may give them, are the same rows."""
    model, dataset, path = TinyModel(), draw_dataset(), tmp_path / "ref.safetensors"
    expected = run(model, dataset, path)
    for kind in (np.array, torch.tensor):
        rows = [{name: kind(ids) for name, ids in row.items()} for row in dataset]
        assert equal(run(model, rows, path), expected)
        assert equal(run(model, rows, tmp_path / f"{kind.__name__}.safetensors"), expected)


def changes(dataset):
    """Other data sets, and how many of their rows are new."""
    changed, moved = ([dict(row) for row in dataset] for _ in range(2))
    changed[4]["rejected_ids"] = [*changed[4]["rejected_ids"], 5]
    moved[2]["prompt_ids"] = [*moved[2]["prompt_ids"], moved[2]["chosen_ids"][0]]
    moved[2]["chosen_ids"] = moved[2]["chosen_ids"][1:]
    new = dict(prompt_ids=[1, 2, 3], chosen_ids=[4] * 11, rejected_ids=[5])
    return {
        "fewer": (dataset[1:], 0),
        "more": ([*dataset[:3], new, *dataset[3:]], 1),
        "order": (dataset[::-1], 0),
        "repeated": ([*dataset, *dataset[:2]], 0),
        "row": (changed, 1),
        "border": (moved, 1),  # the same tokens, another border
        "none": ([], 0),
    }


@pytest.mark.filterwarnings("ignore:1 of 7 rows have an answer without a token")
@pytest.mark.parametrize("name", ["fewer", "more", "order", "repeated", "row", "border", "none"])
@pytest.mark.parametrize("is_complete", [True, False], ids=["file", "journal"])
def test_rows_are_found_by_their_hash(is_complete, name, tmp_path, monkeypatch):
    model, dataset, path = TinyModel(), draw_dataset(), tmp_path / "ref.safetensors"
    if is_complete:
        run(model, dataset, path)
        content = path.read_bytes()
    else:
        journal_of(model, dataset, path, monkeypatch)
    rows, num_new = changes(dataset)[name]
    expected = run(model, rows, tmp_path / "anew.safetensors")
    model.batches.clear()
    ours = run(model, rows, path)
    num_again = 0 if is_complete or not num_new else 1  # the journal's last batch, which is short
    assert sum(model.batches) == 2 * (num_new + num_again)
    for a, b in zip(ours, expected, strict=True):  # with other neighbours, so not the same bits
        torch.testing.assert_close(a, b)
    if is_complete and not num_new:
        assert path.read_bytes() == content
    model.batches.clear()
    assert equal(run(model, rows, path), ours)
    run(model, dataset, path)  # of which no row is lost
    assert not model.batches
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("ref")] == [path.name]


def test_a_journal_of_rows_that_the_file_lacks_outlives_a_run_without_them(tmp_path, monkeypatch):
    model, dataset, path = TinyModel(), draw_dataset(), tmp_path / "ref.safetensors"
    run(model, dataset[:3], path)
    journal = journal_of(model, dataset, path, monkeypatch)
    run(model, dataset[:3], path)
    model.batches.clear()
    assert journal.exists()
    run(model, dataset, path)
    assert not model.batches
    assert not journal.exists()


def test_equal_rows_are_scored_once(tmp_path):
    model, dataset = TinyModel(), draw_dataset(2) * 4
    ref_logps = run(model, dataset, tmp_path / "ref.safetensors", batch_size=8)
    assert model.batches == [4]
    for field in ref_logps:
        assert torch.equal(field, field[:2].repeat(4))


def test_a_row_that_changes_between_two_readings_is_an_error(tmp_path):
    class Changing(list):
        def __getitem__(self, i):
            row = super().__getitem__(i)
            return row | {"chosen_ids": torch.randint(VOCAB_SIZE, (8,)).tolist()}

    with pytest.raises(ValueError, match=r"row 0: dataset\[0\] must give the same ids each time"):
        run(TinyModel(), Changing(draw_dataset()), tmp_path / "ref.safetensors")


def test_a_file_on_a_read_only_disk_is_read(tmp_path, monkeypatch):
    """No file is made, opened for writing, or deleted there, not even one that is absent."""
    model, dataset, path = TinyModel(), draw_dataset(), tmp_path / "ref.safetensors"
    journal = journal_of(model, dataset, path, monkeypatch)
    content = journal.read_bytes()
    expected = run(model, dataset, path)

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    for leftover in (False, True):
        if leftover:
            journal.write_bytes(content)
        with monkeypatch.context() as patch:
            for name in ("unlink", "mkdir", "write_bytes", "touch"):
                patch.setattr(Path, name, refuse)
            patch.setattr("dpo_triton.precompute._precompute.open_journal", refuse)
            assert equal(run(model, dataset, path), expected)


def damage(content, kind, start, num_rows):
    """Of bytes that end in records."""
    size = (len(content) - start) // num_rows
    row = int(torch.randint(num_rows - 1, ()))
    at = start + row * size
    changed = bytearray(content)
    if kind == "bit":
        bit = int(torch.randint(8 * size, ()))
        changed[at + bit // 8] ^= 1 << bit % 8
    elif kind == "nan":
        changed[at + 16 : at + 24] = np.float64(np.nan).tobytes()
    elif kind == "length":
        changed[at + 32 : at + 40] = np.int64(10**6).tobytes()
    else:
        changed[at:] = bytes(len(content) - at)
    return bytes(changed), row


@pytest.mark.parametrize("kind", ["bit", "nan", "length", "zeros"])
def test_a_journal_is_cut_at_its_first_broken_record(kind, tmp_path, monkeypatch):
    model, dataset, path = TinyModel(), draw_dataset(), tmp_path / "ref.safetensors"
    expected = run(model, dataset, path)
    path.unlink()
    journal = journal_of(model, dataset, path, monkeypatch)
    content = journal.read_bytes()
    start = content.index(b"\n") + 1
    changed, row = damage(content, kind, start, NUM_ROWS)
    journal.write_bytes(changed)
    model.batches.clear()
    after = NUM_ROWS - row - 1
    with pytest.warns(UserWarning, match=f"record {row} of 7 is broken.*the {after} after it"):
        assert equal(run(model, dataset, path), expected)
    assert sum(model.batches) == 2 * (NUM_ROWS - row // 2 * 2)


@pytest.mark.parametrize(
    ("field", "other"),
    [
        (field, other)
        for field in RefLogps._fields
        for other in (10**6, "bit", *([] if field.endswith("lengths") else [np.nan]))
    ],
)
def test_damaged_rows_of_a_file_are_counted_and_scored_again(field, other, tmp_path):
    model, dataset, path = TinyModel(), draw_dataset(), tmp_path / "ref.safetensors"
    expected = run(model, dataset, path)
    content = path.read_bytes()
    row = int(torch.randint(NUM_ROWS, ()))
    with safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    if other == "bit":
        raw = tensors[field].view(torch.uint8).view(NUM_ROWS, -1)
        raw[row, int(torch.randint(raw.shape[1], ()))] ^= 1 << int(torch.randint(8, ()))
    else:
        tensors[field][row] = other
    path.write_bytes(safetensors.save(tensors, metadata))
    model.batches.clear()
    with pytest.warns(UserWarning, match="1 of 7 rows do not have their checksums"):
        ours = run(model, dataset, path)
    assert model.batches == [2]
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert len(path.read_bytes()) == len(content)
    assert equal(run(model, dataset, path), ours)


class Row(dict):
    alive, most = 0, 0

    def __init__(self, **ids):
        super().__init__(**ids)
        Row.alive += 1
        Row.most = max(Row.most, Row.alive)

    def __del__(self):
        Row.alive -= 1


def test_no_more_rows_than_a_batch_are_held_at_a_time(tmp_path):
    class Lazy:
        def __len__(self):
            return 100

        def __getitem__(self, i):
            return Row(prompt_ids=[i % 37, i // 37], chosen_ids=[1, 2], rejected_ids=[3])

    run(TinyModel(), Lazy(), tmp_path / "ref.safetensors", batch_size=5)
    assert Row.most <= 2 * 5
