"""What comes beside the values: lengths and per-token statistics."""

import pytest
import torch
from batches import Batch, fused, make_batch, max_error
from pairwise import pairwise

from dpo_triton import reference

STATS = ("lengths", "token_logps", "entropy", "mean_logit", "top1", "log_sum_sq_probs")


@pytest.mark.usefixtures("poisoned")
@pairwise(
    vocab_size=[1, 2, 4097, 2 * 16384 + 1],
    dtype=[torch.float32, torch.bfloat16],
    options=[{}, dict(shift=True), dict(softcap=8.0, logit_scale=0.5, temperature=1.7)],
)
def test_stats_against_float64(vocab_size, dtype, options, backend, device):
    seq_len = 2 if vocab_size > 20000 else 4
    batch = make_batch((2, seq_len, vocab_size), dtype, device, spread=5.0)
    values, stats = fused(backend)(*batch, stats=STATS, **options)
    exact_values, exact = reference.seq_logprob(
        batch.logits.cpu().double(), *(x.cpu() for x in batch[1:]), stats=STATS, **options
    )
    assert tuple(stats) == STATS
    assert max_error(values, exact_values) <= 2e-6 * (1 + float(exact_values.abs().max()))
    for name, stat in stats.items():
        assert stat.dtype == torch.float32
        assert not stat.requires_grad
        assert stat.shape == exact[name].shape
        scale = 1 + float(exact[name].abs().max())
        assert max_error(stat, exact[name]) <= 2e-6 * scale, name


@pytest.mark.parametrize("name", STATS)
def test_each_alone_and_in_any_order(name, backend, device):
    """A stat has the same bits whatever was asked for beside it, and changes no value."""
    batch = make_batch((2, 2, 900), torch.float32, device)
    bare = fused(backend)(*batch)
    together = fused(backend)(*batch, stats=STATS[::-1])
    alone = fused(backend)(*batch, stats=[name])
    assert list(alone[1]) == [name]
    assert list(together[1]) == list(STATS[::-1])
    assert torch.equal(alone[1][name], together[1][name])
    assert torch.equal(bare, alone[0])
    assert torch.equal(bare, together[0])


def test_stats_of_packed_tokens(backend, device):
    batch = make_batch((9, 300), torch.float32, device)
    cu_seqlens = torch.tensor([0, 4, 9], device=device)
    _, packed = fused(backend)(*batch, stats=STATS, cu_seqlens=cu_seqlens, shift=True)
    for s, (lo, hi) in enumerate([(0, 4), (4, 9)]):
        _, alone = fused(backend)(*(x[None, lo:hi] for x in batch), stats=STATS, shift=True)
        for name in STATS[1:]:
            assert torch.equal(packed[name][lo:hi], alone[name][0]), name
        assert packed["lengths"][s] == alone["lengths"][0]


def test_stats_of_tokens(backend, device):
    batch = make_batch((2, 4, 300), torch.float32, device)
    tokens, stats = fused(backend, "fused_token_logprob")(*batch, stats=STATS[1:])
    _, expected = fused(backend)(*batch, stats=STATS)
    assert torch.equal(tokens, stats["token_logps"])
    for name in STATS[1:]:
        assert torch.equal(stats[name], expected[name])


def test_top1_takes_the_first_maximum(backend, device):
    """Ties are common in bf16; torch.argmax takes the first."""
    logits = torch.zeros(1, 4, 5000, device=device)
    logits[..., [10, 20, 4500]] = 2.0
    labels = torch.tensor([[10, 20, 4500, 3]], device=device)
    _, stats = fused(backend)(logits, labels, stats=["top1"])
    assert stats["top1"].tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_top1_takes_the_first_maximum_of_all_tiles(backend, device):
    """Whether the ties are before, in or after the tile of the target, 4096 columns wide."""
    weight = torch.zeros(9000, 1, device=device)
    weight[[10, 20, 4500, 8500]] = 2.0
    hidden = torch.ones(1, 4, 1, device=device)
    for first in (10, 4500, 8500):
        labels = torch.tensor([[first, 20, 4500, 8500]], device=device)
        _, stats = fused(backend, "fused_linear_token_logprob")(
            hidden, weight, labels, stats=["top1"]
        )
        is_first = [float(label == first) for label in labels[0].tolist()]
        assert stats["top1"][0].tolist() == is_first
        weight[: first + 1] = 0.0
        weight[20] = 0.0


def test_entropy_with_banned_tokens(backend, device):
    """0 * log 0 is 0."""
    logits = torch.full((1, 2, 700), -torch.inf, device=device)
    logits[0, :, :4] = 1.0
    labels = torch.tensor([[0, 699]], device=device)
    _, stats = fused(backend)(logits, labels, stats=["entropy", "log_sum_sq_probs"])
    expected = torch.log(torch.tensor(4.0, device=device))
    torch.testing.assert_close(stats["entropy"][0], expected.expand(2))
    torch.testing.assert_close(stats["log_sum_sq_probs"][0], -expected.expand(2))


def test_lengths_are_sums_of_weights(backend, device):
    batch = make_batch((3, 5, 20), torch.float32, device)
    batch.labels[0, 0] = -100
    _, stats = fused(backend)(*batch, stats=["lengths"])
    scored = torch.where(batch.labels == -100, 0.0, batch.mask)
    torch.testing.assert_close(stats["lengths"], scored.sum(1))


def test_stats_do_not_change_the_gradient(backend, device):
    batch = make_batch((2, 3, 2000), torch.float32, device)
    grads = []
    for stats in ((), STATS):
        logits = batch.logits.clone().requires_grad_()
        result = fused(backend)(logits, *batch[1:], stats=stats)
        value = result[0] if stats else result
        value.sum().backward()
        grads.append(logits.grad)
    assert torch.equal(*grads)


def test_stats_with_nan_stay_in_their_token(backend, device):
    batch = Batch(*make_batch((1, 2, 40), torch.float32, device)[:2], None)
    batch.logits[0, 0, 5] = torch.nan
    _, stats = fused(backend)(*batch, stats=("entropy", "mean_logit"))
    assert stats["entropy"][0].isnan().tolist() == [True, False]
    assert stats["mean_logit"][0].isnan().tolist() == [True, False]
