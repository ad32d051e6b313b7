"""What a caller gets is its own: whatever is done to it in place, the gradient is the same."""

import gc
import weakref

import pytest
import torch
from batches import fused, make_batch
from head_batches import FROZEN, make_head_batch

from dpo_triton import fused_dpo_loss

STATS = ("lengths", "token_logps", "entropy", "mean_logit", "top1", "log_sum_sq_probs")


def spoil(tensors):
    """As an all-reduce for a log does, and worse."""
    for x in tensors:
        x.mul_(7.0).add_(1.0)


@pytest.mark.parametrize("reduction", ["mean", "sum", None])
def test_stats_of_logits(reduction, backend, device):
    batch = make_batch((2, 3, 50), torch.float32, device)
    name, options = "fused_seq_logprob", dict(reduction=reduction)
    stats = STATS
    if reduction is None:
        name, options, stats = "fused_token_logprob", {}, STATS[1:]

    def grad(do):
        logits = batch.logits.clone().requires_grad_()
        value, found = fused(backend, name)(logits, *batch[1:], stats=stats, **options)
        do(found.values())
        return torch.autograd.grad(value.square().sum(), logits)[0]

    assert torch.equal(grad(spoil), grad(lambda tensors: None))


@pytest.mark.parametrize("trains", [(True, True, False), FROZEN])
def test_stats_of_a_head(trains, backend, device):
    hidden, weight, _, labels, mask = make_head_batch((2, 3, 16), 50, device=device)

    def grad(do):
        leaf = hidden.clone().requires_grad_()
        head = weight.clone().requires_grad_(trains[1])
        function = fused(backend, "fused_linear_seq_logprob")
        value, found = function(leaf, head, labels, mask, stats=STATS)
        do(found.values())
        return torch.autograd.grad(value.square().sum(), leaf)[0]

    assert torch.equal(grad(spoil), grad(lambda tensors: None))


def test_lengths_under_compile(device):
    """A graph that writes to lengths does so to a copy."""
    batch = make_batch((2, 3, 50), torch.float32, device)

    def grad(times):
        def loss(logits):
            value, found = fused("auto")(logits, *batch[1:], stats=("lengths",))
            found["lengths"].mul_(times)
            return value.sum()

        logits = batch.logits.clone().requires_grad_()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        return torch.autograd.grad(compiled(logits), logits)[0]

    assert torch.equal(grad(2.0), grad(1.0))


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm", "ipo", "simpo", "orpo"])
def test_metrics_of_a_loss(loss_type, device):
    """Sums that are turned into means, and means, divide by lengths that metrics show."""
    batch = make_batch((4, 5, 60), torch.float32, device)
    reference = dict(ref_logits=batch.logits + 0.1) if loss_type not in ("simpo", "orpo") else {}

    def grad(do):
        logits = batch.logits.clone().requires_grad_()
        options = dict(loss_type=loss_type, stats=("entropy",), **reference)
        loss, metrics = fused_dpo_loss(logits, *batch[1:], **options)
        do([*metrics[:-1], *metrics.stats.values()])
        return torch.autograd.grad(loss, logits)[0]

    assert torch.equal(grad(spoil), grad(lambda tensors: None))


def test_a_frozen_head_keeps_no_hidden_states(backend, device):
    hidden, weight, _, labels, mask = make_head_batch((2, 3, 16), 50, device=device)
    states = hidden.requires_grad_() * 1.0
    alive = weakref.ref(states)
    value = fused(backend, "fused_linear_seq_logprob")(states, weight, labels, mask)
    del states
    gc.collect()
    assert alive() is None
    value.sum().backward()
    assert hidden.grad.isfinite().all()
