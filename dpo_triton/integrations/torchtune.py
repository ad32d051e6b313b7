"""torchtune: `rlhf.get_batch_log_probs` of its DPO recipes and `rlhf.logits_to_logprobs`, fused.

    import dpo_triton.integrations.torchtune

    with dpo_triton.integrations.torchtune.fused():  # or: undo = enable(); ...; undo()
        recipe.train()

Its PPO recipes call the second; they mask afterwards, so that each token is scored.
"""

import torch
from torch import Tensor

from ..seq_logprob import fused_seq_logprob, fused_token_logprob
from ._patching import Integration, Replacement

__all__ = ["enable", "fused", "get_batch_log_probs", "logits_to_logprobs"]


def get_batch_log_probs(
    logits: Tensor,
    labels: Tensor,
    label_pad_token_id: int = -100,
    return_average_logprobs: bool = False,
) -> Tensor:
    """Sum, or mean, of the log-probabilities of each label sequence, in nats.

    Args:
        logits: (B, T, V) floating; position t scores `labels[:, t + 1]`.
        labels: (B, T) int64; a token of `label_pad_token_id` counts for nothing.
        label_pad_token_id: that label.
        return_average_logprobs: divide by the number of scored tokens.

    Returns:
        (B,) float32, float64 for float64 logits; 0 for a sequence without a scored token.

    Raises:
        ValueError, TypeError, IndexError: those of `dpo_triton.fused_seq_logprob`.

    Source: `torchtune/rlhf/sequence_processing.py`.
    """
    return fused_seq_logprob(
        logits,
        labels,
        reduction="mean" if return_average_logprobs else "sum",
        shift=True,
        ignore_index=label_pad_token_id,
    )


def logits_to_logprobs(logits: Tensor, sequences: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token under `logits / temperature`, in nats.

    Args:
        logits: (B, T, V) floating; nothing is shifted: position t scores `sequences[:, t]`.
        sequences: (B, T) int64 token ids, each of which is scored.
        temperature: positive.

    Returns:
        (B, T) float32, also for 16-bit logits; float64 for float64 ones.

    Raises:
        ValueError, TypeError, IndexError: those of `dpo_triton.fused_token_logprob`.

    Source: `torchtune/rlhf/sequence_processing.py`.
    """
    every_id = torch.iinfo(torch.int32).min  # no label means "ignore me" here: -100 is an error
    return fused_token_logprob(logits, sequences, temperature=temperature, ignore_index=every_id)


_integration = Integration(
    framework="torchtune",
    distribution="torchtune",
    tested=("0.5.0", "0.6.0", "0.6.1"),
    replacements=(
        Replacement(
            "torchtune.rlhf.sequence_processing", "get_batch_log_probs", get_batch_log_probs
        ),
        Replacement("torchtune.rlhf.sequence_processing", "logits_to_logprobs", logits_to_logprobs),
    ),
)
enable = _integration.enable
fused = _integration.fused
