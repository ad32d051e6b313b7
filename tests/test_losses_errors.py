"""What is said of log-probabilities and options that do not fit a loss."""

import math

import numpy as np
import pytest
import torch

from dpo_triton.losses import (
    LOSSES,
    exo_pair_loss,
    ipo_loss,
    kto_loss,
    sft_loss,
    sigmoid_loss,
    sigmoid_norm_loss,
)

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
