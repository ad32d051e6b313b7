"""Operators: their dispatcher where somebody watches, their body alone where nobody does."""

import pytest
import torch
from batches import make_batch
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_triton import _ops, fused_linear_seq_logprob, fused_seq_logprob


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def both_passes(function, *inputs, **options):
    leaf = inputs[0].clone().requires_grad_()
    value = function(leaf, *inputs[1:], **options)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), grad


@pytest.fixture
def head(device):
    batch = make_batch((2, 5, 40), torch.float32)
    hidden, weight = torch.randn(2, 5, 8, device=device), torch.randn(40, 8, device=device)
    return hidden, weight.requires_grad_(), batch.labels.to(device), batch.mask.to(device)


@pytest.fixture
def batch(device):
    return [x.to(device) for x in make_batch((2, 5, 40), torch.float32)]


def test_a_mode_and_a_profiler_see_the_operators(batch, head):
    with Seen() as seen:
        both_passes(fused_seq_logprob, *batch)
        both_passes(fused_seq_logprob, *batch, inplace_backward=False)
        both_passes(fused_linear_seq_logprob, *head)
    for name in ("logprob", "logprob_grad", "linear_logprob", "linear_logprob_grad"):
        assert f"dpo_triton.{name}.default" in seen.names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        both_passes(fused_seq_logprob, *batch)
    names = {event.key for event in profile.key_averages()}
    assert {"dpo_triton::logprob", "dpo_triton::logprob_grad"} <= names


def test_an_eager_call_goes_past_the_dispatcher_with_the_same_bits(batch, head, monkeypatch):
    with Seen():
        watched = (
            both_passes(fused_seq_logprob, *batch),
            both_passes(fused_linear_seq_logprob, *head),
        )

    def refuse(self, *inputs):
        raise AssertionError("went through the dispatcher")

    monkeypatch.setattr(torch._ops.OpOverload, "__call__", refuse)
    eager = both_passes(fused_seq_logprob, *batch), both_passes(fused_linear_seq_logprob, *head)
    for mine, theirs in zip(eager, watched, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_tensor_that_is_more_than_its_memory_goes_through_the_dispatcher(batch, backend):
    """A sign that is to be resolved, zeros without memory, gradients in a batch."""
    if batch[0].is_cuda:
        pytest.skip("these backends are for a CPU")
    if backend == "cpu":
        pytest.importorskip("numba")
    logits, labels, mask = batch

    def score(logits, mask):
        return fused_seq_logprob(logits, labels, mask, reduction="sum", backend=backend)

    value = score(logits, mask)
    torch.testing.assert_close(score(torch._neg_view(-logits), mask), value)
    leaf = logits.clone().requires_grad_()
    value = score(leaf, mask)
    (minus,) = torch.autograd.grad(value, leaf, -torch.ones(2), retain_graph=True)
    signed = torch._neg_view(torch.ones(2))
    assert torch.equal(torch.autograd.grad(value, leaf, signed, retain_graph=True)[0], minus)
    no_memory = torch._efficientzerotensor((2,))
    assert (torch.autograd.grad(value, leaf, no_memory)[0] == 0).all()
    jacobians = [
        torch.autograd.functional.jacobian(lambda x: score(x, mask), logits, vectorize=vectorize)
        for vectorize in (False, True)
    ]
    torch.testing.assert_close(*jacobians)


def test_labels_of_a_class_of_their_own_are_seen(batch):
    class Wrapped(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
            made.inner = inner
            return made

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            plain = [x.inner if isinstance(x, Wrapped) else x for x in args]
            return func(*plain, **(kwargs or {}))

    if batch[0].is_cuda:
        pytest.skip("a wrapper of CPU tensors")
    logits, labels, mask = batch
    value = fused_seq_logprob(logits, labels, mask)
    assert torch.equal(fused_seq_logprob(logits, Wrapped(labels), mask), value)
    assert torch.equal(fused_seq_logprob(logits, labels, Wrapped(mask)), value)


def test_who_is_watched(batch):
    logits = batch[0]
    assert not _ops.is_watched(logits)
    assert not _ops.is_watched(torch.nn.Parameter(logits))
    assert _ops.is_watched(logits.to("meta"))
    assert _ops.is_watched(torch.nn.Buffer(logits).as_subclass(type("Mine", (torch.Tensor,), {})))
    watched = []
    torch.func.vmap(lambda x: watched.append(_ops.is_watched(x)) or x)(logits)
    torch.jit.trace(
        lambda x: watched.append(_ops.is_watched(x)) or x + 1, logits, check_trace=False
    )
    assert watched
    assert all(watched)
