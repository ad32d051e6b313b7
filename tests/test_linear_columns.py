"""The stages on some columns of a vocabulary: put side by side, the partials of column ranges are
those of the whole row."""

import pytest
import torch
from batches import assert_close, make_batch, truth

from dpo_triton import _ops, reference
from dpo_triton._backends import resolve_backend

STATS = ["entropy", "mean_logit", "top1", "log_sum_sq_probs"]
SPLIT_V = 16384  # of the kernels


def of_ranges(bounds, batch, backend, options=(1.0, 1.0, None)):
    """Partials, targets and weights of ranges of columns that end at the bounds, side by side."""
    logits, labels, mask = batch
    found = []
    for lo, hi in zip([0, *bounds[:-1]], bounds, strict=True):
        inputs = (logits[..., lo:hi], labels, mask, None, False, -100, lo, bounds[-1], *options)
        stages = resolve_backend(backend, logits.device, logits.dtype)
        found.append(stages.partials(*inputs, STATS))
    partials, targets, weights = zip(*found, strict=True)
    return torch.cat(partials, 1), torch.stack(targets).amax(0), weights[0]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ranges_of_whole_splits_are_the_whole_row(dtype, device):
    """Three splits of the kernels, the last a ragged one, in ranges of two and one: same bits."""
    pytest.importorskip("triton")
    vocab_size = 2 * SPLIT_V + 16
    batch = make_batch((1, 3, vocab_size), dtype, device)
    batch = batch._replace(mask=torch.ones(1, 3, device=device))
    # One target in each split.
    batch.labels[:] = torch.tensor([5, SPLIT_V, vocab_size - 1])
    whole = of_ranges([vocab_size], batch, "triton")
    for bounds in ([2 * SPLIT_V, vocab_size], [SPLIT_V, 2 * SPLIT_V, vocab_size]):
        for one, other in zip(whole, of_ranges(bounds, batch, "triton"), strict=True):
            assert torch.equal(one, other)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("options", [(1.0, 1.0, None), (0.7, 1.3, 6.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ranges_against_float64(dtype, options, backend, device):
    """Ranges that end anywhere, of one column too: value, stats and gradient of the whole row."""
    batch = make_batch((2, 4, 3001), dtype, device)
    bounds = [1, 1000, 2999, 3001]
    batch.labels[0] = torch.tensor([0, 1, 999, 1000])  # at the ranges' edges
    partials, target, weights = of_ranges(bounds, batch, backend, options)
    values, _, logps, *of_tokens, stats = _ops.combine(
        partials, target, weights, None, "sum", 3001, *options, STATS, backend
    )
    named = dict(zip(("temperature", "logit_scale", "softcap"), options, strict=True))
    exact = truth("seq_logprob", batch, reduction="sum", **named)
    assert_close(values, exact[0], 2e-6 * (1 + float(exact[0].abs().max())))
    _, exact_stats = reference.seq_logprob(
        batch.logits.cpu().double(), *(x.cpu() for x in batch[1:]), stats=STATS, **named
    )
    for name, stat in zip(STATS, stats, strict=True):
        scale = 1 + float(exact_stats[name].abs().max())
        assert_close(stat, exact_stats[name], 2e-6 * scale, name)
    grads = []
    for lo, hi in zip([0, *bounds[:-1]], bounds, strict=True):
        inputs = (batch.labels, weights, *of_tokens, False, lo, *options, backend)
        grads.append(_ops.grad(torch.ones_like(logps), batch.logits[..., lo:hi], *inputs))
    assert_close(torch.cat(grads, -1), exact[1], 2e-6 * float(exact[1].abs().max()))


def test_top1_takes_the_first_maximum_of_all_ranges(backend, device):
    """Ties of the target in an earlier range, its own, and a later one."""
    vocab_size = 900
    logits = torch.zeros(1, 6, vocab_size, device=device)
    for t, (y, rival) in enumerate(
        [(10, 500), (500, 10), (310, 320), (320, 310), (899, 0), (0, 899)]
    ):
        logits[0, t, [y, rival]] = 2.0
    labels = torch.tensor([[10, 500, 310, 320, 899, 0]], device=device)
    mask = torch.ones(1, 6, device=device)
    partials, target, weights = of_ranges([300, 600, 900], (logits, labels, mask), backend)
    inputs = (None, "none", vocab_size, 1.0, 1.0, None, STATS, backend)
    top1 = _ops.combine(partials, target, weights, *inputs)[-1][2]
    assert torch.equal(top1, (logits.argmax(-1) == labels).float())
    assert top1.tolist() == [[1.0, 0.0, 1.0, 0.0, 0.0, 1.0]]


def test_no_range_has_a_label_out_of_the_vocabulary(device):
    pytest.importorskip("triton")
    logits, labels, mask = make_batch((1, 3, 900), torch.float32, device)
    labels[0] = torch.tensor([-1, 900, 5])
    mask = torch.ones_like(mask)
    stages = resolve_backend("triton", logits.device, logits.dtype)
    for lo, hi in ((0, 300), (300, 900)):
        inputs = (labels, mask, None, False, -100, lo, 900, 1.0, 1.0, None, [])
        target = stages.partials(logits[..., lo:hi], *inputs)[1]
        assert target.isnan().tolist() == [True, True, False]
