"""Preference pairs from files, as tokens on disk: read, checked and tokenised once.

    from dpo_triton.data import tokenise_files

    rows = tokenise_files(["pairs.jsonl.gz"], "tokens", tokenizer, max_length=512)
    rows[0]["prompt_ids"], rows[0]["chosen_ids"], rows[0]["rejected_ids"]

The rows are what `dpo_triton.precompute` takes. A tokenizer is one of transformers.
"""

from ._files import file_hash, tokenise_files
from ._formats import Message, Pair, Text, parse_pair
from ._reading import read_pairs, read_texts
from ._store import Report, TokenRows
from ._tokenising import PairTokenizer, Row

__all__ = [
    "Message",
    "Pair",
    "PairTokenizer",
    "Report",
    "Row",
    "Text",
    "TokenRows",
    "file_hash",
    "parse_pair",
    "read_pairs",
    "read_texts",
    "tokenise_files",
]
