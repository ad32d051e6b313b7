"""A head under PyTorch's modes: meta tensors, autocast of float64, counted FLOPs."""

import pytest
import torch
from head_batches import make_head_batch
from torch.utils.flop_counter import FlopCounterMode

from dpo_triton import fused_linear_seq_logprob, fused_linear_token_logprob, reference


@pytest.mark.parametrize("trains", [True, False])
def test_meta_tensors(trains):
    hidden = torch.empty(2, 3, 8, device="meta", requires_grad=True)
    weight = torch.empty(50, 8, device="meta", requires_grad=trains)
    labels = torch.empty(2, 3, dtype=torch.int64, device="meta")
    value = fused_linear_seq_logprob(hidden, weight, labels)
    assert value.shape == (2,)
    assert fused_linear_token_logprob(hidden, weight, labels).shape == (2, 3)
    value.sum().backward()
    assert hidden.grad.shape == hidden.shape


def test_autocast_leaves_float64_alone(device):
    batch = make_head_batch((2, 3, 16), 50, torch.float64, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        value = fused_linear_seq_logprob(*batch[:2], *batch[3:], backend="torch")
    assert value.dtype == torch.float64
    exact = reference.linear_seq_logprob(*batch[:2], *batch[3:])
    torch.testing.assert_close(value, exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("trains", "products"), [(True, (1, 2)), (False, (2, 0))])
def test_flops(trains, products, device):
    """Those of the model, of all rows: hidden @ weight.T, and its two gradients."""
    hidden, weight, _, labels, _ = make_head_batch((2, 5, 16), 50, device=device)
    hidden.requires_grad_()
    weight.requires_grad_(trains)
    with FlopCounterMode(display=False) as forward:
        value = fused_linear_seq_logprob(hidden, weight, labels).sum()
    with FlopCounterMode(display=False) as backward:
        value.backward()
    one = 2 * 10 * 16 * 50
    assert (forward.get_total_flops(), backward.get_total_flops()) == tuple(
        n * one for n in products
    )
