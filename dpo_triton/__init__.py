"""Log-probabilities of label sequences for preference optimisation, in one pass over the logits."""

from . import losses, nn, reference
from ._records import VocabShard
from ._version import __version__
from .dpo_loss import DPOLossOutput, DPOMetrics, fused_dpo_loss, fused_linear_dpo_loss
from .linear import fused_linear_seq_logprob, fused_linear_token_logprob
from .model import seq_logprob_from_model
from .seq_logprob import fused_seq_logprob, fused_token_logprob

__all__ = [
    "DPOLossOutput",
    "DPOMetrics",
    "VocabShard",
    "__version__",
    "fused_dpo_loss",
    "fused_linear_dpo_loss",
    "fused_linear_seq_logprob",
    "fused_linear_token_logprob",
    "fused_seq_logprob",
    "fused_token_logprob",
    "losses",
    "nn",
    "reference",
    "seq_logprob_from_model",
]
