"""Whether labels lie in the vocabulary: counted here, said by `_checks`."""

from torch import Tensor

from .._checks import check_values
from .._records import Tokens
from ._compiled import compiled
from ._numbers import view
from ._rows import ELEMENTS, int64


@compiled
def num_outside(num_tokens, labels, weights, vocab_size, like):
    """How many labels of non-zero weight are outside; weights have the type of `like`."""
    labels, weights = view(labels, num_tokens, 0), view(weights, num_tokens, like)
    count = 0
    for n in range(num_tokens):
        count += weights[n] != 0 and not 0 <= labels[n] < vocab_size
    return count


def check(tokens: Tokens, weights: Tensor, vocab_size: int) -> None:
    """Raise an error of wrong labels, or of wrong cu_seqlens."""
    labels = int64(tokens.labels)
    inputs = (labels.data_ptr(), weights.data_ptr(), vocab_size, ELEMENTS[weights.dtype])
    if tokens.cu_seqlens is not None or num_outside(labels.numel(), *inputs) > 0:
        check_values(tokens, weights, vocab_size)
