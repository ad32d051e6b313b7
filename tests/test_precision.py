"""Where other formulas lose their digits: large margins, large logits, long sequences."""

import math

import mpmath
import pytest
import torch
from batches import Batch, assert_close, fused, make_batch, truth, value_and_grad
from stage_calls import run_combine, run_partials, tokens_of

from dpo_triton import reference

MARGINS = [-100.0, -20.0, -1.0, 0.0, 1.0, 10.0, 16.0, 17.0, 20.0, 40.0, 60.0, 80.0]


def leading_by(margin: float, vocab_size: int, device: torch.device) -> tuple[Batch, float]:
    """One row whose target leads everybody else together by `margin` nats; its log-probability."""
    logits = torch.randn(1, 1, vocab_size, device=device)
    y = int(torch.randint(0, vocab_size, ()))
    others = logits.double().flatten()
    others[y] = -math.inf
    logits[0, 0, y] = float(others.logsumexp(0)) + margin
    exact_odds = float(others.logsumexp(0)) - float(logits[0, 0, y])
    with mpmath.workdps(60):
        exact = float(-mpmath.log1p(mpmath.exp(exact_odds)))
    labels = torch.tensor([[y]], device=device)
    return Batch(logits, labels, torch.ones(1, 1, device=device)), exact


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("vocab_size", [2, 1025, 16385])
def test_exact_at_any_margin(margin, vocab_size, backend, device):
    batch, exact = leading_by(margin, vocab_size, device)
    value, grad = value_and_grad(fused(backend), batch)
    assert abs(float(value) - exact) <= 1e-5 * abs(exact)
    # Relative error of the gradient too: of the target's, and of the largest of the others.
    exact_grad = truth("seq_logprob", batch)[1]
    y = int(batch.labels)
    assert math.isclose(float(grad[0, 0, y]), -math.expm1(exact), rel_tol=1e-5)
    largest = int(exact_grad.flatten().argmin())
    assert math.isclose(
        float(grad.flatten()[largest]), float(exact_grad.flatten()[largest]), rel_tol=1e-5
    )


def test_the_plain_formula_collapses_past_17_nats(backend, device):
    """What the margins above are for: log_softmax gives 0, and a gradient of 0."""
    batch, exact = leading_by(20.0, 1025, device)
    p = torch.log_softmax(batch.logits, -1)[0, 0, int(batch.labels)]
    assert p == 0.0
    assert float(fused(backend)(*batch)) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("offset", [-300.0, 90.0, 3000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_logits_keep_their_digits(offset, dtype, backend, device):
    """logsumexp does not change when all logits move: neither may the error."""
    batch = make_batch((2, 3, 4099), torch.float32, device)
    moved = batch._replace(logits=(batch.logits + offset).to(dtype))
    value, grad = value_and_grad(fused(backend), moved)
    exact = truth("seq_logprob", moved)
    assert_close(value, exact[0], 1e-6 * (1 + float(exact[0].abs().max())))
    assert_close(grad, exact[1], 1e-6 * float(exact[1].abs().max()))


def test_a_poor_first_guess_of_the_peak(backend, device):
    """The first columns far above or below the others, the target among either."""
    batch = make_batch((6, 1, 5000), torch.float32, device)
    logits = batch.logits.clone()
    for row, drop in enumerate((-200.0, -60.0, -20.0, 20.0, 60.0, 200.0)):
        logits[row, 0, :3000] += drop
    for columns in (slice(0, 3000), slice(3000, 5000)):  # the target among either
        labels = torch.randint(columns.start, columns.stop, (6, 1), device=device)
        moved = Batch(logits, labels, torch.ones(6, 1, device=device))
        value, grad = value_and_grad(fused(backend), moved)
        exact = truth("seq_logprob", moved)
        relative = (value.cpu() - exact[0]).abs() / exact[0].abs()
        assert (relative <= 1e-5).all()
        assert_close(grad, exact[1], 1e-6)


def test_long_sequences_add_up(backend, device):
    """A sum over 1000 tokens is rounded once, not 1000 times: the second stage's doing."""
    batch = make_batch((1, 1000, 3), torch.float32, device)
    tokens = tokens_of(batch.labels, batch.mask)
    found = run_combine(backend, run_partials("torch", batch.logits, tokens), "sum", 3)
    exact = truth("seq_logprob", batch, reduction="sum")[0]
    assert float((found.values.cpu() - exact).abs() / exact.abs()) <= 1.2e-7


def test_reference_against_mpmath():
    """The specification itself, in 60 digits."""
    logits = torch.randn(2, 4, 12, dtype=torch.float64) * 10
    labels = torch.randint(0, 12, (2, 4))
    values = reference.seq_logprob(logits, labels, temperature=0.8, softcap=9.0, logit_scale=1.5)
    with mpmath.workdps(60):
        for b in range(2):
            total = mpmath.mpf(0)
            for t in range(4):
                u = [mpmath.mpf(float(x)) * 1.5 for x in logits[b, t]]
                z = [9 * mpmath.tanh(x / 9) / mpmath.mpf(0.8) for x in u]
                total += z[int(labels[b, t])] - mpmath.log(sum(map(mpmath.exp, z)))
            assert abs(float(values[b]) - float(total / 4)) < 1e-13


def test_reference_against_log_softmax():
    logits, labels, mask = make_batch((3, 5, 40), torch.float64)
    mask = mask.double()
    p = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    expected = ((p * mask).sum(1) / mask.sum(1)).nan_to_num(nan=0.0)
    value = reference.seq_logprob(logits, labels, mask)
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
