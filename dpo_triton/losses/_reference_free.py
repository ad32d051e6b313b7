"""Losses without a reference model. w = chosen_logps, l = rejected_logps, D = w - l."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._terms import (
    PreferenceLoss,
    at_least_one_token,
    check_beta,
    check_label_smoothing,
    check_lengths,
    check_logps,
    check_number,
    power_score,
    smoothed_logistic,
    wide,
    with_rewards,
)


def sft_loss(
    chosen_logps: Tensor,
    chosen_lengths: Tensor,
    *,
    mean_chosen_length: float | Tensor | None = None,
) -> PreferenceLoss:
    """Minus the mean log-probability of the batch's chosen tokens.

    Args:
        chosen_logps: (B,) sums of log-probabilities, in nats.
        chosen_lengths: (B,) numbers of scored tokens, or sums of weights.
        mean_chosen_length: for gradient accumulation: the mean of chosen_lengths over the whole
            batch of which this is a part. Losses are then `-chosen_logps / mean_chosen_length`,
            whose mean over the whole batch is the mean over its tokens, however it is divided.

    Returns:
        losses: (B,), without mean_chosen_length all of them that mean; 0 where no token is scored.
        The rewards are 0: a model of one answer prefers nothing.
    """
    check_logps(chosen_logps=chosen_logps)
    check_lengths(chosen_logps, chosen_lengths=chosen_lengths)
    sums = wide(chosen_logps)
    losses = _token_nll(sums, chosen_lengths, mean_chosen_length).expand_as(sums)
    return with_rewards(losses, 0.0, torch.zeros_like(sums), torch.zeros_like(sums))


def simpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    simpo_gamma: float = 0.5,
    label_smoothing: float = 0.0,
    alpha: float = 0.0,
) -> PreferenceLoss:
    """SimPO: `-ls(beta D - gamma)` of means over the tokens.

    Args:
        chosen_logps, rejected_logps: (B,) means of log-probabilities, in nats.
        beta: positive; the paper uses 2 to 10, the default is TRL's.
        simpo_gamma: target margin of the rewards beta * w and beta * l.
        label_smoothing: share of wrong labels, in [0, 0.5).
        alpha: AlphaPO's reward `(1 - exp(-alpha w)) / alpha` in place of w, which is its limit 0.

    Source: Meng et al. 2024, arXiv:2405.14734; Gupta et al. 2025, arXiv:2501.03884.
    """
    simpo_gamma = check_number("simpo_gamma", simpo_gamma)
    beta = check_beta(beta)
    label_smoothing = check_label_smoothing(label_smoothing)
    chosen, rejected = _rewarded(chosen_logps, rejected_logps, alpha)
    losses = smoothed_logistic(beta * (chosen - rejected) - simpo_gamma, label_smoothing)
    return with_rewards(losses, beta, chosen, rejected)


def cpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    cpo_alpha: float = 1.0,
    alpha: float = 0.0,
    chosen_lengths: Tensor | None = None,
    mean_chosen_length: float | Tensor | None = None,
) -> PreferenceLoss:
    """CPO: `-(1 - e) ls(beta D) - e ls(-beta D) + cpo_alpha * NLL(chosen)` of sums.

    Args:
        chosen_logps, rejected_logps: (B,) sums of log-probabilities, in nats.
        beta, label_smoothing, alpha: as in `simpo_loss`.
        cpo_alpha: weight of the NLL.
        chosen_lengths: (B,) numbers of scored tokens: NLL is then the mean over the batch's chosen
            tokens, as in TRL and `fused_dpo_loss`; None: `-chosen_logps`, as in the paper.
        mean_chosen_length: of the whole batch, for gradient accumulation; see `sft_loss`.

    Source: Xu et al. 2024, arXiv:2401.08417.
    """
    cpo_alpha = check_number("cpo_alpha", cpo_alpha)
    beta = check_beta(beta)
    label_smoothing = check_label_smoothing(label_smoothing)
    chosen, rejected = _rewarded(chosen_logps, rejected_logps, alpha)
    nll = -wide(chosen_logps)
    if chosen_lengths is not None:
        check_lengths(chosen_logps, chosen_lengths=chosen_lengths)
        nll = _token_nll(wide(chosen_logps), chosen_lengths, mean_chosen_length)
    losses = smoothed_logistic(beta * (chosen - rejected), label_smoothing) + cpo_alpha * nll
    return with_rewards(losses, beta, chosen, rejected)


def orpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    chosen_lengths: Tensor | None = None,
    mean_chosen_length: float | Tensor | None = None,
) -> PreferenceLoss:
    """ORPO: `NLL(chosen) - beta ls(D - (log1mexp(w) - log1mexp(l)))` of means.

    Args:
        chosen_logps, rejected_logps: (B,) means of log-probabilities, in nats.
        beta: positive; the paper's lambda.
        chosen_lengths: (B,) numbers of scored tokens: NLL is then the mean over the batch's chosen
            tokens, as in `fused_dpo_loss`; None: `-chosen_logps`, as in the paper. TRL's
            covers the prompts too.
        mean_chosen_length: of the whole batch, for gradient accumulation; see `sft_loss`.

    Source: Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7.
    """
    beta = check_beta(beta)
    check_logps(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    chosen, rejected = wide(chosen_logps), wide(rejected_logps)
    nll = -chosen
    if chosen_lengths is not None:
        check_lengths(chosen_logps, chosen_lengths=chosen_lengths)
        nll = _token_nll(chosen * chosen_lengths, chosen_lengths, mean_chosen_length)
    log_odds_ratio = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    return with_rewards(nll - beta * F.logsigmoid(log_odds_ratio), beta, chosen, rejected)


def log1mexp(x: Tensor) -> Tensor:
    """`log(1 - exp(x))` for x <= 0, with its digits near 0 and far below.

    At 0 it would be -inf: x is held at -sqrt(tiny) of its dtype, 1e-19 nats in float32, whose
    gradient of 1e19 can still be scaled. Each branch sees only what it is good for, or its infinite
    gradient times 0 would be NaN.

    Source: Maechler 2012, "Accurately Computing log(1 - exp(-|a|))", for the two branches.
    """
    closest = -math.sqrt(torch.finfo(x.dtype).tiny)
    far = torch.log1p(-torch.exp(x.clamp(max=-math.log(2))))
    near = torch.log(-torch.expm1(x.clamp(min=-math.log(2), max=closest)))
    return torch.where(x < -math.log(2), far, near)


def _rewarded(chosen_logps: Tensor, rejected_logps: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Both log-probabilities, checked, or AlphaPO's rewards of them."""
    alpha = check_number("alpha", alpha)
    check_logps(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    return power_score(wide(chosen_logps), -alpha), power_score(wide(rejected_logps), -alpha)


def _token_nll(
    chosen_sums: Tensor, chosen_lengths: Tensor, mean_chosen_length: float | Tensor | None
) -> Tensor:
    """Minus the mean log-probability of all tokens of the batch, a scalar; of a part of a batch
    (B,) shares of the whole's."""
    if mean_chosen_length is not None:
        return -chosen_sums / mean_chosen_length
    return -chosen_sums.sum() / at_least_one_token(chosen_lengths.sum())
