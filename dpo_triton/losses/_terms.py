"""Inputs of the losses, checked, and the functions that several of them use."""

import math
import sys
from numbers import Real
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
F_DIVERGENCES = get_args(FDivergence)


class PreferenceLoss(NamedTuple):
    """What every loss returns."""

    losses: Tensor  # (B,), differentiable; their mean is what one trains on
    chosen_rewards: Tensor  # (B,) detached: beta * log-ratio, in the unit that the loss compares
    rejected_rewards: Tensor  # (B,) detached


def log_ratios(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    paired: bool = True,
) -> tuple[Tensor, Tensor]:
    """`chosen_logps - ref_chosen_logps` and the same of the rejected, in at least float32."""
    check_logps(chosen_logps=chosen_logps, ref_chosen_logps=ref_chosen_logps)
    check_logps(rejected_logps=rejected_logps, ref_rejected_logps=ref_rejected_logps)
    if paired:
        check_logps(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    check_constant(ref_chosen_logps=ref_chosen_logps, ref_rejected_logps=ref_rejected_logps)
    c = wide(chosen_logps) - wide(ref_chosen_logps)
    r = wide(rejected_logps) - wide(ref_rejected_logps)
    return c, r


def wide(logps: Tensor) -> Tensor:
    """16-bit values in float32: a difference of two sums has no digits left in 16 bits."""
    return logps.to(torch.promote_types(logps.dtype, torch.float32))


def with_rewards(losses: Tensor, beta: float, chosen: Tensor, rejected: Tensor) -> PreferenceLoss:
    """The losses, with the rewards of log-ratios."""
    return PreferenceLoss(losses, (beta * chosen).detach(), (beta * rejected).detach())


def smoothed_logistic(x: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of the odds x with a label that is wrong with probability label_smoothing."""
    return -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)


def divergence_scores(
    logratios: Tensor,
    f_divergence_type: FDivergence,
    f_alpha_divergence_coef: float,
    lengths: Tensor | None = None,
) -> Tensor:
    """f'(policy / reference) up to a constant, of the whole answer: the log-ratio for reverse KL.

    With lengths (B,), logratios and scores are means over the answer's tokens; the divergence is
    still that of its sum.

    Source: Wang et al. 2023, arXiv:2309.16240.
    """
    if f_divergence_type == "reverse_kl":
        return logratios
    sums = logratios if lengths is None else logratios * lengths
    if f_divergence_type == "js_divergence":
        scores = math.log(2) + F.logsigmoid(sums)
    elif f_divergence_type == "forward_kl":
        scores = power_score(sums, -1.0)
    else:
        scores = power_score(sums, f_alpha_divergence_coef - 1)
    return scores if lengths is None else scores / at_least_one_token(lengths)


def power_score(log_u: Tensor, exponent: float) -> Tensor:
    """`(u ** exponent - 1) / exponent` and its limit log u: forward KL, alpha and AlphaPO.

    The power is bounded such that its square, and that square's gradient in a loss that is scaled
    by 65536, stay finite: IPO squares it.
    """
    if abs(exponent) < 1e-30:
        # The limit. The factor is 1 to the last bit; without it a symbol of torch.compile would be
        # used in one graph and not in the other, and from then on be a constant.
        return log_u * (1 + exponent)
    bound = math.log(torch.finfo(log_u.dtype).max) / 2 - 8
    return torch.expm1((exponent * log_u).clamp(max=bound)) / exponent


def at_least_one_token(lengths: Tensor) -> Tensor:
    """The divisor of an answer's sum; that of an empty answer is 0, whatever it is divided by."""
    return lengths.masked_fill(lengths == 0, 1)


def check_logps(**named: Tensor) -> None:
    """Floating tensors (B,), of one shape and device."""
    (first_name, first), *_ = named.items()
    for name, logps in named.items():
        if not isinstance(logps, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(logps).__name__}")
        if not logps.dtype.is_floating_point:
            raise TypeError(
                f"{name} must be floating, got {logps.dtype}; "
                "pass log-probabilities, such as fused_seq_logprob returns"
            )
        if logps.ndim != 1:
            raise ValueError(
                f"{name} must be (B,), one value an answer, got {tuple(logps.shape)}; "
                "sum over the tokens, or flatten"
            )
        if logps.shape != first.shape:
            raise ValueError(
                f"{name} must have the shape of {first_name}, {tuple(first.shape)}, got "
                f"{tuple(logps.shape)}; chosen and rejected are the halves of a batch of pairs"
            )
        if logps.device != first.device:
            raise ValueError(
                f"{name} must be on the device of {first_name}, {first.device}, got "
                f"{logps.device}; pass {name}.to({first_name}.device)"
            )


def check_constant(**named: Tensor) -> None:
    """Tensors through which no gradient may flow."""
    for name, tensor in named.items():
        if tensor.requires_grad:
            raise ValueError(
                f"{name} must not require a gradient; compute it under torch.no_grad(), or pass "
                f"{name}.detach()"
            )


def check_lengths(chosen_logps: Tensor, **named: Tensor | None) -> None:
    """Numbers of scored tokens, (B,)."""
    for name, lengths in named.items():
        if lengths is None:
            raise ValueError(
                f"{name} is needed here: (B,), the number of scored tokens of each answer; pass "
                'what fused_seq_logprob(..., stats=("lengths",)) returns'
            )
        if not isinstance(lengths, Tensor) or lengths.shape != chosen_logps.shape:
            got = tuple(lengths.shape) if isinstance(lengths, Tensor) else type(lengths).__name__
            raise ValueError(
                f"{name} must be a tensor of the shape of chosen_logps, "
                f"{tuple(chosen_logps.shape)}, got {got}; it holds one number of tokens an answer"
            )
        check_constant(**{name: lengths})


def check_number(name: str, value: float) -> float:
    """A finite number, which is returned as Python's: NumPy's compute in their own 16 or 32 bits.

    Under torch.compile it is a symbol if it changes from call to call. A comparison of it becomes a
    guard, but for one with infinity, which sympy takes for true. `math.isfinite` or an f-string
    would make it a constant, and each value a new graph.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"{name} must be a number, got {type(value).__name__}; of a tensor or an array pass "
            ".item(), which waits for the device"
        )
    if not isinstance(value, (int, float)):
        value = float(value)
    if not -sys.float_info.max <= value <= sys.float_info.max:
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def check_beta(beta: float) -> float:
    """A positive number, returned as Python's."""
    beta = check_number("beta", beta)
    if beta <= 0:
        raise ValueError(
            f"beta must be positive, got {beta}; with 0 nothing is learnt, and below 0 the "
            "rejected answer is preferred: exchange chosen and rejected instead"
        )
    return beta


def check_f_divergence(f_divergence_type: str, f_alpha_divergence_coef: float) -> float:
    """A known divergence; alpha is returned as Python's number."""
    if f_divergence_type not in F_DIVERGENCES:
        raise ValueError(
            f"f_divergence_type must be out of {', '.join(F_DIVERGENCES)}, "
            f"got {f_divergence_type!r}"
        )
    return check_number("f_alpha_divergence_coef", f_alpha_divergence_coef)


def check_label_smoothing(label_smoothing: float, *, above_zero: bool = False) -> float:
    """A share below one half, returned as Python's number."""
    label_smoothing = check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing must be in [0, 0.5), got {label_smoothing}; it is the share of wrong "
            "labels: at 0.5 they say nothing, beyond it exchange chosen and rejected"
        )
    if above_zero and label_smoothing == 0:
        raise ValueError(
            "label_smoothing must be above 0 for exo_pair, whose target distribution has its "
            "logarithm, got 0; the paper uses 1e-3"
        )
    return label_smoothing
