"""The stages called one by one, with room made for what they write."""

from collections.abc import Sequence

from torch import Tensor

from dpo_triton._backends import backend_named
from dpo_triton._records import Columns, Combined, Partials, Scaling, Tokens, sum_dtype

PLAIN = Scaling(1.0, 1.0, None)


def tokens_of(
    labels: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = False,
) -> Tokens:
    return Tokens(labels, mask, cu_seqlens, shift, -100)


def run_partials(
    backend: str,
    logits: Tensor,
    tokens: Tokens,
    columns: Columns | None = None,
    scaling: Scaling = PLAIN,
    stats: Sequence[str] = (),
) -> Partials:
    stages = backend_named(backend)
    columns = columns or Columns.all_of(logits.shape[-1])
    splits, dtype = stages.num_splits(columns.width), sum_dtype(logits.dtype)
    out = Partials.empty(tokens, columns, splits, len(stats), dtype)
    stages.partials(logits, tokens, columns, scaling, stats, out)
    return out


def run_combine(
    backend: str,
    partials: Partials,
    reduction: str,
    vocab_size: int,
    scaling: Scaling = PLAIN,
    stats: Sequence[str] = (),
) -> Combined:
    num_sequences = 0 if reduction == "none" else partials.weights.shape[0]
    out = Combined.empty(partials.weights, num_sequences, len(stats))
    backend_named(backend).combine(partials, None, reduction, vocab_size, scaling, stats, out)
    return out
