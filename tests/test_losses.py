"""Losses against their formulas in 60 digits: values, gradients and rewards."""

import math

import mpmath as mp
import numpy as np
import pytest
import torch
from loss_calls import OF_PAIRS, draw_logps, numbers, run_loss
from loss_formulas import CASES, F_OPTIONS, score, sft, smoothed, trl_f

from dpo_triton.losses import LOSSES, cpo_loss, kto_loss, orpo_loss, sft_loss

MEANS = {"sigmoid_norm", "ipo", "simpo", "orpo"}
REFERENCE_FREE = {"sft", "simpo", "cpo", "orpo"}


def exact_gradient(formula, logps, options):
    """By differences in 60 digits: of the sum of losses, for the policy's two lists."""
    lists = numbers(logps)
    gradients = []
    for which in (0, 1):
        gradient = []
        for i in range(len(lists[which])):

            def total(x, which=which, i=i):
                changed = [list(values) for values in lists]
                changed[which][i] = x
                return sum(formula(*changed, **options))

            gradient.append(mp.diff(total, lists[which][i]))
        gradients.append(torch.tensor([float(x) for x in gradient], dtype=torch.float64))
    return gradients


def test_table():
    """Which value each loss takes and whether it needs a reference, as its paper has it."""
    assert set(LOSSES) == {case.split()[0] for case in CASES} | {"sft"}
    for name, loss in LOSSES.items():
        expected = "tokens" if name == "sft" else "mean" if name in MEANS else "sum"
        assert loss.takes == expected, name
        assert loss.needs_reference == (name not in REFERENCE_FREE), name
        assert loss.function.__name__ == f"{name}_loss"


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient(case):
    name = case.split()[0]
    formula, options, ours = CASES[case]
    logps = draw_logps(name)
    result, gradients = run_loss(name, logps, **ours)
    exact = formula(*numbers(logps), **options)
    for value, truth in zip(result.losses.tolist(), exact, strict=True):
        assert abs(value - truth) <= 1e-12 * (1 + abs(truth))
    for gradient, truth in zip(gradients, exact_gradient(formula, logps, options), strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", OF_PAIRS)
@pytest.mark.parametrize("batch", [1, 7])
def test_gradcheck(name, batch):
    logps = draw_logps(name, batch)
    policy = [x.requires_grad_() for x in logps[:2]]
    options = dict(kl=0.25) if name == "kto" else {}
    assert torch.autograd.gradcheck(
        lambda *policy: LOSSES[name].function(*policy, *logps[2:], **options).losses, policy
    )


@pytest.mark.parametrize("options", F_OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["sigmoid_norm", "ipo"])
def test_f_divergence_of_means_is_of_the_sum(name, options):
    """The mean-taking losses divide the score of the whole answer by its length."""
    logps = draw_logps(name)
    lengths = [torch.randint(1, 9, (5,)).double() for _ in range(2)]
    result, _ = run_loss(
        name,
        logps,
        beta=0.3,
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
        **trl_f(options),
    )
    f, a = options["f"], options.get("a")
    (w, ref_w, v, ref_v), n = numbers(logps[::2] + logps[1::2]), numbers(lengths)
    for i in range(5):
        c = score(f, a, (w[i] - ref_w[i]) * n[0][i]) / n[0][i]
        r = score(f, a, (v[i] - ref_v[i]) * n[1][i]) / n[1][i]
        x = c - r
        truth = smoothed(0.3 * x, 0) if name == "sigmoid_norm" else (x - 1 / mp.mpf(0.6)) ** 2
        assert abs(result.losses[i].item() - truth) <= 1e-12 * (1 + abs(truth))


def test_sft():
    sums, lengths = -torch.rand(4).double() * 9, torch.tensor([3.0, 0.0, 2.5, 7.0]).double()
    sums[1] = 0.0
    sums.requires_grad_()
    result = sft_loss(sums, lengths)
    exact = float(sft(*numbers([sums, lengths]))[0])
    assert result.losses.tolist() == pytest.approx([exact] * 4, rel=1e-14)
    assert result.chosen_rewards.tolist() == [0.0] * 4
    assert torch.autograd.gradcheck(lambda x: sft_loss(x, lengths).losses, sums)


def test_nll_with_lengths_is_of_the_batch():
    """With lengths, the NLL of cpo and orpo is the mean over the batch's chosen tokens."""
    lengths = torch.tensor([3.0, 8.0, 1.0, 0.0]).double()
    sums, other = -torch.rand(4).double() * 9 * (lengths > 0), -torch.rand(4).double()
    nll = sft_loss(sums, lengths).losses
    by_answer = cpo_loss(sums, other, cpo_alpha=0.5)
    by_token = cpo_loss(sums, other, cpo_alpha=0.5, chosen_lengths=lengths)
    torch.testing.assert_close(by_token.losses, by_answer.losses + 0.5 * (sums + nll))
    means = sums / lengths.clamp(min=1)
    by_answer, by_token = orpo_loss(means, other), orpo_loss(means, other, chosen_lengths=lengths)
    torch.testing.assert_close(by_token.losses, by_answer.losses + means + nll)


@pytest.mark.parametrize("name", OF_PAIRS)
def test_rewards_are_detached_log_ratios(name):
    logps = draw_logps(name)
    result, _ = run_loss(name, logps, beta=0.3)
    pairs = zip(logps[:2], logps[2:] or (0.0, 0.0), strict=True)
    for reward, (policy, reference) in zip(result[1:], pairs, strict=True):
        assert not reward.requires_grad
        torch.testing.assert_close(reward, 0.3 * (policy - reference))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "aot", "aot_unpaired"])
def test_policy_equal_to_reference_is_ln_2(name, dtype):
    chosen, rejected, *_ = draw_logps(name, dtype=dtype)
    result = LOSSES[name].function(chosen, rejected, chosen, rejected)
    assert result.losses.tolist() == [torch.tensor(math.log(2), dtype=dtype).item()] * 5


def test_kto_is_unpaired():
    """As many desirable as undesirable answers are not needed, nor any of one kind."""
    chosen, rejected = -torch.rand(3), -torch.rand(1)
    result = kto_loss(chosen, rejected, chosen * 2, rejected * 2, kl=torch.tensor([0.5]))
    assert [len(x) for x in result] == [4, 3, 1]
    alone = kto_loss(chosen, rejected[:0], chosen * 2, rejected[:0], kl=0.5)
    assert torch.equal(alone.losses, result.losses[:3])
    kl = torch.tensor(0.5, requires_grad=True)
    assert not kto_loss(chosen, rejected, chosen, rejected, kl=kl).losses.requires_grad


OPTIONS_OF_NUMBERS = dict(
    beta=0.3,
    label_smoothing=0.1,
    f_alpha_divergence_coef=0.7,
    discopop_tau=0.3,
    delta=0.2,
    simpo_gamma=0.6,
    cpo_alpha=0.7,
    alpha=0.2,
    kl=0.3,
    desirable_weight=0.9,
    undesirable_weight=1.1,
)


@pytest.mark.parametrize("name", OF_PAIRS)
@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, np.int64])
def test_numbers_of_numpy(kind, name):
    """Those of a few bits are taken for what they are and not computed with in those bits."""
    loss, logps = LOSSES[name], draw_logps(name)
    numbers = {
        option: kind(1 if kind is np.int64 and value > 0.5 else value)
        for option, value in OPTIONS_OF_NUMBERS.items()
        if option in loss.options and (kind is not np.int64 or value > 0.5)
    }
    constants: dict[str, object] = {} if "kl" in numbers or name != "kto" else dict(kl=0.5)
    if name in ("sigmoid", "hinge", "exo_pair", "robust", "discopop"):
        constants["f_divergence_type"] = "alpha_divergence"
    if kind is np.int64:
        numbers["beta"] = kind(2)
    result = loss.function(*logps, **numbers, **constants)
    plain = {option: number.item() for option, number in numbers.items()}
    expected = loss.function(*logps, **plain, **constants)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_imports_torch_alone():
    """The losses stand on their own: nothing of the package but themselves."""
    import ast
    from pathlib import Path

    import dpo_triton.losses

    for path in Path(dpo_triton.losses.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, path
