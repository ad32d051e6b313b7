"""Hidden states and head in autograd: gradcheck, graphs, autocast, checkpointing, scaling."""

import pytest
import torch
from batches import assert_close, fused
from head_batches import ALL, FROZEN, TILE_V, linear_truth, make_head_batch, value_and_grads
from pairwise import pairwise
from torch import nn
from torch.utils.checkpoint import checkpoint

from dpo_triton import fused_linear_seq_logprob, fused_linear_token_logprob


def seq(backend):
    return fused(backend, "fused_linear_seq_logprob")


@pytest.mark.parametrize("trains", [ALL, FROZEN])
@pytest.mark.parametrize(
    "options",
    [{}, dict(shift=True), dict(softcap=3.0, temperature=0.7), dict(tile_bytes=3 * 9 * 8)],
    ids=str,
)
@pytest.mark.parametrize("function", [fused_linear_seq_logprob, fused_linear_token_logprob])
def test_gradcheck(function, options, trains):
    hidden, weight, bias, labels, mask = make_head_batch((2, 4, 3), 9, torch.float64)
    leaves = [
        x.requires_grad_(train) for x, train in zip((hidden, weight, bias), trains, strict=True)
    ]

    def scored(hidden, weight, bias):
        return function(hidden, weight, labels, mask, bias=bias, **options)

    assert torch.autograd.gradcheck(scored, leaves)


@pytest.mark.parametrize("trains", [ALL, FROZEN])
def test_gradcheck_packed(trains):
    hidden, weight, bias, labels, mask = make_head_batch((7, 3), 9, torch.float64)
    leaves = [
        x.requires_grad_(train) for x, train in zip((hidden, weight, bias), trains, strict=True)
    ]
    options = dict(cu_seqlens=torch.tensor([0, 3, 3, 7]), shift=True)

    def scored(hidden, weight, bias):
        return fused_linear_seq_logprob(hidden, weight, labels, mask, bias=bias, **options)

    assert torch.autograd.gradcheck(scored, leaves)


@pytest.mark.parametrize("trains", [ALL, FROZEN])
def test_double_backward_says_so(trains, backend, device):
    """Also of a loss that is linear in the values: their gradient is not linear in hidden."""
    hidden, weight, _, labels, mask = make_head_batch((2, 3, 16), 40, device=device)
    hidden.requires_grad_()
    weight.requires_grad_(trains[1])
    value = seq(backend)(hidden, weight, labels, mask)
    for loss in (value.sum(), value.square().sum()):
        (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match=r"double backward.*dpo_triton\.reference"):
            grad.sum().backward()


@pytest.mark.parametrize("trains", [ALL, FROZEN])
def test_retain_graph(trains, backend, device):
    """Tiles that were kept are still there for the second time."""
    hidden, weight, bias, labels, mask = make_head_batch((2, 3, 16), TILE_V + 4, device=device)
    leaves = [
        x.requires_grad_(train) for x, train in zip((hidden, weight, bias), trains, strict=True)
    ]
    value = seq(backend)(hidden, weight, labels, mask, bias=bias).sum()
    value.backward(retain_graph=True)
    once = [x.grad.clone() for x in leaves if x.requires_grad]
    value.backward()
    for x, grad in zip(leaves, once, strict=False):
        assert torch.equal(x.grad, 2 * grad)


def test_who_asks_for_a_gradient(backend, device):
    hidden, weight, bias, labels, mask = make_head_batch((2, 3, 16), 40, device=device)
    assert not seq(backend)(hidden, weight, labels, mask, bias=bias).requires_grad
    bias.requires_grad_()
    value, stats = seq(backend)(hidden, weight, labels, mask, bias=bias, stats=["entropy"])
    assert value.requires_grad
    assert not stats["entropy"].requires_grad
    with torch.no_grad():
        assert not seq(backend)(hidden, weight, labels, mask, bias=bias).requires_grad
    value.sum().backward()
    assert hidden.grad is None
    assert weight.grad is None


@pytest.mark.parametrize("trains", [ALL, FROZEN])
def test_tied_embedding(trains, backend, device):
    """A weight that is used twice: the gradients of the two uses add up."""
    _, weight, _, labels, _ = make_head_batch((2, 5, 16), 300, device=device)
    weight.requires_grad_(trains[1])
    scale = torch.ones(16, device=device, requires_grad=True)
    embedded = nn.functional.embedding(labels, weight) * scale
    seq(backend)(embedded, weight, labels, shift=True).sum().backward()

    exact_weight = weight.detach().cpu().double().requires_grad_(trains[1])
    exact_scale = torch.ones(16, dtype=torch.float64, requires_grad=True)
    embedded = nn.functional.embedding(labels.cpu(), exact_weight) * exact_scale
    logits = embedded @ exact_weight.T
    p = logits.log_softmax(-1)[:, :-1].gather(-1, labels.cpu()[:, 1:, None])
    p.mean(1).sum().backward()
    assert_close(scale.grad, exact_scale.grad, 4e-6 * float(exact_scale.grad.abs().max()))
    if trains == ALL:
        assert_close(weight.grad, exact_weight.grad, 4e-6 * float(exact_weight.grad.abs().max()))


@pairwise(
    parameters=[torch.float32, torch.float16],
    trains=[ALL, FROZEN],
    tile_bytes=[None, 3 * TILE_V * 2],
)
def test_autocast(tile_bytes, trains, parameters, backend, device):
    """The product in autocast's dtype, everything after it in float32, and gradients in that of
    the parameters; as F.linear there."""
    batch = make_head_batch((2, 4, 16), TILE_V + 4, parameters, device)._replace(mask=None)
    rounded = batch._replace(
        **{n: getattr(batch, n).bfloat16() for n in ("hidden", "weight", "bias")}
    )
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = value_and_grads(seq(backend), batch, trains=trains, tile_bytes=tile_bytes)
    expected = value_and_grads(seq(backend), rounded, trains=trains, tile_bytes=tile_bytes)
    assert found[0].dtype == torch.float32
    assert torch.equal(found[0], expected[0])
    for grad, other in zip(found[1:], expected[1:], strict=True):
        assert grad.dtype == parameters
        assert_close(grad, other.cpu().double(), 2e-2 * float(other.abs().max()))


def test_autocast_mixes_dtypes(device):
    """A float32 head on bfloat16 hidden states, as mixed precision has them."""
    hidden, weight, bias, labels, mask = make_head_batch((2, 4, 16), 300, device=device)
    hidden = hidden.bfloat16().requires_grad_()
    weight.requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        value = fused_linear_seq_logprob(hidden, weight, labels, mask, bias=bias.double())
    value.sum().backward()
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("trains", [ALL, FROZEN])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, trains, backend, device):
    batch = make_head_batch((2, 5, 16), TILE_V + 4, device=device)
    expected = value_and_grads(seq(backend), batch, trains=trains)

    def checkpointed(hidden, weight, labels, mask, *, bias):
        function = lambda *inputs: seq(backend)(*inputs[:-1], bias=inputs[-1])  # noqa: E731
        inputs = (hidden, weight, labels, mask, bias)
        return checkpoint(function, *inputs, use_reentrant=use_reentrant)

    leaves = [x.clone().requires_grad_(train) for x, train in zip(batch[:3], trains, strict=True)]
    value = checkpointed(*leaves[:2], *batch[3:], bias=leaves[2])
    value.sum().backward()  # the reentrant kind does not go with autograd.grad
    grads = [x.grad for x in leaves if x.requires_grad]
    for x, y in zip((value, *grads), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("trains", [ALL, FROZEN])
def test_float16_scaled_upstream(trains, backend, device):
    """A gradient scaler's 65536 overflows float16, but not times 1 / length times 1 - p."""
    batch = make_head_batch((2, 11, 16), 200, torch.float16, device)._replace(mask=None)
    upstream = torch.full((2,), 65536.0, device=device)
    found = value_and_grads(seq(backend), batch, upstream, trains)
    exact = linear_truth("seq_logprob", batch, upstream, trains)
    for grad, truth in zip(found[1:], exact[1:], strict=True):
        assert grad.isfinite().all()
        assert_close(grad, truth, 5e-3 * float(truth.abs().max()))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("trains", [ALL, FROZEN])
@pytest.mark.parametrize(
    "options", [dict(temperature=0.01), dict(logit_scale=200.0, softcap=4.0)], ids=str
)
def test_float16_at_steep_slopes(options, trains, backend, device):
    """d logp / d logits of a slope of 100 and more stays within float16 on its way, also where one
    token has all of the probability. The logits' own rounding is what the tolerance is for."""
    batch = make_head_batch((2, 6, 16), TILE_V + 4, torch.float16, device, spread=0.02)
    batch = batch._replace(mask=None, bias=batch.bias * 0.01)
    batch.bias[5] = 0.3
    found = value_and_grads(seq(backend), batch, trains=trains, **options)
    exact = linear_truth("seq_logprob", batch, trains=trains, **options)
    for grad, truth in zip(found[1:], exact[1:], strict=True):
        assert_close(grad, truth, 5e-2 * float(truth.abs().max()))
