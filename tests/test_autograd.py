"""Autograd's corners: gradcheck, graphs, memory, autocast, checkpointing, in-place, modules."""

import copy
import functools
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from batches import assert_close, fused, make_batch, truth, value_and_grad
from pairwise import pairwise
from torch import nn
from torch.utils.checkpoint import checkpoint

from dpo_triton import fused_seq_logprob, fused_token_logprob


@pytest.mark.parametrize(
    "options",
    [{}, dict(reduction="sum"), dict(shift=True), dict(softcap=3.0, temperature=0.7)],
    ids=str,
)
@pytest.mark.parametrize("function", [fused_seq_logprob, fused_token_logprob])
def test_gradcheck_float64(function, options):
    if function is fused_token_logprob:
        options = {k: v for k, v in options.items() if k != "reduction"}
    batch = make_batch((2, 4, 9), torch.float64)
    logits = batch.logits.requires_grad_()
    assert function(logits, *batch[1:], **options).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x: function(x, *batch[1:], **options), logits)


def test_gradcheck_packed():
    batch = make_batch((7, 5), torch.float64)
    cu_seqlens = torch.tensor([0, 3, 3, 7])
    logits = batch.logits.requires_grad_()
    for shift in (False, True):
        function = functools.partial(fused_seq_logprob, cu_seqlens=cu_seqlens, shift=shift)
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, *batch[1:]), logits)


def test_double_backward_says_so(backend, device):
    batch = make_batch((2, 3, 40), torch.float32, device)
    logits = batch.logits.requires_grad_()
    (grad,) = torch.autograd.grad(
        fused(backend)(logits, *batch[1:]).square().sum(), logits, create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"double backward.*dpo_triton\.reference"):
        grad.sum().backward()


def test_retain_graph(backend, device):
    batch = make_batch((2, 3, 40), torch.float32, device)
    logits = batch.logits.requires_grad_()
    value = fused(backend)(logits, *batch[1:]).sum()
    value.backward(retain_graph=True)
    once = logits.grad.clone()
    value.backward()
    assert torch.equal(logits.grad, 2 * once)


def test_labels_and_mask_get_no_gradient(backend, device):
    batch = make_batch((2, 3, 40), torch.float32, device)
    assert not fused(backend)(*batch).requires_grad
    value = fused(backend)(batch.logits.requires_grad_(), *batch[1:])
    assert value.requires_grad


def test_no_grad_keeps_nothing(backend, device):
    """Only the result outlives the call: logits die with their last name."""
    batch = make_batch((2, 3, 400), torch.float32, device)
    logits = batch.logits.clone().requires_grad_()
    alive = weakref.ref(logits)
    with torch.no_grad():
        value = fused(backend)(logits, *batch[1:])
    assert value.grad_fn is None
    del logits
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_float16_scaled_upstream(dtype, backend, device):
    """A gradient scaler's 65536 overflows float16, but not times 1 / length times 1 - p."""
    batch = make_batch((2, 11, 200), dtype, device)._replace(mask=None)
    value = lambda f, b: value_and_grad(f, b, torch.full((2,), 65536.0, device=device))  # noqa: E731
    _, grad = value(fused(backend), batch)
    exact = truth(
        "seq_logprob",
        batch._replace(mask=torch.ones(2, 11, device=device)),
        torch.full((2,), 65536.0),
    )
    assert grad.isfinite().all()
    assert_close(grad, exact[1], 1e-6 * float(exact[1].abs().max()))


def test_autocast(backend, device):
    """A head gives bf16 logits; log-probabilities are float32 inside autocast as outside."""
    head = nn.Linear(16, 300, bias=False, device=device)
    hidden = torch.randn(2, 5, 16, device=device)
    labels = torch.randint(0, 300, (2, 5), device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        logits = head(hidden)
        inside = fused(backend)(logits, labels)
        inside.sum().backward()
    assert logits.dtype == torch.bfloat16
    assert inside.dtype == torch.float32
    assert torch.equal(inside, fused(backend)(logits, labels))
    assert head.weight.grad.isfinite().all()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, backend, device):
    batch = make_batch((2, 5, 300), torch.float32, device)
    expected, expected_grad = value_and_grad(fused(backend), batch)
    logits = batch.logits.requires_grad_()
    value = checkpoint(fused(backend), logits, *batch[1:], use_reentrant=use_reentrant)
    value.sum().backward()
    assert torch.equal(value, expected)
    assert torch.equal(logits.grad, expected_grad)


class Scorer(nn.Module):
    """A module that holds the function, as users' loss modules do."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.head = nn.Linear(8, 50, bias=False)
        self.score = functools.partial(fused_seq_logprob, shift=True, backend=backend)

    def forward(self, hidden, labels):
        return self.score(self.head(hidden), labels)


def test_deepcopy_and_pickle(backend, device):
    module = Scorer(backend).to(device)
    inputs = torch.randn(2, 4, 8, device=device), torch.randint(0, 50, (2, 4), device=device)
    expected = module(*inputs)
    expected.sum().backward()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        other.zero_grad()
        value = other(*inputs)
        value.sum().backward()
        assert torch.equal(value, expected)
        assert torch.equal(other.head.weight.grad, module.head.weight.grad)


@pytest.mark.usefixtures("poisoned")
@pairwise(
    layout=["whole", "sliced"],
    dtype=[torch.float32, torch.bfloat16],
    options=[{}, dict(shift=True), dict(softcap=4.0)],
)
def test_inplace_backward_gives_the_same_bits(layout, dtype, options, backend, device):
    batch = make_batch((2, 5, 1030), dtype, device)
    leaf = batch.logits.clone().requires_grad_()
    scaled = leaf * 1.0  # as a head's output: not a leaf
    if layout == "sliced":
        batch = batch._make(x[:, 1:4] for x in batch)
        logits = scaled[:, 1:4]
    else:
        logits = scaled
    expected, expected_grad = value_and_grad(fused(backend), batch, **options)
    value = fused(backend)(logits, *batch[1:], inplace_backward=True, **options)
    address = logits.data_ptr()
    seen = []
    logits.register_hook(lambda g: seen.append(g.data_ptr()))
    value.sum().backward()
    assert torch.equal(value.detach(), expected)
    grad = leaf.grad[:, 1:4] if layout == "sliced" else leaf.grad
    assert torch.equal(grad, expected_grad)
    assert seen == [address]  # the gradient lies where the logits lay


def test_inplace_backward_twice_raises(backend, device):
    batch = make_batch((2, 3, 40), torch.float32, device)
    logits = batch.logits.requires_grad_() * 1.0
    value = fused(backend)(logits, *batch[1:], inplace_backward=True).sum()
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace_backward"):
        value.backward()


def test_inplace_backward_and_another_use_raises(backend, device):
    batch = make_batch((2, 3, 40), torch.float32, device)
    logits = batch.logits.requires_grad_() * 1.0
    first = fused(backend)(logits, *batch[1:], inplace_backward=True).sum()
    other = logits.exp().sin().sum()  # saves logits.exp(), not logits
    saver = logits.square().sum()  # saves logits
    first.backward(retain_graph=True)
    other.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saver.backward()


def test_inplace_backward_under_no_grad_leaves_logits(backend, device):
    batch = make_batch((2, 3, 40), torch.float32, device)
    before = batch.logits.clone()
    with torch.no_grad():
        fused(backend)(*batch, inplace_backward=True)
    assert torch.equal(batch.logits, before)


def test_gradient_accumulates_over_two_calls(backend, device):
    """Chosen and rejected halves of one batch of logits, scored by two calls."""
    batch = make_batch((4, 3, 300), torch.float32, device)
    logits = batch.logits.clone().requires_grad_()
    halves = [fused(backend)(*(x[s] for x in (logits, *batch[1:])))
              for s in (slice(0, 2), slice(2, 4))]  # fmt: skip
    (halves[0].sum() - halves[1].sum()).backward()
    upstream = torch.tensor([1.0, 1.0, -1.0, -1.0], device=device)
    assert torch.equal(logits.grad, value_and_grad(fused(backend), batch, upstream)[1])


def test_inference_mode_then_training(backend, device):
    """A reference pass under inference_mode leaves nothing behind that training trips on."""
    batch = make_batch((2, 3, 3001), torch.float64 if backend == "torch" else torch.float32, device)
    with torch.inference_mode():
        inside = fused(backend)(*batch)
    value, _ = value_and_grad(fused(backend), batch)
    with torch.inference_mode():
        again = fused(backend)(*batch)
    assert torch.equal(inside, value)
    assert torch.equal(again, value)


def test_threads_do_not_share_room(device):
    """Two threads at a time, as data loaders and parallel replicas run."""
    batches = [make_batch((4, 8, 9001), torch.float32, device) for _ in range(6)]
    expected = [value_and_grad(fused("torch"), batch) for batch in batches]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            found = list(pool.map(lambda b: value_and_grad(fused("torch"), b), batches))
            for ours, theirs in zip(found, expected, strict=True):
                assert torch.equal(ours[0], theirs[0])
                assert torch.equal(ours[1], theirs[1])
