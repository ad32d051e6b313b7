"""The stages on some columns of a vocabulary: put side by side, the partials of column ranges are
those of the whole row."""

import pytest
import torch
from batches import assert_close, make_batch, truth
from stage_calls import run_combine, run_partials, tokens_of

from dpo_triton import reference
from dpo_triton._backends import backend_named
from dpo_triton._records import Columns, Partials, Scaling, Scored

STATS = ["entropy", "mean_logit", "top1", "log_sum_sq_probs"]
SPLIT_V = 16384  # of the kernels


def of_ranges(bounds, batch, backend, options=(1.0, 1.0, None)):
    """Partials of ranges of columns that end at the bounds, side by side."""
    logits, labels, mask = batch
    found = []
    for lo, hi in zip([0, *bounds[:-1]], bounds, strict=True):
        columns = Columns(lo, hi - lo, bounds[-1])
        inputs = (logits[..., lo:hi], tokens_of(labels, mask), columns, Scaling(*options), STATS)
        found.append(run_partials(backend, *inputs))
    sums, targets, weights = zip(*found, strict=True)
    return Partials(torch.cat(sums, 1), torch.stack(targets).amax(0), weights[0])


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
    partials, scaling = of_ranges(bounds, batch, backend, options), Scaling(*options)
    combined = run_combine(backend, partials, "sum", 3001, scaling, STATS)
    values, _, logps, softmax, stats = combined
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
        scored, columns = Scored(batch.labels, partials.weights, False), Columns(lo, hi - lo, 3001)
        inputs = (batch.logits[..., lo:hi], scored, softmax, columns, scaling, None)
        grads.append(backend_named(backend).grad(torch.ones_like(logps), *inputs))
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
    partials = of_ranges([300, 600, 900], (logits, labels, mask), backend)
    top1 = run_combine(backend, partials, "none", vocab_size, stats=STATS).stats[2]
    assert torch.equal(top1, (logits.argmax(-1) == labels).float())
    assert top1.tolist() == [[1.0, 0.0, 1.0, 0.0, 0.0, 1.0]]


def test_no_range_has_a_label_out_of_the_vocabulary(device):
    pytest.importorskip("triton")
    logits, labels, mask = make_batch((1, 3, 900), torch.float32, device)
    labels[0] = torch.tensor([-1, 900, 5])
    mask = torch.ones_like(mask)
    for lo, hi in ((0, 300), (300, 900)):
        columns, tokens = Columns(lo, hi - lo, 900), tokens_of(labels, mask)
        target = run_partials("triton", logits[..., lo:hi], tokens, columns).target
        assert target.isnan().tolist() == [True, True, False]
