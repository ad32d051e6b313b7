"""The table of the README's "Semantics", for hidden states and head."""

import math

import pytest
import torch
from batches import assert_close, fused, max_error
from head_batches import (
    ALL,
    FROZEN,
    TILE_V,
    HeadBatch,
    linear_truth,
    make_head_batch,
    value_and_grads,
)
from pairwise import pairwise

from dpo_triton import fused_linear_seq_logprob

NAN, INF = math.nan, math.inf


def seq(backend):
    return fused(backend, "fused_linear_seq_logprob")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("trains", [ALL, FROZEN, (False, True, False), (False, False, True)])
@pytest.mark.parametrize("shift", [False, True])
def test_nothing_scored(shift, trains, backend, device):
    """A micro-batch of prompts only: zeros, attached, and zero gradients for all that asked."""
    batch = make_head_batch((2, 3, 16), TILE_V + 3, torch.float32, device)
    batch = batch._replace(mask=torch.zeros(2, 3, device=device))
    for function in (seq(backend), fused(backend, "fused_linear_token_logprob")):
        value, *grads = value_and_grads(function, batch, trains=trains, shift=shift)
        assert (value == 0).all()
        assert len(grads) == sum(trains)
        assert all((grad == 0).all() for grad in grads)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("trains", [ALL, FROZEN])
@pytest.mark.parametrize("shift", [False, True])
def test_one_sequence_of_nothing(shift, trains, backend, device):
    batch = make_head_batch((3, 4, 16), 300, torch.float32, device)
    batch.mask[1] = 0
    batch.mask[[0, 2], 2] = 1.0
    upstream = torch.tensor([1.0, NAN, 1.0], device=device)  # 0 * NaN must not reach hidden
    value, *grads = value_and_grads(seq(backend), batch, upstream, trains, shift=shift)
    assert value[1] == 0
    assert (value[[0, 2]] != 0).all()
    assert (grads[0][1] == 0).all()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.usefixtures("poisoned")
@pairwise(shift=[False, True], bad=[NAN, INF], trains=[ALL, FROZEN])
def test_what_is_not_scored_is_never_read(shift, bad, trains, backend, device):
    batch = make_head_batch((3, 4, 16), TILE_V + 3, torch.float32, device)
    batch.mask[0, 2] = batch.mask[1, 0] = batch.mask[2, 3] = 0
    clean = value_and_grads(seq(backend), batch, trains=trains, shift=shift)
    is_read = batch.mask != 0
    if shift:
        is_read = torch.cat([is_read[:, 1:], torch.zeros_like(is_read[:, :1])], 1)
    hidden = batch.hidden.clone()
    hidden[~is_read] = bad
    labels = batch.labels.masked_fill(batch.mask == 0, 2**40)
    if shift:
        labels[:, 0] = -1
    dirty = batch._replace(hidden=hidden, labels=labels)
    found = value_and_grads(seq(backend), dirty, trains=trains, shift=shift)
    for x, y in zip(found, clean, strict=True):
        assert torch.equal(x, y)
    assert (found[1][~is_read] == 0).all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("trains", [ALL, FROZEN])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_nan_stays_in_its_sequence(bad, trains, backend, device):
    batch = make_head_batch((3, 3, 16), TILE_V + 3, torch.float32, device)._replace(mask=None)
    clean, clean_grad, *_ = value_and_grads(seq(backend), batch, trains=trains)
    hidden = batch.hidden.clone()
    hidden[1, 0, 3] = bad
    found = value_and_grads(seq(backend), batch._replace(hidden=hidden), trains=trains)
    assert found[0][1].isnan()
    assert torch.equal(found[0][[0, 2]], clean[[0, 2]])
    others = torch.ones(3, 3, dtype=torch.bool, device=device)
    others[1, 0] = False
    assert torch.equal(found[1][others], clean_grad[others])
    assert found[1][1, 0].isnan().all()


@pytest.mark.parametrize("label", [-1, 300, 2**31, -(2**40)])
def test_bad_labels_torch(label, device):
    hidden, weight, bias, labels, _ = make_head_batch((2, 3, 16), 300, device=device)
    labels[1, 2] = label
    with pytest.raises(IndexError, match=rf"labels\[1, 2\] is {label}, .*\[0, 300\).*ignore_index"):
        seq("torch")(hidden, weight, labels, bias=bias)
    cu_seqlens = torch.tensor([0, 6], device=device)
    with pytest.raises(IndexError, match=rf"labels\[5\] is {label}"):
        seq("torch")(hidden.view(6, 16), weight, labels.view(6), cu_seqlens=cu_seqlens)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("trains", [ALL, FROZEN])
@pytest.mark.parametrize("label", [-1, TILE_V + 3, 2**31, -(2**40)])
def test_bad_labels_triton(label, trains, device, monkeypatch):
    pytest.importorskip("triton")
    batch = make_head_batch((2, 3, 16), TILE_V + 3, device=device)._replace(mask=None)
    clean, clean_grad, *_ = value_and_grads(seq("triton"), batch, trains=trains)
    batch.labels[1, 2] = label
    value, grad, *_ = value_and_grads(seq("triton"), batch, trains=trains)
    assert value[1].isnan()
    assert value[0] == clean[0]
    assert torch.equal(grad[0], clean_grad[0])
    monkeypatch.setenv("DPO_TRITON_DEBUG", "1")
    with pytest.raises(IndexError, match=rf"labels\[1, 2\] is {label}"):
        value_and_grads(seq("triton"), batch, trains=trains)


@pytest.mark.parametrize("trains", [ALL, FROZEN])
@pytest.mark.parametrize("shape", [(0, 5, 16), (4, 0, 16), (2, 1, 16)])
def test_empty_batches(shape, trains, backend, device):
    """With the shift a batch of one token a sequence has nothing to score either."""
    batch = make_head_batch(shape, 300, device=device)
    for mask in (None, batch.mask):
        inputs = batch._replace(mask=mask)
        value, *grads = value_and_grads(seq(backend), inputs, trains=trains, shift=True)
        assert value.shape == shape[:1]
        assert (value == 0).all()
        assert [g.shape for g in grads] == [x.shape for x in batch[: len(grads)]]
        assert all((grad == 0).all() for grad in grads)
    tokens = fused(backend, "fused_linear_token_logprob")
    values, stats = tokens(*batch[:2], batch.labels, shift=True, stats=("entropy",))
    assert values.shape == stats["entropy"].shape == shape[:2]


@pytest.mark.parametrize("bounds", [[0], [0, 0, 0]])
def test_nothing_packed(bounds, backend, device):
    batch = make_head_batch((0, 16), 300, device=device)
    cu_seqlens = torch.tensor(bounds, device=device)
    value, *grads = value_and_grads(seq(backend), batch, cu_seqlens=cu_seqlens, shift=True)
    assert value.tolist() == [0.0] * (len(bounds) - 1)
    assert all((grad == 0).all() for grad in grads)


def flushed_sum(weight: torch.Tensor, y: int) -> float:
    """What the gradient of hidden may lack on a GPU, whose exp2 gives 0 below float32's normal
    numbers. At a margin of 80 nats most of the others' shares are there, one by one; together they
    are 1 % of this gradient, the target being the rest."""
    shares = weight[:, 0].softmax(0)
    shares[y] = 0
    is_flushed = shares < torch.finfo(torch.float32).tiny
    return float((shares[:, None] * weight.abs())[is_flushed].sum(0).max())


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("trains", [ALL, FROZEN])
@pytest.mark.parametrize("margin", [-100.0, 0.0, 17.0, 20.0, 40.0, 80.0])
def test_exact_at_any_margin(margin, trains, backend, device):
    """Where log_softmax gives 0 and no gradient. The head is such that products are exact: logits
    are column 0 of the weight, so that the margin is known."""
    vocab_size, y = TILE_V + 5, TILE_V + 2
    weight = torch.randn(vocab_size, 2, device=device)
    others = weight[:, 0].double()
    others[y] = -INF
    weight[y, 0] = float(others.logsumexp(0)) + margin
    hidden = torch.tensor([[[1.0, 0.0]]], device=device)
    batch = HeadBatch(hidden, weight, None, torch.tensor([[y]], device=device), None)
    found = value_and_grads(seq(backend), batch, trains=trains)
    exact = linear_truth("seq_logprob", batch, trains=trains)
    # log(exp(a) + ...) of float64 loses the digits of a target that leads: the reference has them.
    assert float(found[0]) == pytest.approx(float(exact[0]), rel=1e-5, abs=0)
    lost = 0.0
    if trains == ALL and backend == "triton" and device.type == "cuda":
        lost = flushed_sum(weight.cpu().double(), y)
    assert max_error(found[1], exact[1]) <= 1e-5 * float(exact[1].abs().max()) + lost
    if trains == ALL:
        for row in (y, int(others.argmax())):  # the target's, and the largest of the others
            mine, truth = found[2][row].cpu().double(), exact[2][row]
            assert float((mine - truth).abs().max()) <= 1e-5 * float(truth.abs().max())


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("trains", [ALL, FROZEN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_banned_tokens(dtype, trains, backend, device):
    """A bias of -inf: the whole first tile, and a target among them."""
    batch = make_head_batch((3, 2, 16), TILE_V + 40, dtype, device)._replace(mask=None)
    batch.bias[: TILE_V + 9] = -INF
    batch.labels[:] = torch.randint(TILE_V + 9, TILE_V + 40, (3, 2), device=device)
    batch.labels[2, 1] = 0
    found = value_and_grads(seq(backend), batch, trains=trains)
    exact = linear_truth("seq_logprob", batch, trains=trains)
    eps = torch.finfo(dtype).eps
    assert found[0][2] == -INF
    assert_close(found[0][:2], exact[0][:2], 4 * eps * (1 + float(exact[0][:2].abs().max())))
    for grad, truth in zip(found[1:], exact[1:], strict=True):
        assert grad.isfinite().all()
        assert_close(grad, truth, 8 * eps * float(truth.abs().max()))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("trains", [ALL, FROZEN])
def test_all_others_banned_is_certain(trains, backend, device):
    batch = make_head_batch((1, 2, 16), TILE_V + 5, device=device)._replace(mask=None)
    batch.labels[:] = torch.tensor([[3, 3]])
    batch.bias[:] = -INF
    batch.bias[3] = 0.5
    value, *grads = value_and_grads(seq(backend), batch, trains=trains)
    assert value[0] == 0
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("trains", [True, False], ids=["trained", "frozen"])
def test_a_float16_gradient_far_inside_of_its_range_is_finite(trains, backend, device):
    """Probabilities are written as up to 2 ** 10: times weights of 100 they leave float16."""
    hidden = torch.full((1, 1, 1), 0.1, dtype=torch.float16, device=device).requires_grad_()
    weight = torch.zeros(6, 1, dtype=torch.float16, device=device)
    weight[1] = 100.0
    labels = torch.zeros(1, 1, dtype=torch.int64, device=device)
    value = fused_linear_seq_logprob(hidden, weight.requires_grad_(trains), labels, backend=backend)
    (grad,) = torch.autograd.grad(value.sum(), hidden)
    probability = torch.softmax(
        hidden.detach().double().cpu() @ weight.detach().double().cpu().t(), -1
    )
    exact = float(-100 * probability[0, 0, 1])
    assert abs(float(grad) - exact) < 0.002 * abs(exact)
