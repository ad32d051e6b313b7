"""Logits to a loss where there is nothing to score, or little room in 16 bits."""

import pytest
import torch
from pair_batches import LN_2, OPTIONS, draw_pairs, exact_loss, reference_of

from dpo_triton import fused_dpo_loss
from dpo_triton.losses import LOSSES


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("empty", [[1], [4], [1, 4], list(range(6))], ids=str)
def test_empty_answers(name, empty):
    """Chosen, rejected, both, or the whole batch: finite, and no gradient for their logits."""
    batch, ref_logits = draw_pairs()
    batch.mask[empty] = 0.0
    batch.logits[empty] = torch.nan  # never read
    ref_logits[empty] = torch.inf
    logits = batch.logits.requires_grad_()
    ours = fused_dpo_loss(
        *(logits, *batch[1:]),
        **reference_of(name, ref_logits),
        loss_type=name,
        shift=True,
        stats=("entropy",),
        use_weighting=not LOSSES[name].sorts,
        **OPTIONS.get(name, {}),
    )
    ours.loss.backward()
    assert torch.isfinite(ours.loss)
    assert all(torch.isfinite(x).all() for x in ours.metrics[:-1])
    assert all(torch.isfinite(x).all() for x in ours.metrics.stats.values())
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[empty] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_float16_with_a_scaled_gradient(name):
    """A gradient scaler's 65536 reaches float16 logits as float64 has it, or as an honest inf."""
    batch, ref_logits = draw_pairs(dtype=torch.float16)
    options = OPTIONS.get(name, {}) | dict(beta=0.01 if name != "sft" else 0.1)
    logits = batch.logits.requires_grad_()
    ours = fused_dpo_loss(
        *(logits, *batch[1:]), **reference_of(name, ref_logits), loss_type=name, **options
    )
    scale = 65536.0
    (grad,) = torch.autograd.grad(ours.loss * scale, logits)
    exact_logits = batch.logits.detach().double().requires_grad_()
    if name == "sft":
        options = {}
    losses = exact_loss(name, exact_logits, ref_logits, *batch[1:], options=options)
    (exact,) = torch.autograd.grad(losses.mean() * scale, exact_logits)
    assert not grad.isnan().any()
    fits = exact.abs() < torch.finfo(torch.float16).max / 2
    assert fits.any()
    error = (grad.double() - exact)[fits].abs().max()
    assert error <= 2e-3 * exact[fits].abs().max() + 1e-3


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (4, 1)])
def test_no_tokens(shape):
    """No pairs, no positions, or (with the shift) nothing to score: 0 or ln 2, with a gradient."""
    logits = torch.randn(*shape, 9, requires_grad=True)
    labels = torch.zeros(shape, dtype=torch.int64)
    options = dict(shift=True, stats=("entropy",), use_weighting=True, ld_alpha=0.5)
    result = fused_dpo_loss(logits, labels, ref_logits=logits.detach(), **options)
    assert result.loss.item() == (0.0 if shape[0] == 0 else LN_2)
    assert torch.equal(torch.autograd.grad(result.loss, logits)[0], torch.zeros_like(logits))
