"""Any finite logit, on compiled kernels: banned tokens, outliers, and where exponents end.

The interpreter would hide what this is about: how products are rounded.
"""

import math

import pytest
import torch
from batches import assert_close, fused

from gpu_lab.driver import emulate

LOWEST = {dtype: torch.finfo(dtype).min for dtype in (torch.float32, torch.bfloat16, torch.float16)}
STATS = ("entropy", "mean_logit", "top1", "log_sum_sq_probs")

pytestmark = pytest.mark.usefixtures("poisoned")


def truth(logits, labels, temperature, logit_scale, softcap):
    """log_softmax in float64: its largest logit is subtracted before anything is added."""
    u = logits.double() * logit_scale
    z = (u if softcap is None else softcap * torch.tanh(u / softcap)) / temperature
    p = z.log_softmax(-1)
    stats = {
        "entropy": -(p.exp() * p.clamp(min=-1e4)).sum(-1),
        "mean_logit": z.mean(-1),
        "top1": (z.argmax(-1) == labels).double(),
        "log_sum_sq_probs": (2.0 * p).logsumexp(-1),
    }
    return p.gather(-1, labels[..., None])[..., 0], stats


def check(
    logits, labels, *, temperature=1.0, logit_scale=1.0, softcap=None, target="sm_90", rounding=0.0
):
    """Log-probabilities, gradient and stats of every token; rounding: of the logits, in nats."""
    options = dict(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    leaf, exact_leaf = logits.clone().requires_grad_(), logits.double().requires_grad_()
    with emulate(target):
        logps, stats = fused("triton", "fused_token_logprob")(leaf, labels, stats=STATS, **options)
        logps.clamp(min=-1e30).sum().backward()
    exact, exact_stats = truth(exact_leaf, labels, **options)
    exact.clamp(min=-1e30).sum().backward()
    within = 1e-6 * (1 + exact.detach().abs()) + rounding
    wrong = ((logps - exact).abs() > within) & (logps != exact.float())  # -inf where float32 ends
    assert not wrong.any(), (logps[wrong], exact[wrong])
    assert_close(leaf.grad, exact_leaf.grad, 1e-6 * float(exact_leaf.grad.abs().max()), "gradient")
    for name, stat in stats.items():
        right = exact_stats[name].detach()
        own = rounding if name == "mean_logit" else 0.0  # the others are of differences
        far = (stat - right).abs() > 2e-6 * (1 + right.abs()) + own
        far &= stat != right.float()  # likewise, and the mean of banned logits
        assert not far.any(), (name, stat[far], right[far])


def rows_of(batch, vocab_size, dtype=torch.float32, spread=3.0):
    logits = (torch.randn(batch, 3, vocab_size) * spread).to(dtype)
    return logits, torch.randint(vocab_size // 2, vocab_size, (batch, 3))


@pytest.mark.parametrize("dtype", list(LOWEST), ids=str)
def test_banned_tokens(dtype):
    """Of the first tile of every thread, and of all but the target or but one other."""
    lowest = LOWEST[dtype]
    bans = [max(ban, lowest) for ban in (-1e9, -1e10, -1e20, -1e30, lowest)]
    logits, labels = rows_of(len(bans), 4500, dtype)
    for b, ban in enumerate(bans):
        logits[b, :, :2048] = ban
        logits[b, 1].fill_(ban)[labels[b, 1]] = 1.5
        logits[b, 2].fill_(ban)[[7, int(labels[b, 2])]] = torch.tensor([-2.0, 1.0], dtype=dtype)
    check(logits, labels)


@pytest.mark.parametrize(
    ("ban", "target"), [(-1e10, "sm_80"), (LOWEST[torch.float32], "sm_100"), (-math.inf, "sm_90")]
)
def test_a_banned_split(ban, target):
    logits, labels = rows_of(1, 16384 + 500)
    labels.fill_(16700)
    logits[..., :16384] = ban
    logits[0, 1, 16384:] = ban
    logits[0, 1, [3, 16700]] = torch.tensor([0.5, -0.5])
    logits[0, 2, 16384:] -= 1e8
    check(logits, labels, target=target)


@pytest.mark.parametrize("temperature", [1.0, 0.03, 50.0])
def test_flat_rows(temperature):
    """-log V, whatever the level; a target above or below it takes or leaves everything."""
    levels = [sign * x for x in (1e9, 1e31, *LOWEST.values()) for sign in (1, -1)]
    logits = torch.tensor(levels)[:, None, None].repeat(1, 3, 300)
    labels = torch.tensor([[0, 170, 299]]).repeat(len(levels), 1)
    logits[:, 1, 170] *= 0.99
    logits[:, 2, :40] = 0.0
    check(logits, labels, temperature=temperature)


@pytest.mark.parametrize("options", [{}, dict(temperature=1e5), dict(softcap=30.0)], ids=str)
def test_outliers(options):
    """A large logit at the target, elsewhere, and in two places."""
    logits, labels = rows_of(4, 2500)
    labels[:, 2] = 2400
    for b, outlier in enumerate((1e9, 1e20, -LOWEST[torch.float32], -1e20)):
        logits[b, 0, labels[b, 0]] = outlier
        logits[b, 1, 77] = outlier
        logits[b, 2, [5, 2400]] = outlier
    check(logits, labels, **options)


@pytest.mark.parametrize("temperature", [1.0, 0.37, 1e6, 1e-6])
def test_where_exponents_end(temperature):
    """Neighbouring float32 numbers around the largest exponent, 2 ** 30, many of them equal."""
    end = 2.0**30 * math.log(2.0) * temperature
    logits = torch.tensor([end, -end])[:, None, None].repeat(1, 6, 400)
    logits *= 1 + torch.randint(-3, 4, logits.shape) * 2.0**-23
    logits[:, 3:, 1::2] *= 0.5
    check(logits, torch.randint(0, 400, (2, 6)), temperature=temperature)


@pytest.mark.parametrize(
    ("spread", "options"),
    [
        (1e9, {}),
        (1e15, dict(temperature=1e15)),
        (1e15, dict(logit_scale=1e-15)),
        (1e30, dict(temperature=1e15, logit_scale=1e-15)),
        (1.0, dict(temperature=1e-15)),
        (1.0, dict(temperature=1e-15, logit_scale=1e15)),
        (1e15, dict(softcap=1e15)),
        (1e30, dict(softcap=1e15, temperature=1e15, logit_scale=1e-15)),
    ],
    ids=str,
)
def test_any_scale(spread, options):
    logits, labels = rows_of(1, 300, spread=spread)
    labels[0, 0] = int(logits[0, 0].argmax())
    # Capped logits are numbers of float32, of which two, each a few roundings off, are subtracted.
    softcap, temperature = options.get("softcap", 0.0), options.get("temperature", 1.0)
    check(logits, labels, **options, rounding=4 * 2.0**-24 * softcap / temperature)


def test_nan_and_inf_stay_seen():
    """Also where logits that equal the peak are counted: NaN in that row, and in it alone."""
    logits = torch.tensor([-1e10, 0.0, 1e10])[:, None, None].repeat(1, 3, 300)
    labels = torch.tensor([[0, 170, 299]]).repeat(3, 1)
    logits[:, 0, 200], logits[:, 2, 200] = math.nan, math.inf
    with emulate("sm_90"):
        logps = fused("triton", "fused_token_logprob")(logits, labels)
    assert logps.isnan().tolist() == [[True, False, True]] * 3
