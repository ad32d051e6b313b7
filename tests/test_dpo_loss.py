"""Logits to a loss: against float64, its layouts, its reference and its metrics."""

import pytest
import torch
from batches import assert_close
from pair_batches import LN_2, OPTIONS, draw_pairs, exact_loss, reference_of

from dpo_triton import fused_dpo_loss, fused_seq_logprob
from dpo_triton.losses import LOSSES, split_pairs


@pytest.mark.parametrize("layout", ["concat", "interleaved"])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_match_float64(name, layout, device):
    batch, ref_logits = draw_pairs(device=device)
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


@pytest.mark.parametrize(
    ("pairs", "dtype"), [(1, torch.float32), (2, torch.bfloat16), (1, torch.float16)], ids=str
)
def test_policy_equal_to_reference_is_ln_2(pairs, dtype, backend, device):
    batch, _ = draw_pairs(pairs, seq_len=2, dtype=dtype, device=device)
    for name in ("sigmoid", "sigmoid_norm"):
        options = dict(loss_type=name, shift=True, backend=backend)
        ours = fused_dpo_loss(*batch, ref_logits=batch.logits, **options)
        assert ours.loss.item() == LN_2
        assert ours.metrics.accuracies.tolist() == [0.0] * pairs
        takes = LOSSES[name].takes
        ref_logps = fused_seq_logprob(*batch, reduction=takes, shift=True, backend=backend)
        ours = fused_dpo_loss(*batch, ref_logps=ref_logps, ref_reduction=takes, **options)
        assert ours.loss.item() == LN_2


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm"])
def test_the_mean_of_many_times_ln_2_is_ln_2(name, device):
    """In float32 the sum of 13, divided by 13, is not."""
    assert (torch.full((13,), LN_2).sum() / 13).item() != LN_2
    batch, _ = draw_pairs(13, seq_len=2, device=device)
    ours = fused_dpo_loss(*batch, ref_logits=batch.logits, loss_type=name, shift=True)
    assert ours.loss.item() == LN_2


@pytest.mark.parametrize(
    "loss_type", ["sigmoid", "ipo", ["sigmoid_norm", "sft"], ["sigmoid", "ipo"]]
)
def test_reference_in_either_reduction(loss_type):
    """Sums and means of the reference give the loss of its logits: neither is taken blindly."""
    batch, ref_logits = draw_pairs()
    options = dict(loss_type=loss_type, shift=True)
    expected = fused_dpo_loss(*batch, ref_logits=ref_logits, **options)
    for reduction in ("sum", "mean"):
        ref_logps = fused_seq_logprob(ref_logits, *batch[1:], reduction=reduction, shift=True)
        ours = fused_dpo_loss(*batch, ref_logps=ref_logps, ref_reduction=reduction, **options)
        torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-5, atol=1e-6)


def test_layouts_are_a_permutation(backend, device):
    batch, ref_logits = draw_pairs(device=device)
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
    batch, ref_logits = draw_pairs(device=device)
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


def test_metrics():
    batch, ref_logits = draw_pairs()
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


def test_reference_has_no_graph():
    batch, ref_logits = draw_pairs()
    ref_logits.requires_grad_()
    fused_dpo_loss(batch.logits.requires_grad_(), *batch[1:], ref_logits=ref_logits).loss.backward()
    assert ref_logits.grad is None
    assert batch.logits.grad is not None


def test_inplace_backward():
    batch, ref_logits = draw_pairs()
    grads = []
    for inplace in (False, True):
        logits = batch.logits.clone().requires_grad_()
        computed = logits * 1
        result = fused_dpo_loss(
            computed, *batch[1:], ref_logits=ref_logits, inplace_backward=inplace
        )
        grads.append(torch.autograd.grad(result.loss, logits)[0])
    assert torch.equal(*grads)


def test_kto_of_pairs_is_the_mean_of_both_answers():
    batch, ref_logits = draw_pairs()
    logps = [fused_seq_logprob(x, *batch[1:], reduction="sum") for x in (batch.logits, ref_logits)]
    alone = LOSSES["kto"].function(
        *split_pairs(logps[0]), *split_pairs(logps[1]), kl=0.3, undesirable_weight=2.0
    )
    ours = fused_dpo_loss(
        *batch, ref_logits=ref_logits, loss_type="kto", kl=0.3, undesirable_weight=2.0
    )
    torch.testing.assert_close(ours.loss, alone.losses.mean())
    torch.testing.assert_close(ours.metrics.losses, (alone.losses[:3] + alone.losses[3:]) / 2)


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
    batch, ref_logits = draw_pairs()
    logits = batch.logits.requires_grad_()

    def loss(logits, ref_logits):
        return fused_dpo_loss(logits, *batch[1:], ref_logits=ref_logits, shift=True, **options).loss

    eager = loss(logits, ref_logits)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(logits, ref_logits)
    assert torch.equal(compiled, eager)
    grads = [torch.autograd.grad(x, logits)[0] for x in (eager, compiled)]
    assert torch.equal(*grads)
