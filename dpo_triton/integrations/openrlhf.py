"""OpenRLHF: `log_probs_from_logits`, which every trainer of it calls through its Actor, fused.

    import dpo_triton.integrations.openrlhf

    with dpo_triton.integrations.openrlhf.fused():  # or: undo = enable(); ...; undo()
        trainer.fit(args)

Its own scales `logits` in place when the temperature is not 1; here they keep their values. The
mask comes after this function, in its trainers, so rows of the prompt are scored too.
"""

from torch import Tensor

from ..seq_logprob import fused_token_logprob
from ._patching import Integration, Replacement

__all__ = ["enable", "fused", "log_probs_from_logits"]


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each label under `logits / temperature`, in nats.

    Args:
        logits: (B, T, V) or (N, V) floating; nothing is shifted: position t scores `labels[:, t]`.
        labels: (B, T) or (N,) int64; -100 gives 0, as in the flash-attn kernel that it calls.
        temperature: positive.

    Returns:
        (B, T) or (N,) float32, also for 16-bit logits; float64 for float64 ones.

    Raises:
        ValueError, TypeError, IndexError: those of `dpo_triton.fused_token_logprob`.

    Source: `models/utils.py` of OpenRLHF.
    """
    if logits.ndim == 2:
        return fused_token_logprob(logits[None], labels[None], temperature=temperature)[0]
    return fused_token_logprob(logits, labels, temperature=temperature)


_integration = Integration(
    framework="OpenRLHF",
    distribution="openrlhf",
    tested=("0.9.10", "0.10.4", "0.11.1", "0.11.2"),
    replacements=(
        Replacement("openrlhf.models.utils", "log_probs_from_logits", log_probs_from_logits),
    ),
)
enable = _integration.enable
fused = _integration.fused
