"""Preference losses from logits, or from hidden states and a head, in one call."""

from collections.abc import Sequence

from torch import Tensor
from typing_extensions import Unpack

from ._autograd import Logits, Options
from ._backends import BackendName
from ._head import Head
from ._pairs import DPOLossOutput, DPOMetrics, Objective, Pairs, Reference, pair_loss
from ._records import Scaling, Tokens
from .losses import Layout, LossName, LossOptions
from .seq_logprob import DistributionStat, Reduction

__all__ = ["DPOLossOutput", "DPOMetrics", "fused_dpo_loss", "fused_linear_dpo_loss"]


def fused_dpo_loss(
    policy_logits: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    ref_logps: Tensor | None = None,
    ref_reduction: Reduction | None = None,
    ref_logits: Tensor | None = None,
    loss_type: LossName | Sequence[LossName] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    rpo_alpha: float | None = None,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    layout: Layout = "concat",
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    stats: Sequence[DistributionStat] = (),
    inplace_backward: bool = False,
    backend: BackendName = "auto",
    **loss_options: Unpack[LossOptions],
) -> DPOLossOutput:
    """Preference loss of a batch of pairs, from logits: the mean over its B pairs.

    Each loss gets the sums or means that it takes (`dpo_triton.losses.LOSSES`), so a policy with
    the reference's logits has a sigmoid loss of exactly ln 2.

    Args:
        policy_logits: (2B, T, V), or (N, V) with `cu_seqlens`, as in `fused_seq_logprob`.
        labels, mask: (2B, T) or (N,), as in `fused_seq_logprob`.
        ref_logps: (2B,) log-probabilities of the same answers under the reference model, in the
            batch's order, with the same mask. Needs `ref_reduction`.
        ref_reduction: "sum" or "mean": what `ref_logps` are. Converted if the loss takes the other.
        ref_logits: the reference's logits in place of `ref_logps`, shape of policy_logits; no
            gradient is computed for them. Neither is needed for "sft", "simpo", "cpo", "orpo".
        loss_type: a name in `LOSSES`, or several, whose losses are added.
        loss_weights: of several losses, 1 each by default.
        beta: of every loss that has one; positive.
        rpo_alpha: adds this times the NLL of the chosen tokens.
        ld_alpha: LD-DPO's weight in [0, 1] of what an answer has beyond its pair's shorter one; it
            holds for every sum, mean and NLL. ref_logps must have been computed with it.
        use_weighting: WPO's weight of each pair, no gradient through it.
        layout: "concat", all chosen then all rejected; or "interleaved", chosen, rejected, chosen.
        stats: "entropy", "mean_logit", "top1", "log_sum_sq_probs" of the policy, as in
            `fused_seq_logprob`: their means over each answer's scored tokens go to the metrics.
        inplace_backward: the gradient overwrites policy_logits.
        loss_options: options of single losses, such as label_smoothing or f_divergence_type; the
            functions in `dpo_triton.losses` describe them. A loss that takes it gets it; one that
            none takes is an error. cpo and orpo count NLL over the batch's chosen tokens.
        shift, cu_seqlens, ignore_index, temperature, logit_scale, softcap, backend: as in
            `fused_seq_logprob`, of both models.

    Returns:
        `DPOLossOutput(loss, metrics)`. Without pairs (B = 0) the loss is 0.

    Raises:
        TypeError, ValueError: an argument that does not fit, a reference that is missing or that no
            loss uses.
        IndexError and others: as `fused_seq_logprob`.

    Source: Rafailov et al. 2023, arXiv:2305.18290, and those of the losses.
    """
    ref_source = None if ref_logits is None else Logits(ref_logits, False)
    return pair_loss(
        Logits(policy_logits, inplace_backward),
        Reference(ref_logps, ref_reduction, ref_source, "ref_logits"),
        Pairs(Tokens(labels, mask, cu_seqlens, shift, ignore_index), layout),
        Objective(loss_type, loss_weights, beta, rpo_alpha, ld_alpha, use_weighting, loss_options),
        Options(None, Scaling(temperature, logit_scale, softcap), stats, backend),
    )


def fused_linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_reduction: Reduction | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    loss_type: LossName | Sequence[LossName] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    rpo_alpha: float | None = None,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    layout: Layout = "concat",
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    stats: Sequence[DistributionStat] = (),
    tile_bytes: int | None = None,
    backend: BackendName = "auto",
    **loss_options: Unpack[LossOptions],
) -> DPOLossOutput:
    """`fused_dpo_loss` from hidden states and a head; logits never exist as a whole.

    Args:
        hidden: (2B, T, H), or (N, H) with `cu_seqlens`, as in `fused_linear_seq_logprob`.
        weight, bias: (V, H) and (V,) or None: the head.
        ref_hidden, ref_weight, ref_bias: the reference's, in place of `ref_logps`; no gradient is
            computed for them. They come together: no head is taken over from the policy, which
            trains its own.
        tile_bytes: as in `fused_linear_seq_logprob`.

    All else as in `fused_dpo_loss`.
    """
    if (ref_hidden is None) != (ref_weight is None):
        given, missing = "ref_hidden", "ref_weight"
        if ref_hidden is None:
            given, missing = missing, given
        raise ValueError(
            f"{given} is given without {missing}; pass both (a frozen head that both models share "
            "as ref_weight=weight.detach()), or ref_logps"
        )
    if ref_bias is not None and ref_weight is None:
        raise ValueError("ref_bias is given without ref_hidden and ref_weight; pass all, or none")

    ref_source = None
    if ref_hidden is not None and ref_weight is not None:
        ref_source = Head(ref_hidden, ref_weight, ref_bias, tile_bytes)
    return pair_loss(
        Head(hidden, weight, bias, tile_bytes),
        Reference(ref_logps, ref_reduction, ref_source, "ref_hidden and ref_weight"),
        Pairs(Tokens(labels, mask, cu_seqlens, shift, ignore_index), layout),
        Objective(loss_type, loss_weights, beta, rpo_alpha, ld_alpha, use_weighting, loss_options),
        Options(None, Scaling(temperature, logit_scale, softcap), stats, backend),
    )
