"""Losses with a mean over tokens: a batch in parts has the gradient of the whole batch."""

import pytest
import torch

from dpo_triton.losses import SequenceLogps, mixture_loss

LOSSES = {
    "sft": dict(losses={"sft": 1.0}),
    "cpo": dict(losses={"cpo": 1.0}),
    "orpo": dict(losses={"orpo": 1.0}),
    "rpo": dict(losses={"sigmoid": 1.0}, rpo_alpha=0.7),
}


def gradient(sums, lengths, parts, *, is_told, losses, **options):
    """Of the mean over all pairs, accumulated over parts of the batch."""
    leaf = sums.clone().requires_grad_()
    whole = dict(mean_chosen_length=lengths[0].mean()) if is_told else {}
    for part in parts:
        sides = [
            SequenceLogps(values[part], "sum", side_lengths[part])
            for values, side_lengths in zip((*leaf, *(sums - 1)), (*lengths, *lengths), strict=True)
        ]
        result = mixture_loss(losses, *sides, beta=0.3, **whole, **options)
        (result.losses.sum() / sums.shape[1]).backward()
    return leaf.grad


@pytest.mark.parametrize("name", LOSSES)
def test_parts_of_a_batch_have_its_gradient_when_told_its_mean_length(name):
    lengths = torch.stack([torch.randperm(40)[:8] + 1.0 for _ in range(2)]).double()  # apart
    lengths[0, :3] += 100  # one part has most of the tokens
    sums = -lengths * (0.1 + torch.rand(2, 8, dtype=torch.float64))
    parts = (slice(0, 3), slice(3, 4), slice(4, 8))
    options = LOSSES[name]
    exact = gradient(sums, lengths, [slice(0, 8)], is_told=False, **options)
    told = gradient(sums, lengths, parts, is_told=True, **options)
    torch.testing.assert_close(told, exact, rtol=1e-6, atol=1e-9)
    untold = gradient(sums, lengths, parts, is_told=False, **options)
    assert ((untold - exact).norm() / exact.norm()) > 0.02
