"""Preference losses: from log-probabilities of answers to one loss a pair, and rewards to log.

Every loss is a function of (B,) log-probabilities in nats, chosen and rejected, of the policy and,
where it needs one, of the reference model. LOSSES says by name which takes sums over the answer's
tokens and which means; `mixture_loss` reads it, and combines several. 16-bit values are computed in
float32. Names and options are TRL's.
"""

from ._answers import (
    aot_loss,
    aot_unpaired_loss,
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    kto_loss,
    nca_pair_loss,
    sppo_hard_loss,
)
from ._margin import (
    discopop_loss,
    exo_pair_loss,
    hinge_loss,
    ipo_loss,
    robust_loss,
    sigmoid_loss,
    sigmoid_norm_loss,
)
from ._mixture import (
    LOSSES,
    Loss,
    LossName,
    LossOptions,
    SequenceLogps,
    check_mixture,
    mixture_loss,
)
from ._reference_free import cpo_loss, log1mexp, orpo_loss, sft_loss, simpo_loss
from ._terms import FDivergence, PreferenceLoss
from ._weights import Layout, ld_dpo_mask, split_pairs, token_means, wpo_weights

__all__ = [
    "LOSSES",
    "FDivergence",
    "Layout",
    "Loss",
    "LossName",
    "LossOptions",
    "PreferenceLoss",
    "SequenceLogps",
    "aot_loss",
    "aot_unpaired_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "bco_pair_loss",
    "check_mixture",
    "cpo_loss",
    "discopop_loss",
    "exo_pair_loss",
    "hinge_loss",
    "ipo_loss",
    "kto_loss",
    "ld_dpo_mask",
    "log1mexp",
    "mixture_loss",
    "nca_pair_loss",
    "orpo_loss",
    "robust_loss",
    "sft_loss",
    "sigmoid_loss",
    "sigmoid_norm_loss",
    "simpo_loss",
    "split_pairs",
    "sppo_hard_loss",
    "token_means",
    "wpo_weights",
]
