"""The code that a GPU would run, on CPU tensors: values and gradients against float64.

The public functions go through Triton's JIT and compiler; the PTX runs in `gpu_lab`'s emulator,
which also checks bounds, alignment, barriers and races (its own tests: test_emulator.py).
"""

import pytest
import torch
from batches import Batch, assert_within_budget, fused, make_batch, max_error, truth, value_and_grad
from pairwise import pairwise

from dpo_triton import reference
from gpu_lab.driver import emulate

TARGETS = ["sm_80", "sm_90", "sm_100"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
STATS = ("lengths", "token_logps", "entropy", "mean_logit", "top1", "log_sum_sq_probs")
# Running sums are over 2048 columns or fewer at a time, and a split has 16384.
VOCABULARIES = [1, 1023, 6400, 16385, 50257, 128256]

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(params=TARGETS)
def target(request):
    return request.param


@pytest.fixture
def lab(target):
    with emulate(target) as lab:
        yield lab


def poison(batch, shift=False):
    """Rows that are not scored hold NaN, and their labels are nowhere: to read one shows."""
    unscored = batch.mask == 0
    logits, labels = batch.logits.clone(), batch.labels.masked_fill(unscored, 1 << 40)
    rows = torch.cat([unscored[:, 1:], torch.ones_like(unscored[:, :1])], 1) if shift else unscored
    logits[rows] = torch.nan
    return Batch(logits, labels, batch.mask)


def check(batch, shift=False, **options):
    """Value and gradient within the budget that plain PyTorch in float32 sets; return them."""
    options["shift"] = shift
    upstream = torch.randn(len(batch.logits))
    poisoned = poison(batch, shift)
    value, grad = value_and_grad(fused("triton"), poisoned, upstream, **options)
    exact = truth("seq_logprob", batch, upstream, **options)
    rough = truth("seq_logprob", batch, upstream, dtype=torch.float32, **options)
    on_cpu = value_and_grad(fused("torch"), poisoned, upstream, **options)
    assert value.dtype == torch.float32
    assert grad.dtype == batch.logits.dtype
    for name, ours, theirs, plain, right in zip(
        ("value", "gradient"), (value, grad), on_cpu, rough, exact, strict=True
    ):
        assert_within_budget(ours, plain, right, name)
        assert_within_budget(theirs, plain, right, f"{name} of the torch backend")
    return value, grad


@pairwise(vocab_size=VOCABULARIES, dtype=DTYPES, target=TARGETS)
def test_value_and_gradient(vocab_size, dtype, lab):
    check(make_batch((2, 3, vocab_size), dtype))
    assert {launch.kernel for launch in lab.launches} == {
        "_partials_kernel", "_combine_kernel", "_sequences_kernel", "_grad_kernel",
    }  # fmt: skip


@pairwise(vocab_size=[1, 1023, 6400, 16385], dtype=DTYPES, target=TARGETS)
def test_warps_apart(vocab_size, dtype, target):
    """Warps that run as far apart as barriers let them give the bits of those that run together."""
    batch = make_batch((2, 2, vocab_size), dtype)
    upstream = torch.randn(2)
    results = []
    for schedule in ("lockstep", "warps"):
        with emulate(target, schedule):
            results.append(value_and_grad(fused("triton"), batch, upstream))
    for together, apart in zip(*results, strict=True):
        assert torch.equal(together, apart)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_padded_head(dtype, lab):
    """Rows of 50257 in a head of stride 50304: wide loads, and the padding is not touched."""
    wide = make_batch((2, 2, 50304), dtype)
    batch = wide._replace(logits=wide.logits[..., :50257], labels=wide.labels % 50257)
    batch.mask[0, 0] = 1.0  # something is read, in one draw of a hundred nothing would be
    upstream = torch.randn(2)
    value, grad = value_and_grad(fused("triton"), batch, upstream)
    exact = truth("seq_logprob", batch, upstream)
    rough = truth("seq_logprob", batch, upstream, dtype=torch.float32)
    assert_within_budget(value, rough[0], exact[0])
    assert_within_budget(grad, rough[1], exact[1])
    forward = lab.launches[0]
    wide_bytes = 16 * forward.lanes["load", 16]
    assert wide_bytes > 0.97 * 50257 * batch.logits.element_size() * int((batch.mask != 0).sum())


@pairwise(
    case=[
        (6400, dict(shift=True)),
        (16385, dict(shift=True, reduction="sum")),
        (6400, dict(temperature=0.7)),
        (1023, dict(softcap=5.0, logit_scale=0.7, temperature=1.3)),
        (16400, dict(softcap=5.0, logit_scale=0.7, shift=True)),
    ],
    dtype=[torch.bfloat16, torch.float32],
    target=TARGETS,
)
def test_options(case, dtype, lab):
    vocab_size, options = case
    check(make_batch((2, 4, vocab_size), dtype), **options)


@pytest.mark.parametrize("shift", [False, True])
def test_packed(shift, lab):
    """A sequence of one token, an empty one in the middle and one at the end."""
    cu_seqlens = torch.tensor([0, 4, 5, 5, 11, 11])
    batch = make_batch((11, 6400), torch.bfloat16)
    options = dict(shift=shift, cu_seqlens=cu_seqlens)
    upstream = torch.randn(5)
    result = value_and_grad(fused("triton"), batch, upstream, **options)
    exact = truth("seq_logprob", batch, upstream, **options)
    rough = truth("seq_logprob", batch, upstream, dtype=torch.float32, **options)
    for ours, plain, right in zip(result, rough, exact, strict=True):
        assert_within_budget(ours, plain, right)


@pytest.mark.parametrize("shift", [False, True])
def test_padding_after_the_last_sequence(shift):
    """Nobody's tokens: not read, and 0 in every result and in the gradient."""
    batch = make_batch((11, 500), torch.float32)
    batch = batch._replace(mask=torch.ones(11))
    cu_seqlens = torch.tensor([0, 4, 8])
    inside = batch._make(x[:8] for x in batch)
    batch.logits[7 if shift else 8 :] = torch.nan
    batch.labels[8:] = 1 << 40
    leaf = batch.logits.requires_grad_()
    with emulate("sm_90"):
        values, stats = fused("triton")(
            leaf, *batch[1:], shift=shift, cu_seqlens=cu_seqlens, stats=STATS
        )
        (grad,) = torch.autograd.grad(values.sum(), leaf)
    exact, exact_grad = truth("seq_logprob", inside, shift=shift, cu_seqlens=cu_seqlens)
    assert max_error(values, exact) <= 1e-6 * (1 + float(exact.abs().max()))
    assert max_error(grad[:8], exact_grad) <= 1e-6
    assert (grad[8:] == 0).all()
    for name, stat in stats.items():
        if name != "lengths":
            assert (stat[8:] == 0).all(), name


@pytest.mark.parametrize(
    "ends", [[0, 3, 12], [0, 7, 3, 10], [-5, 4, 10], [5, 9], [3, -2], [1 << 40]]
)
def test_wrong_ends_touch_nothing_outside(ends):
    """Whatever they give: the emulator raises at an access outside of a tensor."""
    logits, labels, mask = make_batch((10, 40), torch.float32)
    for shift in (False, True):
        with emulate("sm_90"), torch.no_grad():
            values = fused("triton")(
                logits, labels, mask, shift=shift, cu_seqlens=torch.tensor(ends)
            )
        assert values.shape == (len(ends) - 1,)


def test_a_sequence_has_its_bits_wherever_it_is():
    """Longer than what its program takes at a time, alone and packed after another."""
    batch = make_batch((1500, 2), torch.float32)
    with emulate("sm_90"), torch.no_grad():
        alone = fused("triton")(*(x[:1200][None] for x in batch))
        moved = batch._make(x.roll(300, 0) for x in batch)
        packed = fused("triton")(*moved, cu_seqlens=torch.tensor([0, 300, 1500]))
    assert torch.equal(alone[0], packed[1])


@pairwise(
    vocab_size=[1, 6400, 16385], options=[{}, dict(softcap=8.0, logit_scale=0.5)], target=TARGETS
)
def test_stats(vocab_size, options, lab):
    """Every stat, and no bit of the values changed by asking for them."""
    batch = make_batch((2, 3, vocab_size), torch.bfloat16)
    poisoned = poison(batch)
    values, stats = fused("triton")(*poisoned, stats=STATS, **options)
    _, exact = reference.seq_logprob(
        batch.logits.double(), batch.labels, batch.mask, stats=STATS, **options
    )
    assert torch.equal(values, fused("triton")(*poisoned, **options))
    for name, stat in stats.items():
        scale = 1 + float(exact[name].abs().max())
        assert max_error(stat, exact[name]) <= 2e-6 * scale, name


def test_gradient_over_the_logits(lab):
    batch = make_batch((2, 3, 6400), torch.bfloat16)
    _, grad = value_and_grad(fused("triton"), batch)
    leaf = batch.logits.clone().requires_grad_()
    logits = leaf * 1  # not a leaf: what a model gives
    (over,) = torch.autograd.grad(
        fused("triton")(logits, *batch[1:], inplace_backward=True).sum(), logits
    )
    assert over.data_ptr() == logits.data_ptr()
    assert torch.equal(over, grad)


@pytest.mark.parametrize("vocab_size", [6400, 6401])  # rows that are aligned, and rows that are not
def test_same_bits_alone_and_in_a_batch(vocab_size, lab):
    batch = make_batch((3, 5, vocab_size), torch.bfloat16)
    batch = batch._replace(mask=torch.ones(3, 5))
    together = fused("triton", "fused_token_logprob")(*batch)
    for b, t in ((0, 0), (1, 3), (2, 4)):
        alone = fused("triton", "fused_token_logprob")(*(x[b : b + 1, t : t + 1] for x in batch))
        copied = [x[b : b + 1, t : t + 1].clone() for x in batch]
        assert torch.equal(alone[0, 0], together[b, t])
        assert torch.equal(fused("triton", "fused_token_logprob")(*copied)[0, 0], together[b, t])


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16])
@pytest.mark.parametrize("label_dtype", [torch.int32, torch.int64], ids=str)
def test_mask_and_label_dtypes(mask_dtype, label_dtype):
    with emulate("sm_90"):
        batch = make_batch((2, 6, 130), torch.float32)
        mask = (batch.mask > 0.5).to(mask_dtype)
        value = fused("triton")(batch.logits, batch.labels.to(label_dtype), mask)
        exact = truth("seq_logprob", batch._replace(mask=mask.float()))[0]
        assert max_error(value, exact) <= 1e-6 * (1 + float(exact.abs().max()))


def test_edges(lab):
    """Banned tokens, a label of nowhere, NaN in one sequence: as on the other backends."""
    batch = make_batch((4, 3, 6400), torch.float32)
    batch = batch._replace(mask=torch.ones(4, 3))
    logits, labels = batch.logits, batch.labels
    logits[0, :, :5000] = -torch.inf
    labels[0] = 5500
    labels[1, 1] = 6400
    logits[2, 0, 17] = torch.nan
    value, grad = value_and_grad(fused("triton"), batch)
    exact, exact_grad = truth("seq_logprob", Batch(logits[[0, 3]], labels[[0, 3]], batch.mask[:2]))
    assert max_error(value[[0, 3]], exact) <= 1e-5
    assert max_error(grad[[0, 3]], exact_grad) <= 1e-6
    assert value[1:3].isnan().all()
    assert grad[1, 0].isfinite().all()
    assert grad[2, 1:].isfinite().all()
