"""What is said of inputs and options that do not fit a loss from logits or hidden states."""

import math

import pytest
import torch

from dpo_triton import fused_dpo_loss, fused_linear_dpo_loss
from dpo_triton.losses import SequenceLogps as Logps
from dpo_triton.losses import ld_dpo_mask, mixture_loss

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
