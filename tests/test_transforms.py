"""Transforms of calls: what works under them, and what says that it does not."""

import pytest
import torch
from batches import fused, make_batch
from head_batches import make_head_batch
from torch.autograd import forward_ad

from dpo_triton import fused_dpo_loss, fused_linear_seq_logprob, fused_linear_token_logprob

NO_TANGENT = "{} must not carry a tangent.*no forward-mode AD.*torch.autograd.grad, or dpo_triton"


@pytest.mark.parametrize("requires_grad", [False, True])
def test_dual_logits_are_refused(requires_grad, backend, device):
    """Without a gradient of their own, too, where no autograd function would see them."""
    logits, *tokens = make_batch((2, 3, 40), torch.float32, device)
    tangent = torch.randn_like(logits)
    logits.requires_grad_(requires_grad)
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match=NO_TANGENT.format("logits")),
    ):
        fused(backend)(forward_ad.make_dual(logits, tangent), *tokens)
    fused(backend)(logits, *tokens)  # with the level closed, all is as it was


def test_jvp_is_refused(backend, device):
    logits, *tokens = make_batch((2, 3, 40), torch.float32, device)
    with pytest.raises(NotImplementedError, match=NO_TANGENT.format("logits")):
        torch.func.jvp(lambda x: fused(backend)(x, *tokens), (logits,), (logits,))


def test_jvp_of_a_loss_is_refused(device):
    logits, labels, mask = make_batch((4, 3, 40), torch.float32, device)
    with pytest.raises(NotImplementedError, match=NO_TANGENT.format("logits")):
        torch.func.jvp(
            lambda x: fused_dpo_loss(x, labels, mask, loss_type="simpo").loss, (logits,), (logits,)
        )


@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_jvp_of_a_head_is_refused(name, device):
    hidden, weight, bias, labels, mask = make_head_batch((2, 3, 16), 40, device=device)
    inputs = dict(hidden=hidden, weight=weight, bias=bias)

    def of_one(x):
        return fused_linear_seq_logprob(labels=labels, mask=mask, **(inputs | {name: x}))

    with pytest.raises(NotImplementedError, match=NO_TANGENT.format(name)):
        torch.func.jvp(of_one, (inputs[name],), (inputs[name],))


def test_plain_tensors_beside_a_dual_level(backend, device):
    """A call that no tangent reaches computes what it does elsewhere."""
    batch = make_batch((2, 3, 40), torch.float32, device)
    with forward_ad.dual_level():
        assert torch.equal(fused(backend)(*batch), fused(backend)(*batch))


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("function", [fused_linear_seq_logprob, fused_linear_token_logprob])
def test_batched_gradients_of_a_head(function, trains, device):
    """As the rows of a Jacobian are made; a frozen head's backward pass is PyTorch's operators."""
    hidden, weight, bias, labels, mask = make_head_batch((2, 5, 16), 40, device=device)
    hidden.requires_grad_()
    leaves = [hidden, weight.requires_grad_()] if trains else [hidden]
    value = function(hidden, weight, labels, mask, bias=bias, shift=True)
    upstream = torch.randn(3, *value.shape, device=device)
    batched = torch.autograd.grad(value, leaves, upstream, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(value, leaves, one, retain_graph=True) for one in upstream]
    for ours, expected in zip(batched, zip(*single, strict=True), strict=True):
        assert torch.equal(ours, torch.stack(expected))
