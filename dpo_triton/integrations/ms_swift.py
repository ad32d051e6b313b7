"""ms-swift: `get_per_token_logps` of its DPO and KTO trainers, fused.

    import dpo_triton.integrations.ms_swift

    with dpo_triton.integrations.ms_swift.fused():  # or: undo = enable(); ...; undo()
        rlhf_main(args)

Its CPO, ORPO and SimPO trainers take theirs from TRL, and its GRPO trainer calls another function.
"""

from typing import Any

from torch import Tensor

from ..seq_logprob import fused_token_logprob
from ._patching import Integration, Replacement

__all__ = ["enable", "fused", "get_per_token_logps"]


def get_per_token_logps(
    self: Any,
    logits: Tensor,
    labels: Tensor,
    label_pad_token_id: int = -100,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each label, in nats, its logits reduced over the vocabulary, and the mask.

    Args:
        self: the trainer; only `self.template.sequence_parallel_size` is read.
        logits: (B, T, V) floating; nothing is shifted: position t scores `labels[:, t]`.
        labels: (B, T) int64; a token of `label_pad_token_id` is not scored.
        label_pad_token_id: that label.
        reduction: "mean" or "sum" of the logits over the vocabulary, which the trainers log.

    Returns:
        (B, T) float32 log-probabilities (float64 for float64 logits) and reduced logits, without a
        gradient, both 0 where not scored; and (B, T) bool, what is scored.

    Raises:
        ValueError: another reduction.
        NotImplementedError: sequence parallelism, which gathers log-probabilities over ranks.
        ValueError, TypeError, IndexError: those of `dpo_triton.fused_token_logprob`.

    Source: `rlhf_trainers/rlhf_mixin.py` of ms-swift.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')
    if self.template.sequence_parallel_size != 1:
        raise NotImplementedError(
            "get_per_token_logps of dpo_triton needs sequence_parallel_size 1, got "
            f"{self.template.sequence_parallel_size}; train without sequence parallelism, or call "
            "the undo of enable()"
        )
    token_logps, stats = fused_token_logprob(
        logits, labels, ignore_index=label_pad_token_id, stats=("mean_logit",)
    )
    reduced = stats["mean_logit"]
    if reduction == "sum":
        reduced = reduced * logits.shape[-1]
    return token_logps, reduced, labels != label_pad_token_id


_integration = Integration(
    framework="ms-swift",
    distribution="ms-swift",
    tested=("4.0.4", "4.3.2", "4.5.3", "4.6.0"),
    replacements=(
        Replacement(
            "swift.rlhf_trainers.rlhf_mixin:RLHFTrainerMixin",
            "get_per_token_logps",
            get_per_token_logps,
        ),
    ),
)
enable = _integration.enable
fused = _integration.fused
