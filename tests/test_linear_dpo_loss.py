"""Hidden states and a head to a loss, beside the loss from their logits."""

import pytest
import torch
from pair_batches import LN_2, draw_pairs

from dpo_triton import fused_dpo_loss, fused_linear_dpo_loss


@pytest.mark.parametrize("trains_head", [True, False])
def test_linear_policy_equal_to_reference_is_ln_2(trains_head, device):
    """The reference's values are made without a graph, the policy's with one: the same bits."""
    batch, _ = draw_pairs(device=device)
    hidden = torch.randn(6, 7, 24, device=device, requires_grad=True)
    weight = torch.randn(60, 24, device=device, requires_grad=trains_head)
    head = weight.detach()
    ours = fused_linear_dpo_loss(
        *(hidden, weight, *batch[1:]), ref_hidden=hidden.detach(), ref_weight=head, shift=True
    )
    assert ours.loss.item() == LN_2


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "orpo", ["sigmoid", "sft"]], ids=str)
@pytest.mark.parametrize("is_packed", [False, True])
def test_linear_is_logits(loss_type, is_packed, device):
    batch, _ = draw_pairs(device=device)
    hidden, ref_hidden = torch.randn(2, 6, 7, 24, device=device) / 5
    weight, ref_weight = torch.randn(2, 60, 24, device=device)
    bias, ref_bias = torch.randn(2, 60, device=device)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    ref_leaves = [x.requires_grad_() for x in (ref_hidden, ref_weight, ref_bias)]
    options = dict(loss_type=loss_type, shift=True, stats=("entropy",))
    tokens, inputs, ref_inputs = batch[1:], hidden, ref_hidden
    if is_packed:
        options["cu_seqlens"] = torch.tensor([0, 7, 14, 21, 28, 35, 42], device=device)
        tokens = [x.flatten() for x in tokens]
        inputs, ref_inputs = hidden.flatten(0, 1), ref_hidden.flatten(0, 1)
    of_logits, of_hidden = {}, {}
    if loss_type != "orpo":
        of_logits = dict(ref_logits=ref_inputs @ ref_weight.T + ref_bias)
        of_hidden = dict(ref_hidden=ref_inputs, ref_weight=ref_weight, ref_bias=ref_bias)
    expected = fused_dpo_loss(inputs @ weight.T + bias, *tokens, **of_logits, **options)
    expected_grads = torch.autograd.grad(expected.loss, leaves)
    ours = fused_linear_dpo_loss(inputs, weight, *tokens, bias=bias, **of_hidden, **options)
    ours.loss.backward()
    torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-5, atol=1e-5)
    for name, values in ours.metrics._asdict().items():
        torch.testing.assert_close(values, getattr(expected.metrics, name), rtol=1e-4, atol=1e-4)
    for leaf, grad in zip(leaves, expected_grads, strict=True):
        torch.testing.assert_close(leaf.grad, grad, rtol=1e-4, atol=1e-5)
    assert all(leaf.grad is None for leaf in ref_leaves)
