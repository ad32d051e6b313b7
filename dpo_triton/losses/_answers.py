"""Losses of each answer's own reward, and of rewards sorted over the batch.

c = chosen_logps - ref_chosen_logps, r the same of the rejected, all sums; sig = sigmoid,
ls = log sigmoid. Arguments that are not described are those of `sigmoid_loss`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._terms import (
    PreferenceLoss,
    check_beta,
    check_label_smoothing,
    check_number,
    log_ratios,
    smoothed_logistic,
    wide,
    with_rewards,
)


def nca_pair_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """`-ls(beta c) - ls(-beta c) / 2 - ls(-beta r) / 2`.

    Source: Chen et al. 2024, arXiv:2402.05369.
    """
    beta = check_beta(beta)
    c, r = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    against = F.logsigmoid(-beta * c) + F.logsigmoid(-beta * r)
    return with_rewards(-F.logsigmoid(beta * c) - against / 2, beta, c, r)


def bco_pair_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    delta: float | Tensor = 0.0,
) -> PreferenceLoss:
    """`-ls(beta c - delta) - ls(-(beta r - delta))`.

    delta is the reward shift: the running mean of all rewards, which the caller keeps (a number or
    a tensor of one element, detached here), or 0 as in TRL.

    Source: Jung et al. 2024, arXiv:2404.04656.
    """
    beta = check_beta(beta)
    c, r = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    shift = _scalar("delta", delta, like=c)
    losses = -F.logsigmoid(beta * c - shift) - F.logsigmoid(shift - beta * r)
    return with_rewards(losses, beta, c, r)


def sppo_hard_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """`(c - 1 / (2 beta)) ** 2 + (r + 1 / (2 beta)) ** 2`.

    Source: Wu et al. 2024, arXiv:2405.00675, eq. 4.7, with the chosen answer's probability to win
        set to 1.
    """
    beta = check_beta(beta)
    c, r = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    target = 1 / (2 * beta)
    return with_rewards((c - target) ** 2 + (r + target) ** 2, beta, c, r)


def apo_zero_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """`1 - sig(beta c) + sig(beta r)`: for chosen answers better than the model's own.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7.
    """
    beta = check_beta(beta)
    c, r = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return with_rewards(torch.sigmoid(-beta * c) + torch.sigmoid(beta * r), beta, c, r)


def apo_down_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """`sig(beta c) + 1 - sig(beta (c - r))`: for chosen answers worse than the model's own.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8.
    """
    beta = check_beta(beta)
    c, r = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return with_rewards(torch.sigmoid(beta * c) + torch.sigmoid(-beta * (c - r)), beta, c, r)


def kto_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    kl: float | Tensor | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> PreferenceLoss:
    """`1 - sig(beta (c - KL))` of desirable answers and `1 - sig(beta (KL - r))` of undesirable.

    Args:
        chosen_logps, ref_chosen_logps: (C,) sums over desirable answers; C may be 0.
        rejected_logps, ref_rejected_logps: (R,) of undesirable answers, which need not be as many.
        kl: estimate of KL(policy || reference) in nats, a number or a tensor of one element: the
            mean log-ratio of answers to other prompts, over all ranks. Detached and held at 0 or
            above here. With 0 this is TRL's "apo_zero_unpaired".
        desirable_weight, undesirable_weight: factors of the two kinds' losses.

    Returns:
        losses (C + R,), desirable answers first; chosen_rewards (C,), rejected_rewards (R,).

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7.
    """
    beta = check_beta(beta)
    desirable_weight = check_number("desirable_weight", desirable_weight)
    undesirable_weight = check_number("undesirable_weight", undesirable_weight)
    if kl is None:
        raise ValueError(
            "kl is needed: the mean of log-ratios of answers to other prompts, such as "
            "(kl_logps - ref_kl_logps).mean(), or 0.0 for none"
        )
    c, r = log_ratios(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, paired=False
    )
    baseline = _scalar("kl", kl, like=c).clamp(min=0)
    desirable = desirable_weight * torch.sigmoid(-beta * (c - baseline))
    undesirable = undesirable_weight * torch.sigmoid(-beta * (baseline - r))
    return with_rewards(torch.cat([desirable, undesirable]), beta, c, r)


def aot_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """The sigmoid loss of `sort(chosen - rejected) - sort(ref_chosen - ref_rejected)`.

    The i-th loss is of the i-th smallest values, not of the i-th pair.

    Source: Melnyk et al. 2024, arXiv:2406.05882.
    """
    beta = check_beta(beta)
    label_smoothing = check_label_smoothing(label_smoothing)
    c, r = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    of_policy = (wide(chosen_logps) - wide(rejected_logps)).sort().values
    of_reference = (wide(ref_chosen_logps) - wide(ref_rejected_logps)).sort().values
    x = beta * (of_policy - of_reference)
    return with_rewards(smoothed_logistic(x, label_smoothing), beta, c, r)


def aot_unpaired_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """The sigmoid loss of `sort(c) - sort(r)`; see `aot_loss`."""
    beta = check_beta(beta)
    label_smoothing = check_label_smoothing(label_smoothing)
    c, r = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    x = beta * (c.sort().values - r.sort().values)
    return with_rewards(smoothed_logistic(x, label_smoothing), beta, c, r)


def _scalar(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A number, or a tensor of one element, without a gradient."""
    if not isinstance(value, Tensor):
        # added: new_tensor would make a number that changes a constant to torch.compile
        return like.new_zeros(()) + check_number(name, value)
    if value.numel() != 1:
        raise ValueError(
            f"{name} must be a number or a tensor of one element, got {tuple(value.shape)}; "
            "pass its mean"
        )
    return value.detach().to(like).reshape(())
