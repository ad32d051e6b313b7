"""What weighs tokens and pairs: LD-DPO's mask and WPO's weights."""

import numpy as np
import pytest
import torch
from pair_batches import draw_pairs

from dpo_triton import fused_dpo_loss, fused_seq_logprob
from dpo_triton.losses import LOSSES, ld_dpo_mask, wpo_weights


def naive_ld_weights(mask, alpha, layout, shift):
    """Token by token."""
    weights = mask.tolist()
    rows = len(weights)
    pairs = (
        [(i, i + rows // 2) for i in range(rows // 2)]
        if layout == "concat"
        else [(i, i + 1) for i in range(0, rows, 2)]
    )
    for pair in pairs:
        counted = [[t for t, w in enumerate(weights[b]) if w and (t or not shift)] for b in pair]
        shared = min(map(len, counted))
        for b, tokens in zip(pair, counted, strict=True):
            for t in tokens[shared:]:
                weights[b][t] *= alpha
    return torch.tensor(weights)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("layout", ["concat", "interleaved"])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_ld_dpo_mask(alpha, layout, shift):
    """With holes, empty answers, and first tokens that the shift leaves unscored."""
    mask = torch.rand(8, 12) * (torch.rand(8, 12) > torch.rand(8, 1))
    mask[3] = 0
    expected = naive_ld_weights(mask, alpha, layout, shift)
    torch.testing.assert_close(ld_dpo_mask(mask, alpha, layout=layout, shift=shift), expected)
    lengths = torch.randint(0, 12, (8,))  # packed: sequences without a token, too
    kept = torch.arange(12) < lengths[:, None]
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    expected = naive_ld_weights(torch.where(kept, mask, 0.0), alpha, layout, shift)
    ours = ld_dpo_mask(mask[kept], alpha, layout=layout, shift=shift, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(ours, expected[kept])
    as_bool = ld_dpo_mask(mask != 0, alpha, layout=layout, shift=shift)
    assert as_bool.dtype == torch.float32


def test_ld_dpo_mask_whatever_the_default_dtype():
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        weights = [ld_dpo_mask(x, 0.3) for x in (mask, mask.double(), mask != 0)]
        assert torch.equal(ld_dpo_mask(mask, np.float64(0.3)), weights[0])
    finally:
        torch.set_default_dtype(before)
    assert [x.dtype for x in weights] == [torch.float32, torch.float64, torch.float32]
    assert [x[0, 1].item() for x in weights] == [mask.new_tensor(0.3).item(), 0.3, weights[0][0, 1]]


def test_ld_dpo_in_one_call():
    batch, ref_logits = draw_pairs()
    batch.labels[0, 4] = -100  # not counted, although its weight is not 0
    weights = ld_dpo_mask(torch.where(batch.labels == -100, 0.0, batch.mask), 0.25, shift=True)
    expected = fused_dpo_loss(*batch[:2], weights, ref_logits=ref_logits, shift=True)
    ours = fused_dpo_loss(*batch, ref_logits=ref_logits, shift=True, ld_alpha=0.25)
    assert torch.equal(ours.loss, expected.loss)


def test_wpo_weights():
    """Each token against sum_v p_v ** 2, averaged, of both answers; and no gradient."""
    batch, ref_logits = draw_pairs()
    logits = batch.logits.double().requires_grad_()
    p = logits.detach().softmax(-1)
    p_label = p.gather(-1, batch.labels[..., None])[..., 0]
    aligned = (p_label / (p * p).sum(-1)).log()
    scored = batch.mask.clone().double()
    scored[:, 0] = 0
    # labels[:, t] is scored by logits[:, t - 1]
    shifted = torch.zeros_like(aligned)
    p_next = p[:, :-1].gather(-1, batch.labels[:, 1:, None])[..., 0]
    shifted[:, 1:] = (p_next / (p[:, :-1] ** 2).sum(-1)).log()
    for shift, values, weights in ((False, aligned, batch.mask.double()), (True, shifted, scored)):
        of_answers = torch.exp((values * weights).sum(1) / weights.sum(1))
        expected = of_answers[:3] * of_answers[3:]
        _, stats = fused_seq_logprob(
            *(logits, *batch[1:]), stats=("token_logps", "log_sum_sq_probs"), shift=shift
        )
        ours = wpo_weights(*stats.values(), batch.mask, shift=shift)
        torch.testing.assert_close(ours, expected)
        options = dict(ref_logits=ref_logits.double(), shift=shift)
        plain = fused_dpo_loss(logits, *batch[1:], **options)
        weighed = fused_dpo_loss(logits, *batch[1:], use_weighting=True, **options)
        torch.testing.assert_close(weighed.metrics.losses, plain.metrics.losses * expected)
        grads = [
            torch.autograd.grad(loss, logits)[0]
            for loss in (
                weighed.loss,
                (fused_losses(logits, batch, **options) * expected).mean(),
            )
        ]
        torch.testing.assert_close(*grads)


def fused_losses(logits, batch, ref_logits, shift):
    policy = fused_seq_logprob(logits, *batch[1:], reduction="sum", shift=shift)
    ref = fused_seq_logprob(ref_logits, *batch[1:], reduction="sum", shift=shift)
    return LOSSES["sigmoid"].function(policy[:3], policy[3:], ref[:3], ref[3:]).losses
