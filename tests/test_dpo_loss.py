"""Logits, or hidden states, to a loss: against float64, at the edges, and the errors."""

import math

import numpy as np
import pytest
import torch
from batches import assert_close, make_batch, max_error

from dpo_triton import fused_dpo_loss, fused_linear_dpo_loss, fused_seq_logprob, reference
from dpo_triton.losses import LOSSES, ld_dpo_mask, mixture_loss, split_pairs, wpo_weights
from dpo_triton.losses import SequenceLogps as Logps

LN_2 = torch.tensor(math.log(2)).item()
OPTIONS = {"kto": dict(kl=0.3)}


def draw(pairs: int = 3, seq_len: int = 7, vocab_size: int = 60, dtype=torch.float32, device="cpu"):
    """A policy's batch, with holes and weights in its mask, and the logits of a reference."""
    batch = make_batch((2 * pairs, seq_len, vocab_size), dtype, device)
    batch.mask[:, -1] += 0.5  # no empty answer
    noise = torch.randn(batch.logits.shape, device=device)
    return batch, (batch.logits.float() + 0.3 * noise).to(dtype)


def reference_of(name: str, ref_logits: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(ref_logits=ref_logits) if LOSSES[name].needs_reference else {}


def exact_loss(name, logits, ref_logits, labels, mask, layout="concat", options=None, **where):
    """The loss in float64, from the specification's log-probabilities and the loss's function."""
    loss = LOSSES[name]
    values = []
    for x in (logits, ref_logits) if loss.needs_reference else (logits,):
        reduction = "sum" if loss.takes == "tokens" else loss.takes
        logps, stats = reference.seq_logprob(
            x.cpu().double() if x is ref_logits else x,
            labels.cpu(),
            mask.cpu(),
            reduction=reduction,
            stats=["lengths"],
            **where,
        )
        values += split_pairs(logps, layout)
    chosen_lengths, _ = split_pairs(stats["lengths"], layout)
    if loss.takes == "tokens":
        return loss.function(values[0], chosen_lengths).losses
    if "cpo_alpha" in loss.options or name == "orpo":
        options = dict(chosen_lengths=chosen_lengths) | (options or {})
    return loss.function(*values, **(options or {})).losses


@pytest.mark.parametrize("layout", ["concat", "interleaved"])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_match_float64(name, layout, device):
    batch, ref_logits = draw(device=device)
    options = OPTIONS.get(name, {})
    logits = batch.logits.requires_grad_()
    ours = fused_dpo_loss(
        *(logits, batch.labels, batch.mask),
        **reference_of(name, ref_logits),
        loss_type=name,
        layout=layout,
        shift=True,
        **options,
    )
    (grad,) = torch.autograd.grad(ours.loss, logits)
    exact_logits = batch.logits.detach().cpu().double().requires_grad_()
    losses = exact_loss(
        *(name, exact_logits, ref_logits, *batch[1:], layout), options=options, shift=True
    )
    (exact_grad,) = torch.autograd.grad(losses.mean(), exact_logits)
    scale = 1 + float(exact_grad.abs().max())
    assert ours.loss.dtype == torch.float32
    assert_close(ours.loss, losses.mean().detach(), 1e-5 * (1 + float(losses.detach().abs().max())))
    assert_close(grad, exact_grad, 1e-5 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pairs", [1, 3, 13])  # in float32 the mean of 13 times ln 2 is not ln 2
def test_policy_equal_to_reference_is_ln_2(pairs, dtype, backend, device):
    batch, _ = draw(pairs, seq_len=2, dtype=dtype, device=device)
    for name in ("sigmoid", "sigmoid_norm"):
        options = dict(loss_type=name, shift=True, backend=backend)
        ours = fused_dpo_loss(*batch, ref_logits=batch.logits, **options)
        assert ours.loss.item() == LN_2
        assert ours.metrics.accuracies.tolist() == [0.0] * pairs
        takes = LOSSES[name].takes
        ref_logps = fused_seq_logprob(*batch, reduction=takes, shift=True, backend=backend)
        ours = fused_dpo_loss(*batch, ref_logps=ref_logps, ref_reduction=takes, **options)
        assert ours.loss.item() == LN_2


@pytest.mark.parametrize("trains_head", [True, False])
def test_linear_policy_equal_to_reference_is_ln_2(trains_head, device):
    """The reference's values are made without a graph, the policy's with one: the same bits."""
    batch, _ = draw(device=device)
    hidden = torch.randn(6, 7, 24, device=device, requires_grad=True)
    weight = torch.randn(60, 24, device=device, requires_grad=trains_head)
    head = weight.detach()
    ours = fused_linear_dpo_loss(
        *(hidden, weight, *batch[1:]), ref_hidden=hidden.detach(), ref_weight=head, shift=True
    )
    assert ours.loss.item() == LN_2


@pytest.mark.parametrize(
    "loss_type", ["sigmoid", "ipo", ["sigmoid_norm", "sft"], ["sigmoid", "ipo"]]
)
def test_reference_in_either_reduction(loss_type):
    """Sums and means of the reference give the loss of its logits: neither is taken blindly."""
    batch, ref_logits = draw()
    options = dict(loss_type=loss_type, shift=True)
    expected = fused_dpo_loss(*batch, ref_logits=ref_logits, **options)
    for reduction in ("sum", "mean"):
        ref_logps = fused_seq_logprob(ref_logits, *batch[1:], reduction=reduction, shift=True)
        ours = fused_dpo_loss(*batch, ref_logps=ref_logps, ref_reduction=reduction, **options)
        torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-5, atol=1e-6)


def test_layouts_are_a_permutation(backend, device):
    batch, ref_logits = draw(device=device)
    order = torch.arange(6, device=device).view(2, 3).T.flatten()  # chosen, rejected, chosen, ...
    interleaved = [x[order] for x in (*batch, ref_logits)]
    options = dict(shift=True, backend=backend, ld_alpha=0.5, stats=["entropy"])
    concat = fused_dpo_loss(*batch, ref_logits=ref_logits, **options)
    ours = fused_dpo_loss(
        *interleaved[:3], ref_logits=interleaved[3], layout="interleaved", **options
    )
    assert torch.equal(ours.loss, concat.loss)
    for a, b in zip(ours.metrics[:-1], concat.metrics[:-1], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ours.metrics.stats["chosen_entropy"], concat.metrics.stats["chosen_entropy"])


@pytest.mark.parametrize("use_weighting", [False, True])
def test_packed_is_padded(use_weighting, backend, device):
    """Sequences of different lengths without padding: the same pairs, weights and means."""
    batch, ref_logits = draw(device=device)
    lengths = torch.tensor([7, 3, 5, 4, 7, 2], device=device)
    is_token = torch.arange(7, device=device) < lengths[:, None]
    mask = torch.where(is_token, batch.mask, 0.0)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    options = dict(
        loss_type=["sigmoid", "ipo", "sft"],
        ld_alpha=0.25,
        use_weighting=use_weighting,
        stats=("entropy", "top1"),
        shift=True,
        backend=backend,
    )
    padded = fused_dpo_loss(batch.logits, batch.labels, mask, ref_logits=ref_logits, **options)
    packed = fused_dpo_loss(
        *(x[is_token] for x in (batch.logits, batch.labels, mask)),
        ref_logits=ref_logits[is_token],
        cu_seqlens=cu_seqlens,
        **options,
    )
    torch.testing.assert_close(packed.loss, padded.loss)
    for name, values in packed.metrics._asdict().items():
        torch.testing.assert_close(values, getattr(padded.metrics, name))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("empty", [[1], [4], [1, 4], list(range(6))], ids=str)
def test_empty_answers(name, empty):
    """Chosen, rejected, both, or the whole batch: finite, and no gradient for their logits."""
    batch, ref_logits = draw()
    batch.mask[empty] = 0.0
    batch.logits[empty] = torch.nan  # never read
    ref_logits[empty] = torch.inf
    logits = batch.logits.requires_grad_()
    ours = fused_dpo_loss(
        *(logits, *batch[1:]),
        **reference_of(name, ref_logits),
        loss_type=name,
        shift=True,
        stats=("entropy",),
        use_weighting=not LOSSES[name].sorts,
        **OPTIONS.get(name, {}),
    )
    ours.loss.backward()
    assert torch.isfinite(ours.loss)
    assert all(torch.isfinite(x).all() for x in ours.metrics[:-1])
    assert all(torch.isfinite(x).all() for x in ours.metrics.stats.values())
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[empty] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_float16_with_a_scaled_gradient(name):
    """A gradient scaler's 65536 reaches float16 logits as float64 has it, or as an honest inf."""
    batch, ref_logits = draw(dtype=torch.float16)
    options = OPTIONS.get(name, {}) | dict(beta=0.01 if name != "sft" else 0.1)
    logits = batch.logits.requires_grad_()
    ours = fused_dpo_loss(
        *(logits, *batch[1:]), **reference_of(name, ref_logits), loss_type=name, **options
    )
    scale = 65536.0
    (grad,) = torch.autograd.grad(ours.loss * scale, logits)
    exact_logits = batch.logits.detach().double().requires_grad_()
    if name == "sft":
        options = {}
    losses = exact_loss(name, exact_logits, ref_logits, *batch[1:], options=options)
    (exact,) = torch.autograd.grad(losses.mean() * scale, exact_logits)
    assert not grad.isnan().any()
    fits = exact.abs() < torch.finfo(torch.float16).max / 2
    assert fits.any()
    error = (grad.double() - exact)[fits].abs().max()
    assert error <= 2e-3 * exact[fits].abs().max() + 1e-3


def test_metrics():
    batch, ref_logits = draw()
    result = fused_dpo_loss(*batch, ref_logits=ref_logits, beta=0.3, stats=("entropy",))
    metrics = result.metrics
    logps, stats = fused_seq_logprob(*batch, reduction="sum", stats=("lengths", "entropy"))
    ref_logps = fused_seq_logprob(ref_logits, *batch[1:], reduction="sum")
    assert torch.equal(metrics.chosen_logps, logps[:3])
    assert torch.equal(metrics.rejected_logps, logps[3:])
    assert torch.equal(metrics.chosen_lengths, stats["lengths"][:3])
    torch.testing.assert_close(metrics.chosen_rewards, 0.3 * (logps - ref_logps)[:3])
    torch.testing.assert_close(metrics.rejected_rewards, 0.3 * (logps - ref_logps)[3:])
    assert torch.equal(metrics.margins, metrics.chosen_rewards - metrics.rejected_rewards)
    assert torch.equal(metrics.accuracies, (metrics.margins > 0).float())
    torch.testing.assert_close(result.loss, metrics.losses.mean())
    entropy = (stats["entropy"] * batch.mask).sum(1) / batch.mask.sum(1)
    torch.testing.assert_close(metrics.stats["chosen_entropy"], entropy[:3])
    torch.testing.assert_close(metrics.stats["rejected_entropy"], entropy[3:])
    assert not any(x.requires_grad for x in metrics[:-1])


def test_rewards_are_of_the_first_loss_that_has_any():
    batch, ref_logits = draw()
    alone = fused_dpo_loss(*batch, ref_logits=ref_logits, beta=0.3)
    for loss_type in (["sft", "sigmoid"], ["sigmoid", "ipo"], ["sigmoid", "sft"]):
        ours = fused_dpo_loss(*batch, ref_logits=ref_logits, beta=0.3, loss_type=loss_type)
        assert torch.equal(ours.metrics.chosen_rewards, alone.metrics.chosen_rewards)
        assert torch.equal(ours.metrics.rejected_rewards, alone.metrics.rejected_rewards)


def test_reference_has_no_graph():
    batch, ref_logits = draw()
    ref_logits.requires_grad_()
    fused_dpo_loss(batch.logits.requires_grad_(), *batch[1:], ref_logits=ref_logits).loss.backward()
    assert ref_logits.grad is None
    assert batch.logits.grad is not None


def test_inplace_backward():
    batch, ref_logits = draw()
    grads = []
    for inplace in (False, True):
        logits = batch.logits.clone().requires_grad_()
        computed = logits * 1
        result = fused_dpo_loss(
            computed, *batch[1:], ref_logits=ref_logits, inplace_backward=inplace
        )
        grads.append(torch.autograd.grad(result.loss, logits)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (4, 1)])
def test_no_tokens(shape):
    """No pairs, no positions, or (with the shift) nothing to score: 0 or ln 2, with a gradient."""
    logits = torch.randn(*shape, 9, requires_grad=True)
    labels = torch.zeros(shape, dtype=torch.int64)
    options = dict(shift=True, stats=("entropy",), use_weighting=True, ld_alpha=0.5)
    result = fused_dpo_loss(logits, labels, ref_logits=logits.detach(), **options)
    assert result.loss.item() == (0.0 if shape[0] == 0 else LN_2)
    assert torch.equal(torch.autograd.grad(result.loss, logits)[0], torch.zeros_like(logits))


def naive_ld_weights(mask, alpha, layout, shift):
    """Token by token."""
    weights = mask.tolist()
    rows = len(weights)
    pairs = (
        [(i, i + rows // 2) for i in range(rows // 2)]
        if layout == "concat"
        else [(i, i + 1) for i in range(0, rows, 2)]
    )
    for pair in pairs:
        counted = [[t for t, w in enumerate(weights[b]) if w and (t or not shift)] for b in pair]
        shared = min(map(len, counted))
        for b, tokens in zip(pair, counted, strict=True):
            for t in tokens[shared:]:
                weights[b][t] *= alpha
    return torch.tensor(weights)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("layout", ["concat", "interleaved"])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_ld_dpo_mask(alpha, layout, shift):
    """With holes, empty answers, and first tokens that the shift leaves unscored."""
    mask = torch.rand(8, 12) * (torch.rand(8, 12) > torch.rand(8, 1))
    mask[3] = 0
    expected = naive_ld_weights(mask, alpha, layout, shift)
    torch.testing.assert_close(ld_dpo_mask(mask, alpha, layout=layout, shift=shift), expected)
    lengths = torch.randint(0, 12, (8,))  # packed: sequences without a token, too
    kept = torch.arange(12) < lengths[:, None]
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    expected = naive_ld_weights(torch.where(kept, mask, 0.0), alpha, layout, shift)
    ours = ld_dpo_mask(mask[kept], alpha, layout=layout, shift=shift, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(ours, expected[kept])
    as_bool = ld_dpo_mask(mask != 0, alpha, layout=layout, shift=shift)
    assert as_bool.dtype == torch.float32


def test_ld_dpo_mask_whatever_the_default_dtype():
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        weights = [ld_dpo_mask(x, 0.3) for x in (mask, mask.double(), mask != 0)]
        assert torch.equal(ld_dpo_mask(mask, np.float64(0.3)), weights[0])
    finally:
        torch.set_default_dtype(before)
    assert [x.dtype for x in weights] == [torch.float32, torch.float64, torch.float32]
    assert [x[0, 1].item() for x in weights] == [mask.new_tensor(0.3).item(), 0.3, weights[0][0, 1]]


def test_ld_dpo_in_one_call():
    batch, ref_logits = draw()
    batch.labels[0, 4] = -100  # not counted, although its weight is not 0
    weights = ld_dpo_mask(torch.where(batch.labels == -100, 0.0, batch.mask), 0.25, shift=True)
    expected = fused_dpo_loss(*batch[:2], weights, ref_logits=ref_logits, shift=True)
    ours = fused_dpo_loss(*batch, ref_logits=ref_logits, shift=True, ld_alpha=0.25)
    assert torch.equal(ours.loss, expected.loss)


def test_wpo_weights():
    """Each token against sum_v p_v ** 2, averaged, of both answers; and no gradient."""
    batch, ref_logits = draw()
    logits = batch.logits.double().requires_grad_()
    p = logits.detach().softmax(-1)
    p_label = p.gather(-1, batch.labels[..., None])[..., 0]
    aligned = (p_label / (p * p).sum(-1)).log()
    scored = batch.mask.clone().double()
    scored[:, 0] = 0
    # labels[:, t] is scored by logits[:, t - 1]
    shifted = torch.zeros_like(aligned)
    p_next = p[:, :-1].gather(-1, batch.labels[:, 1:, None])[..., 0]
    shifted[:, 1:] = (p_next / (p[:, :-1] ** 2).sum(-1)).log()
    for shift, values, weights in ((False, aligned, batch.mask.double()), (True, shifted, scored)):
        of_answers = torch.exp((values * weights).sum(1) / weights.sum(1))
        expected = of_answers[:3] * of_answers[3:]
        _, stats = fused_seq_logprob(
            *(logits, *batch[1:]), stats=("token_logps", "log_sum_sq_probs"), shift=shift
        )
        ours = wpo_weights(*stats.values(), batch.mask, shift=shift)
        torch.testing.assert_close(ours, expected)
        options = dict(ref_logits=ref_logits.double(), shift=shift)
        plain = fused_dpo_loss(logits, *batch[1:], **options)
        weighed = fused_dpo_loss(logits, *batch[1:], use_weighting=True, **options)
        torch.testing.assert_close(weighed.metrics.losses, plain.metrics.losses * expected)
        grads = [
            torch.autograd.grad(loss, logits)[0]
            for loss in (
                weighed.loss,
                (fused_losses(logits, batch, **options) * expected).mean(),
            )
        ]
        torch.testing.assert_close(*grads)


def fused_losses(logits, batch, ref_logits, shift):
    policy = fused_seq_logprob(logits, *batch[1:], reduction="sum", shift=shift)
    ref = fused_seq_logprob(ref_logits, *batch[1:], reduction="sum", shift=shift)
    return LOSSES["sigmoid"].function(policy[:3], policy[3:], ref[:3], ref[3:]).losses


def test_mixture_gives_each_loss_what_it_takes():
    """From sums or from means alike, with RPO's NLL; weights of pairs last."""
    sums, lengths = -torch.rand(4, 5).double() * 20, torch.randint(1, 9, (2, 5)).double()
    counts = lengths.repeat(2, 1)
    means = sums / counts
    of_sums = [Logps(v, "sum", n) for v, n in zip(sums, counts, strict=True)]
    of_means = [Logps(v, "mean", n) for v, n in zip(means, counts, strict=True)]
    pair_weights = torch.rand(5).double().requires_grad_()
    options = dict(beta=0.3, rpo_alpha=0.2, pair_weights=pair_weights, label_smoothing=0.125)
    weights = {"sigmoid": 0.5, "ipo": 2.0, "simpo": 1.0, "hinge": -0.25}
    expected = (
        0.5 * LOSSES["sigmoid"].function(*sums, beta=0.3, label_smoothing=0.125).losses
        + 2.0 * LOSSES["ipo"].function(*means, beta=0.3).losses
        + LOSSES["simpo"].function(*means[:2], beta=0.3, label_smoothing=0.125).losses
        - 0.25 * LOSSES["hinge"].function(*sums, beta=0.3).losses
        + 0.2 * LOSSES["sft"].function(sums[0], lengths[0]).losses
    ) * pair_weights
    for answers in (of_sums, of_means):
        ours = mixture_loss(weights, *answers, **options)
        torch.testing.assert_close(ours.losses, expected.detach())
        assert not ours.losses.requires_grad  # through the weights of pairs
        torch.testing.assert_close(ours.chosen_rewards, 0.3 * (sums[0] - sums[2]))


def test_kto_of_pairs_is_the_mean_of_both_answers():
    batch, ref_logits = draw()
    logps = [fused_seq_logprob(x, *batch[1:], reduction="sum") for x in (batch.logits, ref_logits)]
    alone = LOSSES["kto"].function(
        *split_pairs(logps[0]), *split_pairs(logps[1]), kl=0.3, undesirable_weight=2.0
    )
    ours = fused_dpo_loss(
        *batch, ref_logits=ref_logits, loss_type="kto", kl=0.3, undesirable_weight=2.0
    )
    torch.testing.assert_close(ours.loss, alone.losses.mean())
    torch.testing.assert_close(ours.metrics.losses, (alone.losses[:3] + alone.losses[3:]) / 2)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "orpo", ["sigmoid", "sft"]], ids=str)
@pytest.mark.parametrize("is_packed", [False, True])
def test_linear_is_logits(loss_type, is_packed, device):
    batch, _ = draw(device=device)
    hidden, ref_hidden = torch.randn(2, 6, 7, 24, device=device) / 5
    weight, ref_weight = torch.randn(2, 60, 24, device=device)
    bias, ref_bias = torch.randn(2, 60, device=device)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    ref_leaves = [x.requires_grad_() for x in (ref_hidden, ref_weight, ref_bias)]
    options = dict(loss_type=loss_type, shift=True, stats=("entropy",))
    tokens, inputs, ref_inputs = batch[1:], hidden, ref_hidden
    if is_packed:
        options["cu_seqlens"] = torch.tensor([0, 7, 14, 21, 28, 35, 42], device=device)
        tokens = [x.flatten() for x in tokens]
        inputs, ref_inputs = hidden.flatten(0, 1), ref_hidden.flatten(0, 1)
    of_logits, of_hidden = {}, {}
    if loss_type != "orpo":
        of_logits = dict(ref_logits=ref_inputs @ ref_weight.T + ref_bias)
        of_hidden = dict(ref_hidden=ref_inputs, ref_weight=ref_weight, ref_bias=ref_bias)
    expected = fused_dpo_loss(inputs @ weight.T + bias, *tokens, **of_logits, **options)
    expected_grads = torch.autograd.grad(expected.loss, leaves)
    ours = fused_linear_dpo_loss(inputs, weight, *tokens, bias=bias, **of_hidden, **options)
    ours.loss.backward()
    torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-5, atol=1e-5)
    for name, values in ours.metrics._asdict().items():
        torch.testing.assert_close(values, getattr(expected.metrics, name), rtol=1e-4, atol=1e-4)
    for leaf, grad in zip(leaves, expected_grads, strict=True):
        torch.testing.assert_close(leaf.grad, grad, rtol=1e-4, atol=1e-5)
    assert all(leaf.grad is None for leaf in ref_leaves)


BATCH = dict(policy_logits=torch.randn(4, 3, 5), labels=torch.zeros(4, 3, dtype=torch.int64))
REF = dict(ref_logits=torch.randn(4, 3, 5))
ERRORS = {
    "loss": (REF | dict(loss_type="dpo"), ValueError, "out of sigmoid, .*got 'dpo'"),
    "no loss": (REF | dict(loss_type=[]), ValueError, "at least one of sigmoid"),
    "twice": (REF | dict(loss_type=["sft", "sft"]), ValueError, "twice.*loss_weights"),
    "weights": (
        REF | dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0]),
        ValueError,
        "one weight for each of .*got 1",
    ),
    "no reference": (
        {},
        ValueError,
        "'sigmoid' needs a reference; pass ref_logps with ref_reduction, or ref_logits;.*simpo",
    ),
    "needless reference": (REF | dict(loss_type="simpo"), ValueError, "simpo uses no reference"),
    "two references": (
        REF | dict(ref_logps=torch.zeros(4), ref_reduction="sum"),
        ValueError,
        "ref_logps and ref_logits are both given",
    ),
    "reduction not said": (
        dict(ref_logps=torch.zeros(4)),
        ValueError,
        'ref_reduction must be "sum" or "mean" with ref_logps, got None.*returns means',
    ),
    "reduction of nothing": (
        REF | dict(ref_reduction="sum"),
        ValueError,
        "given without ref_logps",
    ),
    "ref_logps shape": (
        dict(ref_logps=torch.zeros(2), ref_reduction="sum"),
        ValueError,
        r"ref_logps must be a torch.Tensor of shape \(4,\).*got \(2,\)",
    ),
    "ref_logps gradient": (
        dict(ref_logps=torch.zeros(4, requires_grad=True), ref_reduction="sum"),
        ValueError,
        r"ref_logps must be on cpu without a gradient.*detach\(\)",
    ),
    "odd": (
        {name: x[:3] for name, x in (BATCH | REF).items()},
        ValueError,
        "even number of sequences, got 3",
    ),
    "layout": (REF | dict(layout="pairs"), ValueError, '"concat" or "interleaved", got \'pairs\''),
    "unknown option": (REF | dict(gamma=1.0), TypeError, "'gamma' is no option of any loss"),
    "option of another": (
        REF | dict(simpo_gamma=1.0),
        ValueError,
        r"simpo_gamma is an option of simpo, none of which is used here \(sigmoid\)",
    ),
    "divergence": (
        REF | dict(loss_type=["sigmoid", "apo_zero"], f_divergence_type="forward_kl"),
        ValueError,
        "f_divergence_type='forward_kl' fits.*not apo_zero",
    ),
    "weighted aot": (
        REF | dict(loss_type="aot", use_weighting=True),
        ValueError,
        "weights of pairs do not fit aot, which sorts",
    ),
    "ld_alpha": (REF | dict(ld_alpha=1.5), ValueError, r"ld_alpha must be in \[0, 1\], got 1.5"),
    "beta": (REF | dict(beta=-0.1), ValueError, "beta must be positive, got -0.1"),
    "rpo_alpha": (REF | dict(rpo_alpha=math.nan), ValueError, "rpo_alpha must be finite"),
    "stats": (REF | dict(stats=["lengths"]), ValueError, "stats must be out of entropy.*'lengths'"),
    "stats string": (
        REF | dict(stats="entropy"),
        TypeError,
        r"sequence of names.*\(\"entropy\",\)",
    ),
    "mask": (
        REF | dict(mask=torch.ones(4, 2)),
        ValueError,
        r"mask must be .* \(4, 3\), or None, got \(4, 2\)",
    ),
    "labels": (REF | dict(labels=[[0]]), TypeError, "labels must be a torch.Tensor, got list"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_message(case):
    arguments, error, message = ERRORS[case]
    with pytest.raises(error, match=f"(?s){message}"):
        fused_dpo_loss(**(BATCH | arguments))


def test_messages_of_linear():
    hidden, weight, labels = torch.randn(4, 3, 2), torch.randn(5, 2), BATCH["labels"]
    with pytest.raises(ValueError, match=r"needs a reference.*ref_hidden and ref_weight"):
        fused_linear_dpo_loss(hidden, weight, labels)
    with pytest.raises(ValueError, match=r"ref_hidden is given without ref_weight.*weight.detach"):
        fused_linear_dpo_loss(hidden, weight, labels, ref_hidden=hidden)
    with pytest.raises(ValueError, match=r"ref_weight is given without ref_hidden"):
        fused_linear_dpo_loss(hidden, weight, labels, ref_weight=weight)
    with pytest.raises(ValueError, match=r"ref_bias is given without"):
        fused_linear_dpo_loss(hidden, weight, labels, ref_bias=weight[:, 0])


def test_messages_of_mixtures():
    sums = [Logps(torch.zeros(3), "sum") for _ in range(4)]
    with pytest.raises(ValueError, match=r"lengths of SequenceLogps are needed.*mean of a sum"):
        mixture_loss({"ipo": 1.0}, *sums)
    with pytest.raises(ValueError, match=r"'sigmoid' needs the reference"):
        mixture_loss({"sigmoid": 1.0}, *sums[:2])
    with pytest.raises(ValueError, match=r'must be "sum" or "mean", got \'none\''):
        mixture_loss({"cpo": 1.0}, *[Logps(torch.zeros(3), "none")] * 2)
    with pytest.raises(ValueError, match=r"pair_weights must be a tensor \(3,\)"):
        mixture_loss({"sigmoid": 1.0}, *sums, pair_weights=torch.ones(2))
    with pytest.raises(ValueError, match=r"mask must be .*\(2B, T\)"):
        ld_dpo_mask(torch.ones(4), 0.5)


def test_rpo_is_a_mixture():
    batch, ref_logits = draw()
    rpo = fused_dpo_loss(*batch, ref_logits=ref_logits, rpo_alpha=0.5)
    mixture = fused_dpo_loss(
        *batch, ref_logits=ref_logits, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5]
    )
    assert torch.equal(rpo.loss, mixture.loss)
    alone = fused_dpo_loss(*batch, ref_logits=ref_logits)
    chosen = fused_seq_logprob(*batch, reduction="sum")[:3].double()
    nll = -chosen.sum() / batch.mask[:3].double().sum()
    assert max_error(rpo.loss, alone.loss.double() + 0.5 * nll) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(loss_type=["ipo", "sft"], use_weighting=True, ld_alpha=0.5, stats=("entropy",)),
        dict(loss_type="kto", kl=0.1),
    ],
    ids=str,
)
def test_compiles_without_a_graph_break(options):
    batch, ref_logits = draw()
    logits = batch.logits.requires_grad_()

    def loss(logits, ref_logits):
        return fused_dpo_loss(logits, *batch[1:], ref_logits=ref_logits, shift=True, **options).loss

    eager = loss(logits, ref_logits)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(logits, ref_logits)
    assert torch.equal(compiled, eager)
    grads = [torch.autograd.grad(x, logits)[0] for x in (eager, compiled)]
    assert torch.equal(*grads)
