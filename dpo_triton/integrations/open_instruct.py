"""open-instruct: `calculate_per_token_logps` of its DPO trainers, fused.

    import dpo_triton.integrations.open_instruct

    with dpo_triton.integrations.open_instruct.fused():  # or: undo = enable(); ...; undo()
        dpo.main(args, tc)

What it does with them is its own: its padded `dpo_norm` divides by the number of scored tokens,
which is 0 / 0 for an empty answer.
"""

import torch.nn.functional as F
from torch import Tensor

from ..seq_logprob import fused_token_logprob
from ._patching import Integration, Replacement

__all__ = ["calculate_per_token_logps", "enable", "fused"]


def calculate_per_token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each next label, in nats, aligned with logits.

    Args:
        logits: (B, T, V) floating; packed sequences are one row of them.
        labels: (B, T) int64; -100 is not scored, and stands first in each packed sequence.

    Returns:
        (B, T) float32, float64 for float64 logits: `[b, t]` is that of `labels[b, t + 1]`, 0 where
        that is not scored and in the last column.

    Raises:
        ValueError, TypeError, IndexError: those of `dpo_triton.fused_token_logprob`.

    Source: `open_instruct/padding_free_collator.py`.
    """
    token_logps = fused_token_logprob(logits, labels, shift=True)
    return F.pad(token_logps[:, 1:], (0, min(1, labels.shape[1])))


# It has no releases: its version is that of the git tag before the commit.
_integration = Integration(
    framework="open-instruct",
    distribution="open-instruct",
    tested=("0.3.1",),
    replacements=(
        Replacement(
            "open_instruct.padding_free_collator",
            "calculate_per_token_logps",
            calculate_per_token_logps,
        ),
    ),
)
enable = _integration.enable
fused = _integration.fused
