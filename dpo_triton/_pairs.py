"""From the scores of a batch of pairs to a loss and metrics, however the scores are computed."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ._checks import TOKEN_STATS
from .losses import (
    LOSSES,
    Layout,
    LossName,
    SequenceLogps,
    check_mixture,
    ld_dpo_mask,
    mixture_loss,
    split_pairs,
    token_means,
    wpo_weights,
)
from .seq_logprob import DistributionStat, Reduction, Stat

if TYPE_CHECKING:
    from .losses import LossOptions


class DPOMetrics(NamedTuple):
    """What one logs, detached; (B,), one a pair, in the order of the batch."""

    losses: Tensor  # whose mean is the loss
    chosen_rewards: Tensor  # beta times the log-ratio that the loss compares
    rejected_rewards: Tensor
    margins: Tensor  # chosen_rewards - rejected_rewards
    accuracies: Tensor  # 1 where the margin is above 0, else 0
    chosen_logps: Tensor  # nats: means if the loss takes means alone, else sums
    rejected_logps: Tensor
    chosen_lengths: Tensor  # sums of the scored tokens' weights
    rejected_lengths: Tensor
    stats: dict[str, Tensor]  # "chosen_entropy", "rejected_entropy", ...: means over the tokens


class DPOLossOutput(NamedTuple):
    """What `fused_dpo_loss` and `fused_linear_dpo_loss` return."""

    loss: Tensor  # scalar, float32, or float64 for float64 inputs
    metrics: DPOMetrics


class Pairs(NamedTuple):
    """The tokens of a batch of pairs, as in `fused_seq_logprob`."""

    labels: Tensor  # (2B, T) or (N,)
    mask: Tensor | None  # shape of labels
    layout: Layout
    shift: bool
    cu_seqlens: Tensor | None  # (2B + 1,) for (N,)
    ignore_index: int


# (mask, reduction, stats) -> values (2B,), stats: `fused_seq_logprob` or its linear form, with
# inputs, labels and scaling bound.
Scorer = Callable[[Tensor | None, Reduction, Sequence[Stat]], tuple[Tensor, dict[str, Tensor]]]


class Reference(NamedTuple):
    """The reference model: its log-probabilities, or what computes them."""

    logps: Tensor | None  # (2B,)
    reduction: Reduction | None  # of logps
    score: Scorer | None
    inputs: str  # the arguments that it is scored from, by name


class Objective(NamedTuple):
    """Which losses, and what they are told; see `fused_dpo_loss`."""

    loss_type: LossName | Sequence[LossName]
    loss_weights: Sequence[float] | None
    beta: float
    rpo_alpha: float | None
    ld_alpha: float | None
    use_weighting: bool
    options: "LossOptions"


def pair_loss(
    score_policy: Scorer,
    reference: Reference,
    pairs: Pairs,
    objective: Objective,
    stats: Sequence[DistributionStat],
) -> DPOLossOutput:
    """The loss of a batch of pairs, and what one logs of it; see `fused_dpo_loss`."""
    beta, rpo_alpha, ld_alpha, use_weighting = objective[2:6]
    losses = _by_name(objective.loss_type, objective.loss_weights)
    check_mixture(losses, objective.options, is_weighted=use_weighting)
    _check_reference(losses, reference)
    _check_stats(stats)

    layout, shift, cu_seqlens = pairs.layout, pairs.shift, pairs.cu_seqlens
    mask, weights = pairs.mask, _scored_mask(pairs)
    if ld_alpha is not None:
        mask = weights = ld_dpo_mask(
            weights, ld_alpha, layout=layout, shift=shift, cu_seqlens=cu_seqlens
        )

    # Means alone need no conversion; a sum and its length give what any loss takes.
    takes_means = rpo_alpha is None and all(LOSSES[name].takes == "mean" for name in losses)
    reduction: Reduction = "mean" if takes_means else "sum"
    wpo_stats: tuple[Stat, ...] = ("token_logps", "log_sum_sq_probs") if use_weighting else ()
    wanted: dict[Stat, None] = dict.fromkeys(("lengths", *wpo_stats, *stats))
    logps, of_policy = score_policy(mask, reduction, tuple(wanted))
    lengths = of_policy["lengths"]
    ref_logps, ref_reduction = reference.logps, reference.reduction
    if reference.score is not None:
        with torch.no_grad():
            ref_logps, _ = reference.score(mask, reduction, ("lengths",))
        ref_reduction = reduction

    chosen, rejected = _answers(logps, reduction, lengths, layout)
    ref_chosen = ref_rejected = None
    if ref_logps is not None and ref_reduction is not None:
        _check_ref_logps(ref_logps, logps)
        ref_chosen, ref_rejected = _answers(ref_logps, ref_reduction, lengths, layout)
    pair_weights = None
    if use_weighting:
        pair_weights = wpo_weights(
            of_policy["token_logps"],
            of_policy["log_sum_sq_probs"],
            weights,
            layout=layout,
            shift=shift,
            cu_seqlens=cu_seqlens,
        )
    result = mixture_loss(
        losses,
        chosen,
        rejected,
        ref_chosen,
        ref_rejected,
        beta=beta,
        rpo_alpha=rpo_alpha,
        pair_weights=pair_weights,
        **objective.options,
    )

    # In float64 the mean of equal losses is that loss, whatever their number.
    total = result.losses.sum(dtype=torch.float64)
    loss = (total / max(len(result.losses), 1)).to(result.losses.dtype)
    chosen_rewards, rejected_rewards = _own(result.chosen_rewards), _own(result.rejected_rewards)
    margins = chosen_rewards - rejected_rewards
    means = {}
    for name in stats:
        of_answers = token_means(of_policy[name], weights, shift=shift, cu_seqlens=cu_seqlens)
        means[f"chosen_{name}"], means[f"rejected_{name}"] = split_pairs(of_answers, layout)
    chosen_lengths, rejected_lengths = split_pairs(lengths, layout)
    metrics = DPOMetrics(
        losses=_own(result.losses),
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        margins=margins,
        accuracies=(margins > 0).to(margins.dtype),
        chosen_logps=_own(chosen.values),
        rejected_logps=_own(rejected.values),
        chosen_lengths=_own(chosen_lengths),
        rejected_lengths=_own(rejected_lengths),
        stats=means,
    )
    return DPOLossOutput(loss, metrics)


def _own(x: Tensor) -> Tensor:
    """A copy for those who log: what they do to it in place, the backward pass does not see."""
    return x.detach().clone()


def _answers(
    logps: Tensor, reduction: Reduction, lengths: Tensor, layout: Layout
) -> tuple[SequenceLogps, SequenceLogps]:
    values = split_pairs(logps, layout)
    counts = split_pairs(lengths, layout)
    return (
        SequenceLogps(values[0], reduction, counts[0]),
        SequenceLogps(values[1], reduction, counts[1]),
    )


def _by_name(
    loss_type: str | Sequence[str], loss_weights: Sequence[float] | None
) -> dict[str, float]:
    """Weight of each loss, 1 by default."""
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    if len(set(names)) < len(names):
        raise ValueError(f"loss_type names a loss twice, {names}; weigh it in loss_weights")
    weights = [1.0] * len(names) if loss_weights is None else list(loss_weights)
    if len(weights) != len(names):
        raise ValueError(
            f"loss_weights must have one weight for each of {names}, got {len(weights)}"
        )
    return dict(zip(names, weights, strict=True))


def _scored_mask(pairs: Pairs) -> Tensor:
    """The mask, 0 where a label is to be ignored."""
    labels, mask = pairs.labels, pairs.mask
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor, got {type(labels).__name__}")
    is_label = labels != pairs.ignore_index
    if mask is None:
        return is_label
    if not isinstance(mask, Tensor) or mask.shape != labels.shape:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"mask must be a torch.Tensor of the shape of labels, {tuple(labels.shape)}, or None, "
            f"got {got}; with shift=True it is taken at the label: slice neither"
        )
    return torch.where(is_label, mask, 0)


def _check_reference(losses: Mapping[str, float], reference: Reference) -> None:
    """One reference where a loss needs it, none where no loss does, and its reduction said."""
    ref_logps, ref_reduction, score_reference, ref_inputs = reference
    needing = [name for name in losses if LOSSES[name].needs_reference]
    if needing and ref_logps is None and score_reference is None:
        free = ", ".join(name for name, loss in LOSSES.items() if not loss.needs_reference)
        raise ValueError(
            f"loss_type {needing[0]!r} needs a reference; pass ref_logps with ref_reduction, or "
            f"{ref_inputs}; losses without one are {free}"
        )
    if not needing and (ref_logps is not None or score_reference is not None):
        raise ValueError(
            f"loss_type {', '.join(losses)} uses no reference, and one is given; drop it"
        )
    if ref_logps is not None and score_reference is not None:
        raise ValueError(f"ref_logps and {ref_inputs} are both given; pass one of them")
    if ref_logps is not None and ref_reduction not in ("sum", "mean"):
        raise ValueError(
            'ref_reduction must be "sum" or "mean" with ref_logps, got '
            f"{ref_reduction!r}; it says what they are (fused_seq_logprob returns means unless "
            'told reduction="sum")'
        )
    if ref_logps is None and ref_reduction is not None:
        raise ValueError(f"ref_reduction={ref_reduction!r} is given without ref_logps; drop it")


def _check_ref_logps(ref_logps: Tensor, logps: Tensor) -> None:
    if not isinstance(ref_logps, Tensor) or ref_logps.shape != logps.shape:
        got = tuple(ref_logps.shape) if isinstance(ref_logps, Tensor) else type(ref_logps).__name__
        raise ValueError(
            f"ref_logps must be a torch.Tensor of shape {tuple(logps.shape)}, one value for each "
            f"sequence in the order of the batch, got {got}"
        )
    if ref_logps.device != logps.device or ref_logps.requires_grad:
        raise ValueError(
            f"ref_logps must be on {logps.device} without a gradient, got {ref_logps.device} with "
            f"requires_grad={ref_logps.requires_grad}; pass "
            f"ref_logps.detach().to({str(logps.device)!r})"
        )


def _check_stats(stats: Sequence[str]) -> None:
    if isinstance(stats, str):
        raise TypeError(
            f'stats must be a sequence of names, got the string {stats!r}; pass ("{stats}",)'
        )
    unknown = [name for name in stats if name not in TOKEN_STATS]
    if unknown:
        raise ValueError(
            f"stats must be out of {', '.join(TOKEN_STATS)}, got {unknown[0]!r}; log-probabilities "
            "and lengths are always among the metrics"
        )
