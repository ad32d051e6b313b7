"""A reference model's log-probabilities of a whole data set, scored once and kept in a file."""

from ._fingerprints import model_fingerprint, tokenizer_fingerprint
from ._precompute import collate, collate_pairs, precompute_ref_logps, score_pairs
from ._ref_file import RefLogps

__all__ = [
    "RefLogps",
    "collate",
    "collate_pairs",
    "model_fingerprint",
    "precompute_ref_logps",
    "score_pairs",
    "tokenizer_fingerprint",
]
