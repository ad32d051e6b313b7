"""Hidden states and head: values and gradients against float64, for any tiles."""

import pytest
import torch
import torch.nn.functional as F
from batches import assert_close, assert_within_budget, fused, max_error, rounding
from head_batches import (
    ALL,
    FROZEN,
    TILE_V,
    HeadBatch,
    linear_truth,
    make_head_batch,
    plain_linear,
    value_and_grads,
)

from dpo_triton import reference

STATS = ("lengths", "token_logps", "entropy", "mean_logit", "top1", "log_sum_sq_probs")


def seq(backend):
    return fused(backend, "fused_linear_seq_logprob")


def check(batch, backend, trains=ALL, plain=plain_linear, **options):
    """Value and gradients within the budget of batches.py: plain PyTorch sets it."""
    upstream = torch.randn(batch.labels.shape[:1], device=batch.hidden.device)
    found = value_and_grads(seq(backend), batch, upstream, trains, **options)
    exact = linear_truth("seq_logprob", batch, upstream, trains)
    rough = value_and_grads(plain, batch, upstream, trains)
    names = ["value", *(n for n, t in zip(HeadBatch._fields[:3], trains, strict=True) if t)]
    for what, ours, theirs, truth in zip(names, found, rough, exact, strict=True):
        assert_within_budget(ours, theirs, truth, what)
    assert found[0].dtype == torch.float32
    assert all(grad.dtype == batch.hidden.dtype for grad in found[1:])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("trains", [ALL, FROZEN, (True, False, True), (False, True, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# 1, 37: less than a tile; then around one tile, and the first column of a third.
@pytest.mark.parametrize("vocab_size", [1, 37, TILE_V - 1, TILE_V, TILE_V + 1, 2 * TILE_V + 1])
def test_torch_within_budget(vocab_size, dtype, trains):
    batch = make_head_batch((3, 12, 24), vocab_size, dtype)
    check(batch, "torch", trains)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("trains", [ALL, FROZEN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab_size", [37, TILE_V + 1])
def test_triton_within_budget(vocab_size, dtype, trains, device):
    pytest.importorskip("triton")
    batch = make_head_batch((2, 4, 16), vocab_size, dtype, device)
    check(batch, "triton", trains)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("trains", [ALL, FROZEN, (False, True, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 4, 20, 1000])  # the last block of 4 and of 20 is ragged
def test_any_number_of_rows_in_a_tile(rows, dtype, trains):
    """Plain PyTorch gets as many rows at a time: a product of one row is summed in another order,
    with three times the error."""
    batch = make_head_batch((4, 11, 24), 2 * TILE_V + 100, dtype)

    def plain(hidden, weight, labels, mask, bias):
        scored = mask != 0
        blocks = [F.linear(x, weight, bias) for x in hidden[scored].split(rows)]
        p = torch.cat(blocks).float().log_softmax(-1).gather(-1, labels[scored][:, None])[:, 0]
        p = torch.zeros_like(mask).index_put((scored,), p)
        return (p * mask).sum(-1) / mask.sum(-1)

    check(batch, "torch", trains, plain, tile_bytes=rows * TILE_V * dtype.itemsize)


@pytest.mark.usefixtures("poisoned")
def test_tiles_kept_and_made_again_are_the_same(backend, device):
    """None, some and all of three tiles wait for the backward pass: not a bit changes."""
    batch = make_head_batch((1, 9, 16), 2 * TILE_V + 5, torch.float32, device)
    batch = batch._replace(mask=None)
    exact = linear_truth("seq_logprob", batch)
    rooms = [int(tiles * 9 * TILE_V * 4) for tiles in (1, 2.5, 4, 100)]
    results = [value_and_grads(seq(backend), batch, tile_bytes=room) for room in rooms]
    for ours, truth in zip(results[0], exact, strict=True):
        assert_close(ours, truth, 6e-6 * float(truth.abs().max()))
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.equal(x, y)


OPTIONS = {
    "sum": dict(reduction="sum"),
    "shift": dict(shift=True),
    "temperature": dict(temperature=0.7),
    "scale": dict(temperature=2.5, logit_scale=0.25),
    "softcap": dict(softcap=30.0),
    "all": dict(softcap=5.0, logit_scale=0.7, temperature=1.3, shift=True, reduction="sum"),
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("trains", [ALL, FROZEN])
@pytest.mark.parametrize("case", OPTIONS)
def test_options(case, trains, backend, device):
    """Two tiles of columns, and as many of rows; every stat; the same per token."""
    shape = (2, 9, 16) if backend == "torch" else (2, 3, 16)
    batch = make_head_batch(shape, TILE_V + 30, torch.float32, device, spread=6.0)
    batch.labels[0, 1] = -100
    for name in ("seq_logprob", "token_logprob"):
        options, names = dict(OPTIONS[case]), STATS
        upstream = torch.randn(batch.labels.shape, device=device)
        if name == "seq_logprob":
            upstream = upstream[:, 0]
        else:
            options.pop("reduction", None)
            names = STATS[1:]
        function = fused(backend, f"fused_linear_{name}")
        tiles = dict(tile_bytes=5 * TILE_V * 4)
        found = value_and_grads(function, batch, upstream, trains, **options, **tiles)
        exact = linear_truth(name, batch, upstream, trains, **options)
        assert_close(found[0], exact[0], 2e-6 * (1 + float(exact[0].abs().max())), name)
        for ours, truth in zip(found[1:], exact[1:], strict=True):
            assert_close(ours, truth, 4e-6 * float(truth.abs().max()), name)
        hidden, weight, bias, labels, mask = batch
        value, stats = function(
            hidden, weight, labels, mask, bias=bias, stats=names, **options, **tiles
        )
        assert torch.equal(value, found[0])
        _, exact_stats = getattr(reference, f"linear_{name}")(
            *(x.cpu().double() for x in (hidden, weight)),
            labels.cpu(),
            mask.cpu(),
            bias=bias.cpu().double(),
            stats=names,
            **options,
        )
        assert tuple(stats) == names
        for what, stat in stats.items():
            assert not stat.requires_grad
            scale = 1 + float(exact_stats[what].abs().max())
            assert max_error(stat, exact_stats[what]) <= 4e-6 * scale, what


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("trains", [ALL, FROZEN])
@pytest.mark.parametrize("shift", [False, True])
def test_packed(shift, trains, backend, device):
    """A sequence of one token, an empty one in the middle and one at the end."""
    cu_seqlens = torch.tensor([0, 4, 5, 5, 11, 11], dtype=torch.int32, device=device)
    batch = make_head_batch((11, 16), TILE_V + 7, torch.float32, device)
    upstream = torch.randn(5, device=device)
    options = dict(shift=shift, cu_seqlens=cu_seqlens)
    found = value_and_grads(seq(backend), batch, upstream, trains, **options)
    exact = linear_truth("seq_logprob", batch, upstream, trains, **options)
    rough = value_and_grads(reference.linear_seq_logprob, batch, upstream, trains, **options)
    assert_close(found[0], exact[0], 2e-6 * (1 + float(exact[0].abs().max())))
    for ours, plain, truth in zip(found[1:], rough[1:], exact[1:], strict=True):
        # The product's rounding alone is more than that in one draw of thousands.
        allowed = max(4e-6 * float(truth.abs().max()), 2 * max_error(plain, truth))
        assert_close(ours, truth, allowed)
    tokens = fused(backend, "fused_linear_token_logprob")
    found = tokens(*batch[:2], *batch[3:], bias=batch.bias, **options)
    assert_close(found, linear_truth("token_logprob", batch, **options)[0], 2e-5)


@pytest.mark.parametrize("kind", ["bool", "int", "half", "none"])
def test_kinds_of_masks(kind, backend, device):
    batch = make_head_batch((2, 5, 16), 300, torch.float32, device)
    mask = {
        "bool": batch.mask > 0,
        "int": (batch.mask > 0).to(torch.uint8),
        "half": batch.mask.half(),
        "none": None,
    }[kind]
    if mask is None:
        batch.labels[0, :3] = -100
    batch = batch._replace(mask=mask)
    found = value_and_grads(seq(backend), batch)
    for ours, truth in zip(found, linear_truth("seq_logprob", batch), strict=True):
        assert_close(ours, truth, 4e-6 * (1 + float(truth.abs().max())))


@pytest.mark.parametrize("trains", [ALL, FROZEN])
def test_float64(trains):
    batch = make_head_batch((2, 7, 16), TILE_V + 7, torch.float64)
    found = value_and_grads(seq("torch"), batch, trains=trains, tile_bytes=3 * TILE_V * 8)
    for ours, truth in zip(found, linear_truth("seq_logprob", batch, trains=trains), strict=True):
        assert ours.dtype == torch.float64
        assert max_error(ours, truth) <= 1e-13 * float(truth.abs().max())


@pytest.mark.parametrize("trains", [ALL, FROZEN])
def test_strided_inputs(trains, backend, device):
    """Views: hidden states cut out of longer and wider ones, a transposed head, a part of one."""
    batch = make_head_batch((3, 5, 16), 310, torch.float32, device)
    wide = torch.randn(5, 4, 20, device=device).transpose(0, 1)  # (4, 5, 20)
    labels = batch.labels.t().contiguous().t()
    views = [
        batch._replace(hidden=wide[1:, :, 2:18], labels=labels),
        batch._replace(weight=batch.weight.t().contiguous().t()),
        batch._replace(weight=torch.randn(400, 20, device=device)[90:, 3:19]),
        batch._replace(bias=torch.randn(1, device=device).expand(310)),
        batch._replace(hidden=torch.randn(16, device=device).expand(3, 5, 16)),
    ]
    for view in views:
        found = value_and_grads(seq(backend), view, trains=trains)
        dense = view._replace(**{n: getattr(view, n).contiguous() for n in view._fields[:4]})
        for ours, truth in zip(
            found, linear_truth("seq_logprob", dense, trains=trains), strict=True
        ):
            assert_close(ours, truth, 4e-6 * (1 + float(truth.abs().max())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_tiles_do_not_drift(dtype):
    """The weight's gradient of 64 blocks of rows is as good as that of one product."""
    batch = make_head_batch((1, 256, 16), 300, dtype)._replace(mask=None, bias=None)
    exact = linear_truth("seq_logprob", batch, torch.full((1,), 256.0), (True, True, False))
    blocks, once = (
        value_and_grads(
            seq("torch"), batch, torch.full((1,), 256.0), (True, True, False), tile_bytes=size
        )
        for size in (4 * 300 * 2, None)
    )
    for ours, one, truth in zip(blocks, once, exact, strict=True):
        error = [float((x.double() - truth).norm() / truth.norm()) for x in (ours, one)]
        assert error[0] <= 1.2 * error[1] + 1e-7
        # No bias: what is left of the error has no direction.
        assert abs(float((ours.double() - truth).mean())) <= 0.1 * rounding(truth, dtype)
