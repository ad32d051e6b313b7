"""Log-probabilities of label sequences for preference optimisation, in one pass over the logits."""

from . import reference
from .seq_logprob import fused_seq_logprob, fused_token_logprob

__all__ = ["fused_seq_logprob", "fused_token_logprob", "reference"]
__version__ = "0.1.0"
