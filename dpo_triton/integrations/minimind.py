"""MiniMind's DPO loss, with its own names and argument orders, and the same loss fused.

MiniMind (jingyaogong/minimind, `trainer/train_dpo.py`) has had four versions of it, which differ in
what stands for a sequence of T tokens with log-probabilities p and mask m:

    v1  2025-02-09  sum_t m_t p_t / T, the padded length
    v2  2025-04-01  sum_t m_t p_t / sum_t m_t
    v3  2025-10-26  the same, and 0 for a row whose mask is 0 throughout; the default here
    v4  2026-03-24  sum_t m_t p_t

In all, rows 0..B-1 are chosen and B..2B-1 rejected, and the loss is the mean over the pairs of
`-logsigmoid(beta * ((w - l) - (ref_w - ref_l)))`. MiniMind's v2 gives NaN, and NaN gradients, as
soon as one row is empty; here an empty row counts as 0 in every version, so v2 is v3.

In `train_dpo.py`, in place of its two functions:

    from dpo_triton.integrations.minimind import dpo_loss, logits_to_log_probs

or, without log-probabilities of every token, in place of the calls of both:

    dpo_loss_val = fused_dpo_loss(ref_logits, logits, y, mask, beta=beta)
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backends import BackendName
from ..seq_logprob import fused_seq_logprob, fused_token_logprob

__all__ = [
    "dpo_loss",
    "dpo_loss_v1",
    "dpo_loss_v2",
    "dpo_loss_v3",
    "dpo_loss_v4",
    "fused_dpo_loss",
    "logits_to_log_probs",
    "logits_to_probs",
]

Version = Literal["v1", "v2", "v3", "v4"]
VERSIONS = get_args(Version)


def logits_to_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label, in nats: (2B, T) float32 (float64 for float64 logits).

    Args:
        logits: (2B, T, V) floating; nothing is shifted: position t scores `labels[:, t]`.
        labels: (2B, T) int64. Every one is scored, also where the loss will mask it:
            `fused_dpo_loss` reads only what counts.

    Raises:
        ValueError, TypeError, IndexError: those of `dpo_triton.fused_token_logprob`.
    """
    return fused_token_logprob(logits, labels)


logits_to_probs = logits_to_log_probs  # its name in v1 and v2


def dpo_loss_v1(ref_probs: Tensor, probs: Tensor, mask: Tensor, beta: float) -> Tensor:
    """The loss of v1, sums over the padded length; arguments of `dpo_loss_v3`."""
    return _loss_of_tokens(ref_probs, probs, mask, beta, "v1")


def dpo_loss_v2(ref_probs: Tensor, probs: Tensor, mask: Tensor, beta: float) -> Tensor:
    """The loss of v2, means over the mask; arguments of `dpo_loss_v3`, and its empty rows: 0."""
    return _loss_of_tokens(ref_probs, probs, mask, beta, "v2")


def dpo_loss_v3(
    ref_log_probs: Tensor, policy_log_probs: Tensor, mask: Tensor, beta: float
) -> Tensor:
    """The loss of v3, means over the mask.

    Args:
        ref_log_probs: (2B, T), the reference's; no gradient goes there.
        policy_log_probs: (2B, T), the policy's.
        mask: (2B, T) bool, integer or floating weights; holes and rows of zeros are fine, and what
            stands in the log-probabilities there is not read.
        beta: factor of the margin; MiniMind's is 0.1.

    Returns:
        () float32 (float64 for float64 log-probabilities).

    Raises:
        ValueError: shapes that differ, or an odd number of rows.
    """
    return _loss_of_tokens(ref_log_probs, policy_log_probs, mask, beta, "v3")


def dpo_loss_v4(
    ref_log_probs: Tensor, policy_log_probs: Tensor, mask: Tensor, beta: float
) -> Tensor:
    """The loss of v4, sums without normalisation; arguments of `dpo_loss_v3`, beta 0.15."""
    return _loss_of_tokens(ref_log_probs, policy_log_probs, mask, beta, "v4")


dpo_loss = dpo_loss_v3


def fused_dpo_loss(
    ref_logits: Tensor,
    policy_logits: Tensor,
    labels: Tensor,
    mask: Tensor,
    beta: float,
    *,
    version: Version = "v3",
    inplace_backward: bool = False,
    backend: BackendName = "auto",
) -> Tensor:
    """The same loss from logits: only rows that the mask counts are read.

    Args:
        ref_logits: (2B, T, V) floating, the reference's; no gradient goes there.
        policy_logits: (2B, T, V) floating, the policy's. Rows 0..B-1 are chosen, B..2B-1 rejected.
        labels: (2B, T) int64; nothing is shifted: position t scores `labels[:, t]`.
        mask: (2B, T) bool, integer or floating weights; holes and rows of zeros are fine.
        beta: factor of the margin; MiniMind's is 0.1, in v4 0.15.
        version: which of MiniMind's: "v1", "v2", "v3" or "v4".
        inplace_backward: the backward pass writes the gradient over policy_logits.
        backend: see `dpo_triton.fused_seq_logprob`.

    Returns:
        () float32 (float64 for float64 logits). Policy logits equal to the reference's: ln 2.

    Raises:
        ValueError: an unknown version, an odd number of rows.
        ValueError, TypeError, IndexError, RuntimeError: those of `dpo_triton.fused_seq_logprob`.

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7, with MiniMind's sequence values.
    """
    if version not in VERSIONS:
        raise ValueError(f'version must be "v1", "v2", "v3" or "v4", got {version!r}')

    def values(logits: Tensor, inplace_backward: bool) -> Tensor:
        value = fused_seq_logprob(
            logits,
            labels,
            mask,
            reduction="mean" if version in ("v2", "v3") else "sum",
            inplace_backward=inplace_backward,
            backend=backend,
        )
        return value / max(1, labels.shape[1]) if version == "v1" else value

    with torch.no_grad():
        ref_values = values(ref_logits, False)
    return _loss(ref_values, values(policy_logits, inplace_backward), beta)


def _loss_of_tokens(
    ref_log_probs: Tensor, log_probs: Tensor, mask: Tensor, beta: float, version: Version
) -> Tensor:
    loss = _loss(_values(ref_log_probs, mask, version), _values(log_probs, mask, version), beta)
    return loss.to(torch.promote_types(log_probs.dtype, torch.float32))


def _values(log_probs: Tensor, mask: Tensor, version: Version) -> Tensor:
    """(2B,) float64: the sequences' values from those of their tokens."""
    if mask.shape != log_probs.shape or log_probs.ndim != 2:
        raise ValueError(
            f"log-probabilities and mask must both be (2B, T), got {tuple(log_probs.shape)} and "
            f"{tuple(mask.shape)}; of (2B, T, V) logits take logits_to_log_probs(logits, labels)"
        )
    weights = mask.double()
    # A product with 0 would let NaN and inf through, in the value or in the gradient.
    total = (torch.where(mask != 0, log_probs, 0.0) * weights).sum(1)
    if version == "v1":
        return total / max(1, mask.shape[1])
    if version == "v4":
        return total
    is_empty = (mask == 0).all(1)
    return total / torch.where(is_empty, 1.0, weights.sum(1))


def _loss(ref_values: Tensor, values: Tensor, beta: float) -> Tensor:
    """Mean over the pairs, chosen rows first; 0 without a pair."""
    if ref_values.shape != values.shape or len(values) % 2:
        raise ValueError(
            "policy and reference must have the same even number of rows, the chosen ones and then "
            f"the rejected ones, got {len(values)} and {len(ref_values)}"
        )
    logratios = values - ref_values.detach()
    batch = len(values) // 2
    losses = -F.logsigmoid(beta * (logratios[:batch] - logratios[batch:]))
    return losses.sum() / max(1, len(losses))
