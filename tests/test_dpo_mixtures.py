"""Several losses at once: what each is given, and what they share."""

import torch
from batches import max_error
from pair_batches import draw_pairs

from dpo_triton import fused_dpo_loss, fused_seq_logprob
from dpo_triton.losses import LOSSES, mixture_loss
from dpo_triton.losses import SequenceLogps as Logps


def test_mixture_gives_each_loss_what_it_takes():
    """From sums or from means alike, with RPO's NLL; weights of pairs last."""
    sums, lengths = -torch.rand(4, 5).double() * 20, torch.randint(1, 9, (2, 5)).double()
    counts = lengths.repeat(2, 1)
    means = sums / counts
    of_sums = [Logps(v, "sum", n) for v, n in zip(sums, counts, strict=True)]
    of_means = [Logps(v, "mean", n) for v, n in zip(means, counts, strict=True)]
    pair_weights = torch.rand(5).double().requires_grad_()
    options = dict(beta=0.3, rpo_alpha=0.2, pair_weights=pair_weights, label_smoothing=0.125)
    weights = {"sigmoid": 0.5, "ipo": 2.0, "simpo": 1.0, "hinge": -0.25}
    expected = (
        0.5 * LOSSES["sigmoid"].function(*sums, beta=0.3, label_smoothing=0.125).losses
        + 2.0 * LOSSES["ipo"].function(*means, beta=0.3).losses
        + LOSSES["simpo"].function(*means[:2], beta=0.3, label_smoothing=0.125).losses
        - 0.25 * LOSSES["hinge"].function(*sums, beta=0.3).losses
        + 0.2 * LOSSES["sft"].function(sums[0], lengths[0]).losses
    ) * pair_weights
    for answers in (of_sums, of_means):
        ours = mixture_loss(weights, *answers, **options)
        torch.testing.assert_close(ours.losses, expected.detach())
        assert not ours.losses.requires_grad  # through the weights of pairs
        torch.testing.assert_close(ours.chosen_rewards, 0.3 * (sums[0] - sums[2]))


def test_rewards_are_of_the_first_loss_that_has_any():
    batch, ref_logits = draw_pairs()
    alone = fused_dpo_loss(*batch, ref_logits=ref_logits, beta=0.3)
    for loss_type in (["sft", "sigmoid"], ["sigmoid", "ipo"], ["sigmoid", "sft"]):
        ours = fused_dpo_loss(*batch, ref_logits=ref_logits, beta=0.3, loss_type=loss_type)
        assert torch.equal(ours.metrics.chosen_rewards, alone.metrics.chosen_rewards)
        assert torch.equal(ours.metrics.rejected_rewards, alone.metrics.rejected_rewards)


def test_rpo_is_a_mixture():
    batch, ref_logits = draw_pairs()
    rpo = fused_dpo_loss(*batch, ref_logits=ref_logits, rpo_alpha=0.5)
    mixture = fused_dpo_loss(
        *batch, ref_logits=ref_logits, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5]
    )
    assert torch.equal(rpo.loss, mixture.loss)
    alone = fused_dpo_loss(*batch, ref_logits=ref_logits)
    chosen = fused_seq_logprob(*batch, reduction="sum")[:3].double()
    nll = -chosen.sum() / batch.mask[:3].double().sum()
    assert max_error(rpo.loss, alone.loss.double() + 0.5 * nll) < 1e-5
