"""From the scores of a batch of pairs to a loss and metrics, however the scores are computed."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ._autograd import Options, Source, log_probabilities
from ._checks import TOKEN_STATS, checked_index, string_of_stats
from ._records import Tokens
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
from .seq_logprob import Reduction

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
    """A batch of pairs."""

    tokens: Tokens  # (2B, T), or (N,) with cu_seqlens (2B + 1,)
    layout: Layout


class Reference(NamedTuple):
    """The reference model: its log-probabilities, or what they come from."""

    logps: Tensor | None  # (2B,)
    reduction: Reduction | None  # of logps
    source: Source | None
    inputs: str  # the arguments that the source is made of, by name


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
    policy: Source, reference: Reference, pairs: Pairs, objective: Objective, options: Options
) -> DPOLossOutput:
    """The loss of a batch of pairs, and what one logs of it; see `fused_dpo_loss`.

    The options are those of both models' log-probabilities, with the stats of the metrics; which
    reduction, the losses say.
    """
    loss_type, loss_weights, beta, rpo_alpha, ld_alpha, use_weighting, loss_options = objective
    losses, stats = _by_name(loss_type, loss_weights), options.stats
    check_mixture(losses, loss_options, is_weighted=use_weighting)
    _check_reference(losses, reference)
    _check_stats(stats)

    tokens, layout = pairs
    weights, shift, cu_seqlens = _scored_mask(tokens), tokens.shift, tokens.cu_seqlens
    if ld_alpha is not None:
        weights = ld_dpo_mask(weights, ld_alpha, layout=layout, shift=shift, cu_seqlens=cu_seqlens)
        tokens = tokens._replace(mask=weights)

    # Means alone need no conversion; a sum and its length give what any loss takes.
    takes_means = rpo_alpha is None and all(LOSSES[name].takes == "mean" for name in losses)
    reduction: Reduction = "mean" if takes_means else "sum"
    wpo_stats = ("token_logps", "log_sum_sq_probs") if use_weighting else ()
    wanted = tuple(dict.fromkeys(("lengths", *wpo_stats, *stats)))
    options = options._replace(reduction=reduction, stats=wanted)
    logps, of_policy = log_probabilities(policy, tokens, options)
    lengths = of_policy["lengths"]
    ref_logps, ref_reduction = reference.logps, reference.reduction
    if reference.source is not None:
        with torch.no_grad():
            options = options._replace(stats=("lengths",))
            ref_logps, _ = log_probabilities(reference.source, tokens, options)
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
        **loss_options,
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


def _scored_mask(tokens: Tokens) -> Tensor:
    """The mask, 0 where a label is to be ignored."""
    labels, mask = tokens.labels, tokens.mask
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor, got {type(labels).__name__}")
    is_label = labels.long() != checked_index(tokens.ignore_index)
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
    ref_logps, ref_reduction, source, ref_inputs = reference
    needing = [name for name in losses if LOSSES[name].needs_reference]
    if needing and ref_logps is None and source is None:
        free = ", ".join(name for name, loss in LOSSES.items() if not loss.needs_reference)
        raise ValueError(
            f"loss_type {needing[0]!r} needs a reference; pass ref_logps with ref_reduction, or "
            f"{ref_inputs}; losses without one are {free}"
        )
    if not needing and (ref_logps is not None or source is not None):
        raise ValueError(
            f"loss_type {', '.join(losses)} uses no reference, and one is given; drop it"
        )
    if ref_logps is not None and source is not None:
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
        raise string_of_stats(stats)
    unknown = [name for name in stats if name not in TOKEN_STATS]
    if unknown:
        raise ValueError(
            f"stats must be out of {', '.join(TOKEN_STATS)}, got {unknown[0]!r}; log-probabilities "
            "and lengths are always among the metrics"
        )
