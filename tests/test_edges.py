"""The semantics table of the README, line by line, on both backends."""

import math

import pytest
import torch
from batches import Batch, assert_close, fused, make_batch, truth, value_and_grad
from pairwise import pairwise

INF = math.inf
NAN = math.nan


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("which", ["one", "all"])
def test_empty_sequences_are_zero_and_attached(which, reduction, backend, device):
    batch = make_batch((3, 4, 200), torch.bfloat16, device)
    mask = torch.ones(3, 4, device=device)
    mask[1 if which == "one" else slice(None)] = 0
    batch = batch._replace(mask=mask)
    value, grad = value_and_grad(fused(backend), batch, reduction=reduction)
    assert value[1] == 0
    assert (grad[1] == 0).all()
    assert value.isfinite().all()
    assert grad.isfinite().all()
    # Attached: a loss over it can be differentiated, and gives zeros where nothing is scored.
    logits = batch.logits.clone().requires_grad_()
    fused(backend)(logits, *batch[1:], reduction=reduction).sum().backward()
    assert torch.equal(logits.grad, grad)


@pytest.mark.usefixtures("poisoned")
def test_empty_packed_sequences(backend, device):
    batch = make_batch((5, 60), torch.float32, device)._replace(mask=None)
    cu_seqlens = torch.tensor([0, 0, 5, 5], device=device)
    for shift in (False, True):
        value, grad = value_and_grad(fused(backend), batch, cu_seqlens=cu_seqlens, shift=shift)
        assert value[0] == value[2] == 0
        assert value[1] != 0
        assert grad.isfinite().all()


@pytest.mark.usefixtures("poisoned")
@pairwise(shift=[False, True], bad_label=[-1, 7777, -(2**40), 2**40], bad=[NAN, INF, -INF])
def test_what_is_not_scored_is_never_read(shift, bad_label, bad, backend, device):
    """NaN logits and any label where the mask is 0: not a bit of the others changes."""
    batch = make_batch((3, 4, 1025), torch.float32, device)
    mask = batch.mask.clone()
    mask[0, 2] = mask[1, 0] = mask[2, 3] = 0
    batch = batch._replace(mask=mask)
    clean_value, clean_grad = value_and_grad(fused(backend), batch, shift=shift)
    is_scored_row = torch.zeros_like(mask, dtype=torch.bool)
    if shift:
        is_scored_row[:, :-1] = mask[:, 1:] != 0
    else:
        is_scored_row = mask != 0
    logits = batch.logits.clone()
    logits[~is_scored_row] = bad
    labels = batch.labels.masked_fill(mask == 0, bad_label)
    if shift:
        labels[:, 0] = bad_label
    value, grad = value_and_grad(fused(backend), Batch(logits, labels, mask), shift=shift)
    assert torch.equal(value, clean_value)
    assert torch.equal(grad, clean_grad)
    assert (grad[~is_scored_row] == 0).all()
    tokens = fused(backend, "fused_token_logprob")(logits, labels, mask, shift=shift)
    assert tokens.isfinite().all()


@pytest.mark.usefixtures("poisoned")
@pairwise(
    vocab_size=[7000, 16384 + 9],  # a tile, and a whole split, of -inf
    dtype=[torch.float32, torch.bfloat16],
    options=[{}, dict(temperature=0.01), dict(logit_scale=20.0)],
)
def test_banned_tokens(options, dtype, vocab_size, backend, device):
    batch = make_batch((3, 2, vocab_size), dtype, device)
    logits = batch.logits.clone()
    logits[:, :, :-5] = -INF  # whole first tiles
    labels = torch.randint(vocab_size - 5, vocab_size, (3, 2), device=device)
    labels[2, 1] = 0  # a banned target
    batch = Batch(logits, labels, torch.ones(3, 2, device=device))
    value, grad = value_and_grad(fused(backend), batch, **options)
    exact = truth("seq_logprob", batch, **options)
    assert value[2] == -INF
    assert_close(value[:2], exact[0][:2], 1e-4 if options else 1e-6)
    assert_close(grad, exact[1], 1e-5 * float(exact[1].abs().max()))
    assert grad.isfinite().all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("banned", [-INF, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("vocab_size", [1, 2, 40, 5000])
def test_all_others_banned_is_certain(vocab_size, banned, backend, device):
    logits = torch.full((1, 2, vocab_size), banned, device=device)
    labels = torch.tensor([[0, vocab_size - 1]], device=device)
    logits[0, 0, 0] = logits[0, 1, -1] = 3.5
    value, grad = value_and_grad(fused(backend), Batch(logits, labels, None))
    assert value[0] == 0
    assert (grad == 0).all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("place", ["target", "other", "first column"])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_nan_and_inf_stay_in_their_sequence(bad, place, backend, device):
    batch = make_batch((3, 2, 5000), torch.float32, device)
    batch = batch._replace(mask=None, labels=batch.labels.clamp(min=1))
    clean = fused(backend)(*batch)
    logits = batch.logits.clone()
    y = int(batch.labels[1, 0])
    column = {"target": y, "other": (y + 1) % 5000, "first column": 0}[place]
    logits[1, 0, column] = bad
    value, grad = value_and_grad(fused(backend), batch._replace(logits=logits))
    assert value[1].isnan()
    assert torch.equal(value[[0, 2]], clean[[0, 2]])
    assert grad[[0, 2]].isfinite().all()
    assert grad[1, 1].isfinite().all()


def test_all_banned_is_nan(backend, device):
    logits = torch.randn(2, 1, 300, device=device)
    logits[0] = -INF
    value = fused(backend)(logits, torch.zeros(2, 1, dtype=torch.int64, device=device))
    assert value[0].isnan()
    assert value[1].isfinite()


@pytest.mark.parametrize("label", [-1, -7, 300, 2**31, -(2**40)])
def test_bad_labels_torch(label, device):
    batch = make_batch((2, 3, 300), torch.float32, device)
    batch.labels[1, 2] = label
    with pytest.raises(IndexError, match=rf"labels\[1, 2\] is {label}, .*\[0, 300\).*ignore_index"):
        fused("torch")(*batch[:2])
    cu_seqlens = torch.tensor([0, 6], device=device)
    with pytest.raises(IndexError, match=rf"labels\[5\] is {label}"):
        fused("torch")(batch.logits.view(6, 300), batch.labels.view(6), cu_seqlens=cu_seqlens)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("label", [-1, -7, 300, 2**31, -(2**40)])
def test_bad_labels_triton(label, device, monkeypatch):
    pytest.importorskip("triton")
    batch = make_batch((2, 3, 300), torch.float32, device)._replace(mask=None)
    clean = fused("triton")(*batch)
    batch.labels[1, 2] = label
    value, grad = value_and_grad(fused("triton"), batch)
    assert value[1].isnan()
    assert value[0] == clean[0]
    assert grad[0].isfinite().all()
    monkeypatch.setenv("DPO_TRITON_DEBUG", "1")
    with pytest.raises(IndexError, match=rf"labels\[1, 2\] is {label}"):
        fused("triton")(*batch)


@pytest.mark.parametrize("shape", [(0, 5, 30), (4, 0, 30), (0, 0, 30)])
@pytest.mark.parametrize("shift", [False, True])
def test_empty_batches(shift, shape, backend, device):
    batch = make_batch(shape, torch.float32, device)
    for mask in (None, batch.mask):
        value, grad = value_and_grad(fused(backend), batch._replace(mask=mask), shift=shift)
        assert value.shape == shape[:1]
        assert (value == 0).all()
        assert grad.shape == shape
    tokens, stats = fused(backend, "fused_token_logprob")(*batch, shift=shift, stats=("entropy",))
    assert tokens.shape == stats["entropy"].shape == shape[:2]


def test_nothing_packed(backend, device):
    logits = torch.randn(0, 30, device=device)
    labels = torch.zeros(0, dtype=torch.int64, device=device)
    for bounds in ([0], [0, 0, 0]):
        cu_seqlens = torch.tensor(bounds, device=device)
        value = fused(backend)(logits, labels, cu_seqlens=cu_seqlens, shift=True)
        assert value.tolist() == [0.0] * (len(bounds) - 1)


@pytest.mark.usefixtures("poisoned")
def test_one_token_with_shift_has_nothing_to_score(backend, device):
    batch = make_batch((2, 1, 30), torch.float32, device)
    value, grad = value_and_grad(fused(backend), batch, shift=True)
    assert (value == 0).all()
    assert (grad == 0).all()


def test_upstream_nan_of_an_empty_sequence_stops_there(backend, device):
    """0 * NaN: a loss that is NaN for an empty sequence must not reach its logits."""
    batch = make_batch((2, 3, 50), torch.float32, device)
    mask = torch.ones(2, 3, device=device)
    mask[0] = 0
    upstream = torch.tensor([NAN, 1.0], device=device)
    grad = value_and_grad(fused(backend), batch._replace(mask=mask), upstream)[1]
    assert (grad[0] == 0).all()
    assert grad.isfinite().all()
