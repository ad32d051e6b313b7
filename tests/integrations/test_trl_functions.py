"""TRL's functions of logits beside those that take their place, and what `enable` replaces."""

import importlib.metadata
import inspect
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("trl_runs")  # which skips where TRL, datasets or peft is missing

from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer import utils

import dpo_triton.integrations.trl as adapter


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("is_encoder_decoder", [False, True])
def test_get_batch_logps_beside_trl_s_own(is_encoder_decoder, average):
    logits = torch.randn(3, 9, 130, dtype=torch.float64)
    labels = torch.randint(0, 130, (3, 9)).masked_fill(torch.rand(3, 9) < 0.4, -100)
    labels[:, 4] = 7
    for trainer in (CPOTrainer, ORPOTrainer):
        arguments = (average, is_encoder_decoder)
        theirs = trainer.get_batch_logps(logits, labels.clone(), *arguments)
        with adapter.fused():
            ours = trainer.get_batch_logps(logits, labels, *arguments)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    labels[1] = -100  # theirs: the mean is NaN
    assert adapter.get_batch_logps(logits, labels, average, is_encoder_decoder)[1] == 0


@pytest.mark.parametrize("shape", [(2, 5, 130), (7, 130), (2, 3, 4, 130)], ids=str)
def test_selective_log_softmax_beside_trl_s_own(shape):
    full = torch.randn(*shape[:-2], shape[-2] + 1, shape[-1], dtype=torch.float64)
    logits = full[..., :-1, :].requires_grad_()  # a slice, as the trainers make it
    theirs = utils.selective_log_softmax
    has_options = "row_mask" in inspect.signature(theirs).parameters
    mask = torch.rand(shape[:-1]) < 0.5
    cases: list[dict[str, Any]] = [{}]
    if has_options:
        cases = [{}, dict(temperature=0.7), dict(row_mask=mask), dict(row_mask=mask.long())]
    for num_labels in (None, 3):
        index = torch.randint(0, 130, shape[:-1] if num_labels is None else (*shape[:-1], 3))
        for options in cases:
            if num_labels is not None and "row_mask" in options:
                options = dict(row_mask=options["row_mask"][..., None].expand(index.shape))
            expected = theirs(logits, index, **options)
            with adapter.fused():
                got = utils.selective_log_softmax(logits, index, **options)
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
            upstream = torch.randn_like(got)
            torch.testing.assert_close(
                torch.autograd.grad(got, logits, upstream),
                torch.autograd.grad(expected, logits, upstream),
            )


def test_selective_log_softmax_lists_a_negative_label():
    with pytest.raises(IndexError, match="-100"):
        adapter.selective_log_softmax(torch.randn(1, 3, 9), torch.tensor([[3, -100, 4]]))


def held() -> dict[str, dict[str, Any]]:
    """What every module of TRL, and the trainers' classes, hold."""
    names = [name for name in sys.modules if name.partition(".")[0] == "trl"]
    places = [sys.modules[name] for name in names] + [CPOTrainer, ORPOTrainer]
    return {str(place): dict(vars(place)) for place in places}


def test_undo_restores():
    before = held()
    undo = adapter.enable()
    during = held()
    assert utils.selective_log_softmax.__name__.endswith("selective_log_softmax")
    changed = {
        (place, name)
        for place, names in before.items()
        for name, value in names.items()
        if during[place][name] is not value
    }
    assert not [place for place, name in changed if "chunked_divergence" in place]
    assert {name for _, name in changed} >= {"get_batch_logps", "selective_log_softmax"}
    undo()
    assert held() == before
    undo()
    with pytest.raises(KeyError), adapter.fused():
        raise KeyError
    assert held() == before


def test_an_unknown_version_is_refused(monkeypatch):
    before = held()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.17.0")
    with pytest.raises(RuntimeError, match=r"TRL 1\.17\.0 was not tested.*1\.15\.0, 1\.16\.0"):
        adapter.enable()
    assert held() == before
