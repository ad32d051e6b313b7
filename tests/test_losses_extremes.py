"""Losses of log-probabilities far apart, near 0, in few bits, or of no pairs at all."""

import math

import mpmath as mp
import pytest
import torch
from batches import max_error
from loss_calls import OF_PAIRS, draw_logps, numbers, run_loss
from loss_formulas import CASES, F_OPTIONS, trl_f

from dpo_triton.losses import LOSSES, SequenceLogps, log1mexp, orpo_loss, sft_loss, sigmoid_loss

EXTREMES = [0.0, -1e-30, -1e-6, -1.0, -90.0, -1e4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_extremes(case, dtype):
    """Every pair of extremes, the reference at both ends: exact values, finite scaled gradients."""
    name = case.split()[0]
    formula, options, ours = CASES[case]
    grid = torch.tensor(EXTREMES)
    chosen, rejected = (x.flatten() for x in torch.meshgrid(grid, grid, indexing="ij"))
    with_reference = LOSSES[name].needs_reference
    for reference in [(0.0, 0.0), (-1e4, 0.0), (0.0, -1e4)] if with_reference else [()]:
        logps = [chosen, rejected, *(torch.full_like(chosen, x) for x in reference)]
        logps = [x.to(dtype) for x in logps]
        result, _ = run_loss(name, logps, **ours)
        assert result.losses.dtype == torch.float32
        policy = [x.float().requires_grad_() for x in logps[:2]]
        losses = LOSSES[name].function(*policy, *logps[2:], **(ours | kl_of(name, ours))).losses
        scaled = torch.autograd.grad(65536 * losses.mean(), policy)
        assert all(torch.isfinite(x).all() for x in (*result, *scaled))
        if "f" in options or "alpha" in options or name == "orpo":
            continue  # powers and log(1 - exp(0)) are bounded: the exact value is not the aim
        for value, truth in zip(losses.tolist(), formula(*numbers(logps), **options), strict=True):
            assert abs(value - truth) <= 1e-6 * (1 + abs(truth)), (value, truth)


def kl_of(name, options):
    return {} if name != "kto" or "kl" in options else dict(kl=0.25)


@pytest.mark.parametrize("options", F_OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["sigmoid_norm", "ipo"])
def test_extreme_means_of_divergences(name, options):
    grid = torch.tensor([-1e4, -40.0, 0.0, 40.0, 1e4])
    chosen, rejected = (x.flatten() for x in torch.meshgrid(grid, grid, indexing="ij"))
    policy = [chosen.requires_grad_(), rejected.requires_grad_()]
    zeros, ones = torch.zeros(25), torch.ones(25)
    lengths = dict(chosen_lengths=ones, rejected_lengths=ones)
    function = LOSSES[name].function
    result = function(*policy, zeros, zeros, **lengths, **trl_f(options))
    gradients = torch.autograd.grad(65536 * result.losses.mean(), policy)
    assert all(torch.isfinite(x).all() for x in (*result, *gradients))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_log1mexp(dtype):
    """Relative precision at every magnitude, finite with a finite gradient at 0 itself."""
    magnitudes = 10 ** torch.empty(500, dtype=dtype).uniform_(-18, 2)
    x = torch.cat([-magnitudes, -torch.tensor([math.log(2)], dtype=dtype)])
    exact = [mp.log(-mp.expm1(mp.mpf(v))) for v in x.tolist()]
    tolerance = 4 * torch.finfo(dtype).eps
    smallest = torch.finfo(dtype).tiny
    for value, truth in zip(log1mexp(x).tolist(), exact, strict=True):
        assert abs(value - truth) <= tolerance * abs(truth) + smallest
    zero = torch.zeros(1, dtype=dtype, requires_grad=True)
    value = log1mexp(zero)
    (gradient,) = torch.autograd.grad(65536 * value, zero)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient)


def test_orpo_keeps_small_log_probabilities_apart():
    """Both answers nearly certain: the odds still differ, and so do value and gradient."""
    chosen = torch.tensor([-1e-12, -1e-9], requires_grad=True)
    rejected = torch.tensor([-1e-9, -1e-12])
    losses = orpo_loss(chosen, rejected, beta=1.0).losses
    truth = [math.log1p(1e-3), math.log1p(1e3)]
    assert losses.tolist() == pytest.approx(truth, rel=1e-5)
    (gradient,) = torch.autograd.grad(losses.sum(), chosen)
    # d ls(odds) / d w = sig(-odds) / (1 - exp(w))
    assert gradient.tolist() == pytest.approx([-1 + -1 / 1001 / 1e-12, -1 / 1.001 / 1e-9], rel=1e-4)


def test_batch_of_none():
    for name in OF_PAIRS:
        logps = draw_logps(name, batch=0, dtype=torch.float32)
        result, gradients = run_loss(name, logps)
        assert all(len(x) == 0 for x in (*result, *gradients))


def test_reference_in_another_precision():
    """Log-probabilities stored in float64 or in 16 bits beside a float32 policy."""
    chosen, rejected = -torch.rand(3), -torch.rand(3)
    for dtype, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        result = sigmoid_loss(chosen, rejected, chosen.to(dtype), rejected.to(dtype))
        assert result.losses.dtype == expected
        assert max_error(result.losses, torch.full((3,), math.log(2)).double()) < 1e-2


def test_lengths_of_integers_whatever_the_default_dtype():
    """bfloat16 knows no 257."""
    sums, lengths = -torch.rand(3).double() * 300, torch.tensor([257, 513, 0])
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        losses = sft_loss(sums, lengths).losses
        means = SequenceLogps(sums, "sum", lengths).reduced_to("mean")
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(losses, (-sums.sum() / 770).expand(3))
    torch.testing.assert_close(means, sums / torch.tensor([257.0, 513.0, 1.0]).double())
