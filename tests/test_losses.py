"""Losses against their formulas in 60 digits: values, gradients, extremes; and their errors."""

import math

import mpmath as mp
import numpy as np
import pytest
import torch
from batches import max_error
from loss_formulas import CASES, F_OPTIONS, score, sft, smoothed, trl_f

from dpo_triton.losses import (
    LOSSES,
    SequenceLogps,
    cpo_loss,
    exo_pair_loss,
    ipo_loss,
    kto_loss,
    log1mexp,
    orpo_loss,
    sft_loss,
    sigmoid_loss,
    sigmoid_norm_loss,
)

MEANS = {"sigmoid_norm", "ipo", "simpo", "orpo"}
REFERENCE_FREE = {"sft", "simpo", "cpo", "orpo"}
OF_PAIRS = [name for name in LOSSES if name != "sft"]


def draw(name: str, batch: int = 5, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Chosen and rejected, of the policy and (where it has one) of the reference: below 0."""
    count = 4 if LOSSES[name].needs_reference else 2
    scale = 0.5 if LOSSES[name].takes == "mean" else 4.0
    return [-torch.rand(batch, dtype=dtype) * scale for _ in range(count)]


def run(name: str, logps: list[torch.Tensor], **options):
    """The result, and the gradient of the sum of its losses for the policy's two tensors."""
    policy = [x.detach().requires_grad_() for x in logps[:2]]
    if name == "kto":
        options = dict(kl=0.25) | options
    result = LOSSES[name].function(*policy, *logps[2:], **options)
    return result, torch.autograd.grad(result.losses.sum(), policy)


def numbers(tensors):
    return [[mp.mpf(x) for x in tensor.tolist()] for tensor in tensors]


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
    logps = draw(name)
    result, gradients = run(name, logps, **ours)
    exact = formula(*numbers(logps), **options)
    for value, truth in zip(result.losses.tolist(), exact, strict=True):
        assert abs(value - truth) <= 1e-12 * (1 + abs(truth))
    for gradient, truth in zip(gradients, exact_gradient(formula, logps, options), strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", OF_PAIRS)
@pytest.mark.parametrize("batch", [1, 7])
def test_gradcheck(name, batch):
    logps = draw(name, batch)
    policy = [x.requires_grad_() for x in logps[:2]]
    options = dict(kl=0.25) if name == "kto" else {}
    assert torch.autograd.gradcheck(
        lambda *policy: LOSSES[name].function(*policy, *logps[2:], **options).losses, policy
    )


@pytest.mark.parametrize("options", F_OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["sigmoid_norm", "ipo"])
def test_f_divergence_of_means_is_of_the_sum(name, options):
    """The mean-taking losses divide the score of the whole answer by its length."""
    logps = draw(name)
    lengths = [torch.randint(1, 9, (5,)).double() for _ in range(2)]
    result, _ = run(
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
    logps = draw(name)
    result, _ = run(name, logps, beta=0.3)
    pairs = zip(logps[:2], logps[2:] or (0.0, 0.0), strict=True)
    for reward, (policy, reference) in zip(result[1:], pairs, strict=True):
        assert not reward.requires_grad
        torch.testing.assert_close(reward, 0.3 * (policy - reference))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "aot", "aot_unpaired"])
def test_policy_equal_to_reference_is_ln_2(name, dtype):
    chosen, rejected, *_ = draw(name, dtype=dtype)
    result = LOSSES[name].function(chosen, rejected, chosen, rejected)
    assert result.losses.tolist() == [torch.tensor(math.log(2), dtype=dtype).item()] * 5


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
        result, _ = run(name, logps, **ours)
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
        logps = draw(name, batch=0, dtype=torch.float32)
        result, gradients = run(name, logps)
        assert all(len(x) == 0 for x in (*result, *gradients))


def test_kto_is_unpaired():
    """As many desirable as undesirable answers are not needed, nor any of one kind."""
    chosen, rejected = -torch.rand(3), -torch.rand(1)
    result = kto_loss(chosen, rejected, chosen * 2, rejected * 2, kl=torch.tensor([0.5]))
    assert [len(x) for x in result] == [4, 3, 1]
    alone = kto_loss(chosen, rejected[:0], chosen * 2, rejected[:0], kl=0.5)
    assert torch.equal(alone.losses, result.losses[:3])
    kl = torch.tensor(0.5, requires_grad=True)
    assert not kto_loss(chosen, rejected, chosen, rejected, kl=kl).losses.requires_grad


def test_reference_in_another_precision():
    """Log-probabilities stored in float64 or in 16 bits beside a float32 policy."""
    chosen, rejected = -torch.rand(3), -torch.rand(3)
    for dtype, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        result = sigmoid_loss(chosen, rejected, chosen.to(dtype), rejected.to(dtype))
        assert result.losses.dtype == expected
        assert max_error(result.losses, torch.full((3,), math.log(2)).double()) < 1e-2


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
    loss, logps = LOSSES[name], draw(name)
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


LOGPS = dict(
    chosen_logps=torch.zeros(3),
    rejected_logps=torch.zeros(3),
    ref_chosen_logps=torch.zeros(3),
    ref_rejected_logps=torch.zeros(3),
)
ERRORS = {
    "list": (dict(chosen_logps=[0.0]), TypeError, "chosen_logps must be a torch.Tensor, got list"),
    "int": (
        dict(rejected_logps=torch.zeros(3).long()),
        TypeError,
        "rejected_logps must be floating, got torch.int64.*fused_seq_logprob",
    ),
    "tokens": (
        dict(chosen_logps=torch.zeros(3, 4)),
        ValueError,
        r"chosen_logps must be \(B,\).*got \(3, 4\); sum over the tokens",
    ),
    "half": (
        dict(rejected_logps=torch.zeros(2), ref_rejected_logps=torch.zeros(2)),
        ValueError,
        r"rejected_logps must have the shape of chosen_logps, \(3,\), got \(2,\)",
    ),
    "ref of another": (
        dict(ref_chosen_logps=torch.zeros(2)),
        ValueError,
        r"ref_chosen_logps must have the shape of chosen_logps, \(3,\), got \(2,\)",
    ),
    "device": (
        dict(ref_chosen_logps=torch.zeros(3, device="meta")),
        ValueError,
        r"ref_chosen_logps must be on the device of chosen_logps, cpu.*\.to\(chosen_logps.device\)",
    ),
    "reference with gradient": (
        dict(ref_rejected_logps=torch.zeros(3, requires_grad=True)),
        ValueError,
        r"ref_rejected_logps must not require a gradient.*no_grad.*detach\(\)",
    ),
    "beta": (dict(beta=0.0), ValueError, "beta must be positive, got 0.0"),
    "beta nan": (dict(beta=math.nan), ValueError, "beta must be finite, got nan"),
    "beta tensor": (dict(beta=torch.ones(())), TypeError, r"beta must be a number.*item\(\)"),
    "beta array": (dict(beta=np.ones(1)), TypeError, r"beta must be a number, got ndarray.*item"),
    "beta flag": (dict(beta=np.True_), TypeError, "beta must be a number, got bool"),
    "beta huge": (dict(beta=10**400), ValueError, "beta must be finite, got 1000"),
    "smoothing": (
        dict(label_smoothing=0.5),
        ValueError,
        r"label_smoothing must be in \[0, 0.5\), got 0.5.*exchange",
    ),
    "divergence": (
        dict(f_divergence_type="kl"),
        ValueError,
        "f_divergence_type must be out of reverse_kl, .*got 'kl'",
    ),
    "alpha": (
        dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=math.inf),
        ValueError,
        "f_alpha_divergence_coef must be finite",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_message(case):
    arguments, error, message = ERRORS[case]
    with pytest.raises(error, match=f"(?s){message}"):
        sigmoid_loss(**(LOGPS | arguments))


def test_messages_of_single_losses():
    logps = tuple(LOGPS.values())
    with pytest.raises(ValueError, match=r"above 0 for exo_pair.*1e-3"):
        exo_pair_loss(*logps, label_smoothing=0.0)
    with pytest.raises(ValueError, match=r"discopop_tau must be in \(0, 1\]"):
        LOSSES["discopop"].function(*logps, discopop_tau=2.0)
    with pytest.raises(ValueError, match=r"kl is needed.*ref_kl_logps"):
        kto_loss(*logps)
    with pytest.raises(ValueError, match=r"kl must be .* one element, got \(3,\).*mean"):
        kto_loss(*logps, kl=logps[0])
    with pytest.raises(ValueError, match=r"chosen_lengths is needed.*stats="):
        sigmoid_norm_loss(*logps, f_divergence_type="forward_kl")
    with pytest.raises(ValueError, match=r"out of reverse_kl"):
        ipo_loss(*logps, f_divergence_type="kl")
    with pytest.raises(ValueError, match=r"chosen_lengths must be .* \(3,\), got \(2,\)"):
        sft_loss(logps[0], torch.ones(2))


def test_imports_torch_alone():
    """The losses stand on their own: nothing of the package but themselves."""
    import ast
    from pathlib import Path

    import dpo_triton.losses

    for path in Path(dpo_triton.losses.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, path
