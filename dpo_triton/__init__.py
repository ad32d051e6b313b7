"""Log-probabilities of label sequences for preference optimisation, in one pass over the logits."""

from . import reference
from ._version import __version__
from .linear import fused_linear_seq_logprob, fused_linear_token_logprob
from .model import seq_logprob_from_model
from .seq_logprob import fused_seq_logprob, fused_token_logprob

__all__ = [
    "__version__",
    "fused_linear_seq_logprob",
    "fused_linear_token_logprob",
    "fused_seq_logprob",
    "fused_token_logprob",
    "reference",
    "seq_logprob_from_model",
]
