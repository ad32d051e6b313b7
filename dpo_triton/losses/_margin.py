"""Losses of the margin between the two rewards, which take an f-divergence in place of reverse KL.

c = chosen_logps - ref_chosen_logps, r the same of the rejected, d = c - r; ls = log sigmoid.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._terms import (
    FDivergence,
    PreferenceLoss,
    check_beta,
    check_f_divergence,
    check_label_smoothing,
    check_lengths,
    check_number,
    divergence_scores,
    log_ratios,
    smoothed_logistic,
    with_rewards,
)


def sigmoid_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence_type: FDivergence = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> PreferenceLoss:
    """DPO: `-(1 - e) ls(beta d) - e ls(-beta d)` with e = label_smoothing (cDPO).

    Args:
        chosen_logps: (B,) sums of log-probabilities under the policy, in nats.
        rejected_logps, ref_chosen_logps, ref_rejected_logps: (B,) likewise; the reference's without
            a gradient.
        beta: positive.
        label_smoothing: share of wrong labels, in [0, 0.5).
        f_divergence_type: "reverse_kl", "forward_kl", "js_divergence" or "alpha_divergence".
        f_alpha_divergence_coef: alpha of "alpha_divergence"; 0 is forward, 1 reverse KL.

    Raises:
        TypeError, ValueError: an argument that does not fit.

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; Wang et al. 2023, arXiv:2309.16240.
    """
    beta = check_beta(beta)
    label_smoothing = check_label_smoothing(label_smoothing)
    c, r = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    d = _margin(c, r, f_divergence_type, f_alpha_divergence_coef)
    return with_rewards(smoothed_logistic(beta * d, label_smoothing), beta, c, r)


def sigmoid_norm_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    f_divergence_type: FDivergence = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> PreferenceLoss:
    """Length-normalised DPO: `-ls(beta d)` of means over the tokens.

    Args:
        chosen_logps: (B,) means of log-probabilities over the answer's tokens, in nats.
        rejected_logps, ref_chosen_logps, ref_rejected_logps: (B,) means likewise.
        chosen_lengths, rejected_lengths: (B,) numbers of scored tokens; needed for any
            f-divergence but reverse KL, whose score is of the sum.
        beta, f_divergence_type, f_alpha_divergence_coef: as in `sigmoid_loss`.

    Source: Lambert et al. 2024, arXiv:2411.15124 (Tulu 3, dpo_norm); MiniMind.
    """
    beta = check_beta(beta)
    c, r = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    lengths = (chosen_lengths, rejected_lengths)
    d = _margin_of_means(c, r, lengths, f_divergence_type, f_alpha_divergence_coef)
    return with_rewards(smoothed_logistic(beta * d, 0.0), beta, c, r)


def hinge_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    f_divergence_type: FDivergence = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> PreferenceLoss:
    """`max(0, 1 - beta d)` of sums; arguments as in `sigmoid_loss`.

    Source: Zhao et al. 2023, arXiv:2305.10425 (SLiC); Liu et al. 2023, arXiv:2309.06657 (RSO).
    """
    beta = check_beta(beta)
    c, r = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    d = _margin(c, r, f_divergence_type, f_alpha_divergence_coef)
    return with_rewards(torch.relu(1 - beta * d), beta, c, r)


def ipo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    f_divergence_type: FDivergence = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> PreferenceLoss:
    """`(d - 1 / (2 beta)) ** 2` of means; arguments as in `sigmoid_norm_loss`. beta is IPO's tau.

    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17; means by its authors' own account in TRL.
    """
    beta = check_beta(beta)
    c, r = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    lengths = (chosen_lengths, rejected_lengths)
    d = _margin_of_means(c, r, lengths, f_divergence_type, f_alpha_divergence_coef)
    return with_rewards((d - 1 / (2 * beta)) ** 2, beta, c, r)


def exo_pair_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
    f_divergence_type: FDivergence = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> PreferenceLoss:
    """Reverse KL from the policy's preference to (1 - e, e), of sums; e = label_smoothing > 0.

    `sig(x) (ls(x) - ln(1 - e)) + sig(-x) (ls(-x) - ln e)` with x = beta d; the other arguments are
    those of `sigmoid_loss`.

    Source: Ji et al. 2024, arXiv:2402.00856, eq. 16.
    """
    beta = check_beta(beta)
    label_smoothing = check_label_smoothing(label_smoothing, above_zero=True)
    c, r = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    x = beta * _margin(c, r, f_divergence_type, f_alpha_divergence_coef)
    # torch.compile has log2 of a number that changes, and no other logarithm
    log_right, log_wrong = (
        math.log2(share) * math.log(2) for share in (1 - label_smoothing, label_smoothing)
    )
    for_chosen = torch.sigmoid(x) * (F.logsigmoid(x) - log_right)
    for_rejected = torch.sigmoid(-x) * (F.logsigmoid(-x) - log_wrong)
    return with_rewards(for_chosen + for_rejected, beta, c, r)


def robust_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence_type: FDivergence = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> PreferenceLoss:
    """`(-(1 - e) ls(beta d) + e ls(-beta d)) / (1 - 2 e)` of sums, e = label_smoothing.

    An unbiased estimate of the DPO loss on true labels where a share e is wrong; it can be below 0.
    Arguments as in `sigmoid_loss`.

    Source: Chowdhury et al. 2024, arXiv:2403.00409.
    """
    beta = check_beta(beta)
    label_smoothing = check_label_smoothing(label_smoothing)
    c, r = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    x = beta * _margin(c, r, f_divergence_type, f_alpha_divergence_coef)
    as_labelled = -(1 - label_smoothing) * F.logsigmoid(x)
    exchanged = -label_smoothing * F.logsigmoid(-x)
    return with_rewards((as_labelled - exchanged) / (1 - 2 * label_smoothing), beta, c, r)


def discopop_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    discopop_tau: float = 0.05,
    f_divergence_type: FDivergence = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> PreferenceLoss:
    """`-ls(x) (1 - m) + exp(-x) m`, x = beta d, m = sig(x / tau), of sums.

    discopop_tau is in (0, 1]: beyond 1 the exponential outgrows its weight m. The other arguments
    are those of `sigmoid_loss`.

    Source: Lu et al. 2024, arXiv:2406.08414, eq. 5.
    """
    beta = check_beta(beta)
    discopop_tau = check_number("discopop_tau", discopop_tau)
    if not 0 < discopop_tau <= 1:
        raise ValueError(
            f"discopop_tau must be in (0, 1], got {discopop_tau}; the paper found 0.05"
        )
    c, r = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    x = beta * _margin(c, r, f_divergence_type, f_alpha_divergence_coef)
    logistic = -F.logsigmoid(x) * torch.sigmoid(-x / discopop_tau)
    # One exponential: exp(-x) alone is inf where m is 0.
    exponential = torch.exp(F.logsigmoid(x / discopop_tau) - x)
    return with_rewards(logistic + exponential, beta, c, r)


def _margin(c: Tensor, r: Tensor, f_divergence_type: FDivergence, alpha: float) -> Tensor:
    alpha = check_f_divergence(f_divergence_type, alpha)
    chosen_score = divergence_scores(c, f_divergence_type, alpha)
    return chosen_score - divergence_scores(r, f_divergence_type, alpha)


def _margin_of_means(
    c: Tensor,
    r: Tensor,
    lengths: tuple[Tensor | None, Tensor | None],
    f_divergence_type: FDivergence,
    alpha: float,
) -> Tensor:
    alpha = check_f_divergence(f_divergence_type, alpha)
    if f_divergence_type == "reverse_kl":
        return c - r
    chosen_lengths, rejected_lengths = lengths
    check_lengths(c, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    chosen_score = divergence_scores(c, f_divergence_type, alpha, chosen_lengths)
    return chosen_score - divergence_scores(r, f_divergence_type, alpha, rejected_lengths)
