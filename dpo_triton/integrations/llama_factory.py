"""LLaMA-Factory: `get_batch_logps` of its DPO and KTO trainers, fused.

    import dpo_triton.integrations.llama_factory

    with dpo_triton.integrations.llama_factory.fused():  # or: undo = enable(); ...; undo()
        run_exp(args)

ORPO, SimPO and IPO divide by the returned length in its trainer: an empty answer is 0 / 0 there.
"""

import torch
from torch import Tensor

from ..seq_logprob import fused_seq_logprob
from ._patching import Integration, Replacement

__all__ = ["enable", "fused", "get_batch_logps"]


def get_batch_logps(
    logits: Tensor, labels: Tensor, label_pad_token_id: int = -100, ld_alpha: float | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of each sequence's log-probabilities, in nats, and its number of scored tokens.

    Args:
        logits: (B, T, V) floating; position t scores `labels[:, t + 1]`.
        labels: (B, T) int64; a token of `label_pad_token_id` counts for nothing.
        label_pad_token_id: that label.
        ld_alpha: weight of the tokens by which an answer is longer than the other of its pair, by
            position from its first scored token; None: 1. Rows are B/2 chosen, then B/2 rejected.

    Returns:
        (B,) float32, float64 for float64 logits, 0 for a sequence without a scored token; and (B,)
        int64.

    Raises:
        ValueError, TypeError, IndexError: those of `dpo_triton.fused_seq_logprob`, and an odd
        number of rows with `ld_alpha`.

    Source: `train/trainer_utils.py` of LLaMA-Factory; `ld_alpha`: LD-DPO, arXiv:2409.06411.
    """
    is_scored = labels != label_pad_token_id
    is_scored[:, :1] = False  # no logits come before the first label
    lengths = is_scored.sum(1)
    mask = is_scored if ld_alpha is None else _ld_weights(is_scored, lengths, ld_alpha)
    logps = fused_seq_logprob(
        logits, labels, mask, reduction="sum", shift=True, ignore_index=label_pad_token_id
    )
    return logps, lengths


def _ld_weights(is_scored: Tensor, lengths: Tensor, ld_alpha: float) -> Tensor:
    """(B, T) float32: 1 up to the length of the shorter answer of the pair, then ld_alpha."""
    if len(lengths) % 2:
        raise ValueError(
            f"labels must have an even number of rows with ld_alpha, chosen then rejected, got "
            f"{len(lengths)}; pass ld_alpha=None for rows that are not pairs"
        )
    shorter = lengths.view(2, -1).amin(0).repeat(2)
    first = is_scored.int().argmax(1)
    position = torch.arange(is_scored.shape[1], device=is_scored.device)
    is_shared = position < (first + shorter)[:, None]
    weights = is_scored.float()
    return torch.where(is_shared, weights, ld_alpha * weights)


_integration = Integration(
    framework="LLaMA-Factory",
    distribution="llamafactory",
    tested=("0.9.3", "0.9.4", "0.9.5"),
    replacements=(
        Replacement("llamafactory.train.trainer_utils", "get_batch_logps", get_batch_logps),
    ),
)
enable = _integration.enable
fused = _integration.fused
