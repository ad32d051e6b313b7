"""The table of losses, and weighted sums of them from values that say what they are."""

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

from . import _answers, _margin, _reference_free
from ._terms import FDivergence, PreferenceLoss, at_least_one_token, check_number

if TYPE_CHECKING:
    from typing_extensions import Unpack


Takes = Literal["sum", "mean", "tokens"]
LossName = Literal[
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair",
    "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "simpo", "cpo",
    "orpo", "kto",
]  # fmt: skip


class Loss(NamedTuple):
    """An entry of LOSSES."""

    function: Callable[..., PreferenceLoss]
    takes: Takes  # of token log-probabilities; "tokens": sum and number
    needs_reference: bool
    sorts: bool  # the batch: losses[i] is not that of pair i
    options: tuple[str, ...]  # names of the keyword arguments


def _entry(function: Callable[..., PreferenceLoss], takes: Takes, *, sorts: bool = False) -> Loss:
    """What the function's own signature says needs no saying again."""
    parameters = inspect.signature(function).parameters
    options = tuple(name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY)
    return Loss(function, takes, "ref_chosen_logps" in parameters, sorts, options)


LOSSES: dict[str, Loss] = {
    "sigmoid": _entry(_margin.sigmoid_loss, "sum"),
    "sigmoid_norm": _entry(_margin.sigmoid_norm_loss, "mean"),
    "hinge": _entry(_margin.hinge_loss, "sum"),
    "ipo": _entry(_margin.ipo_loss, "mean"),
    "exo_pair": _entry(_margin.exo_pair_loss, "sum"),
    "nca_pair": _entry(_answers.nca_pair_loss, "sum"),
    "robust": _entry(_margin.robust_loss, "sum"),
    "bco_pair": _entry(_answers.bco_pair_loss, "sum"),
    "sppo_hard": _entry(_answers.sppo_hard_loss, "sum"),
    "aot": _entry(_answers.aot_loss, "sum", sorts=True),
    "aot_unpaired": _entry(_answers.aot_unpaired_loss, "sum", sorts=True),
    "apo_zero": _entry(_answers.apo_zero_loss, "sum"),
    "apo_down": _entry(_answers.apo_down_loss, "sum"),
    "discopop": _entry(_margin.discopop_loss, "sum"),
    "sft": _entry(_reference_free.sft_loss, "tokens"),
    "simpo": _entry(_reference_free.simpo_loss, "mean"),
    "cpo": _entry(_reference_free.cpo_loss, "sum"),
    "orpo": _entry(_reference_free.orpo_loss, "mean"),
    "kto": _entry(_answers.kto_loss, "sum"),
}


class LossOptions(TypedDict, total=False):
    """Options that some losses take; each loss's function describes its own."""

    label_smoothing: float
    f_divergence_type: FDivergence
    f_alpha_divergence_coef: float
    discopop_tau: float
    delta: float | Tensor
    simpo_gamma: float
    cpo_alpha: float
    alpha: float
    mean_chosen_length: float | Tensor
    kl: float | Tensor
    desirable_weight: float
    undesirable_weight: float


_KNOWN_OPTIONS = tuple(LossOptions.__annotations__)


class SequenceLogps(NamedTuple):
    """Log-probabilities of answers that know whether they are sums or means."""

    values: Tensor  # (B,) nats
    reduction: Literal["sum", "mean"]
    lengths: Tensor | None = None  # (B,) numbers of scored tokens, or sums of weights

    def reduced_to(self, reduction: str) -> Tensor:
        """The values as they are, or converted by the lengths; 0 for an empty answer."""
        if self.reduction not in ("sum", "mean"):
            raise ValueError(
                f'reduction of SequenceLogps must be "sum" or "mean", got {self.reduction!r}'
            )
        if reduction == self.reduction:
            return self.values
        if self.lengths is None:
            raise ValueError(
                f"lengths of SequenceLogps are needed to make the {reduction} of a "
                f"{self.reduction}; pass the numbers of scored tokens, such as "
                'fused_seq_logprob(..., stats=("lengths",)) returns'
            )
        if reduction == "sum":
            return self.values * self.lengths
        return self.values / at_least_one_token(self.lengths)


def mixture_loss(
    losses: Mapping[str, float],
    chosen: SequenceLogps,
    rejected: SequenceLogps,
    ref_chosen: SequenceLogps | None = None,
    ref_rejected: SequenceLogps | None = None,
    *,
    beta: float = 0.1,
    rpo_alpha: float | None = None,
    pair_weights: Tensor | None = None,
    **options: "Unpack[LossOptions]",
) -> PreferenceLoss:
    """Weighted sum of losses by name, each of which gets the sum or mean that it takes.

    Args:
        losses: weight of each loss, by its name in LOSSES; `{"sigmoid": 1.0}` is DPO.
        chosen, rejected: of B pairs.
        ref_chosen, ref_rejected: of the reference model; None if no loss needs one.
        beta: of every loss that has one.
        rpo_alpha: adds this times the NLL of the chosen tokens ("sft"), as RPO does.
        pair_weights: (B,) factors of the pairs, such as `wpo_weights` gives; detached.
        options: go to each loss that takes them; one that none takes is an error. An f-divergence
            must fit all of them (but "sft", which has no rewards).

    Returns:
        losses (B,); the rewards are those of the first loss that has any. "kto" takes the two
        answers of a pair as one desirable and one undesirable answer, and gives their mean.

    Source: RPO: Pang et al. 2024, arXiv:2404.19733; mixtures: Wang et al. 2024,
        arXiv:2411.10442 (MPO); weights: Zhou et al. 2024, arXiv:2406.11827 (WPO).
    """
    weights = dict(losses)
    if rpo_alpha is not None:
        weights["sft"] = weights.get("sft", 0.0) + check_number("rpo_alpha", rpo_alpha)
    check_mixture(weights, options, is_weighted=pair_weights is not None)
    if pair_weights is not None:
        pair_weights = _checked_pair_weights(pair_weights, chosen)

    total = torch.zeros_like(chosen.values, dtype=torch.float32)
    rewards = None
    for name, weight in weights.items():
        result = _single(name, chosen, rejected, ref_chosen, ref_rejected, beta, options)
        # (B,), or (2B,) of single answers, chosen first.
        of_pairs = result.losses.view(-1, len(total)).mean(0) if len(total) else result.losses
        total = total + weight * of_pairs
        if rewards is None and LOSSES[name].takes != "tokens":
            rewards = result
    if pair_weights is not None:
        total = total * pair_weights
    rewards = result if rewards is None else rewards
    return PreferenceLoss(total, rewards.chosen_rewards, rewards.rejected_rewards)


def check_mixture(
    losses: Mapping[str, float], options: Mapping[str, Any], *, is_weighted: bool = False
) -> None:
    """Names of losses and of their options."""
    if not losses:
        raise ValueError(f"losses must name at least one of {', '.join(LOSSES)}")
    for name, weight in losses.items():
        if name not in LOSSES:
            raise ValueError(f"a loss must be out of {', '.join(LOSSES)}; got {name!r}")
        check_number(f"the weight of {name}", weight)
    for option in options:
        takers = [name for name, loss in LOSSES.items() if option in loss.options]
        if option not in _KNOWN_OPTIONS:
            raise TypeError(
                f"{option!r} is no option of any loss; there are {', '.join(_KNOWN_OPTIONS)}"
            )
        if not set(takers) & set(losses):
            raise ValueError(
                f"{option} is an option of {', '.join(takers)}, none of which is used here "
                f"({', '.join(losses)}); drop it"
            )
        if option == "f_divergence_type" and options[option] != "reverse_kl":
            misfits = sorted(set(losses) - {*takers, "sft"})
            if misfits:
                raise ValueError(
                    f"f_divergence_type={options[option]!r} fits losses of a margin of rewards "
                    f"alone, not {', '.join(misfits)}; leave it out"
                )
    sorting = [name for name in losses if LOSSES[name].sorts]
    if is_weighted and sorting:
        raise ValueError(
            f"weights of pairs do not fit {sorting[0]}, which sorts the batch: its losses are of "
            "ranks; leave out pair_weights, or use_weighting"
        )


def _single(
    name: str,
    chosen: SequenceLogps,
    rejected: SequenceLogps,
    ref_chosen: SequenceLogps | None,
    ref_rejected: SequenceLogps | None,
    beta: float,
    options: Mapping[str, Any],
) -> PreferenceLoss:
    loss = LOSSES[name]
    if loss.takes == "tokens":
        taken = {k: options[k] for k in loss.options if k in options}
        return loss.function(chosen.reduced_to("sum"), chosen.lengths, **taken)
    every = {**options, "beta": beta}
    every["chosen_lengths"], every["rejected_lengths"] = chosen.lengths, rejected.lengths
    sequences = [chosen, rejected]
    if loss.needs_reference:
        if ref_chosen is None or ref_rejected is None:
            raise ValueError(
                f"loss {name!r} needs the reference model's log-probabilities; pass them, or use "
                f"one without: {', '.join(n for n, x in LOSSES.items() if not x.needs_reference)}"
            )
        sequences += [ref_chosen, ref_rejected]
    logps = [sequence.reduced_to(loss.takes) for sequence in sequences]
    return loss.function(*logps, **{k: every[k] for k in loss.options if k in every})


def _checked_pair_weights(pair_weights: Tensor, chosen: SequenceLogps) -> Tensor:
    if not isinstance(pair_weights, Tensor) or pair_weights.shape != chosen.values.shape:
        got = getattr(pair_weights, "shape", type(pair_weights).__name__)
        raise ValueError(
            f"pair_weights must be a tensor {tuple(chosen.values.shape)}, one weight a pair, "
            f"got {got}"
        )
    return pair_weights.detach()
