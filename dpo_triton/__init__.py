"""Log-probabilities of label sequences for preference optimisation, in one pass over the logits."""

from . import reference
from ._version import __version__
from .seq_logprob import fused_seq_logprob, fused_token_logprob

__all__ = ["__version__", "fused_seq_logprob", "fused_token_logprob", "reference"]
