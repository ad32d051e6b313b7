"""The three stages in PyTorch, for CPUs and for any device without Triton; `dpo_triton.kernels` is
their twin.

Rows that are scored go through a buffer that stays in cache, several at a time; the others are
never touched. A row's bits are its own: every step is elementwise, or a sum along one row in an
order that follows from the vocabulary alone.
"""

from .combine import combine
from .grad import grad
from .partials import num_splits, partials

__all__ = ["combine", "grad", "num_splits", "partials"]
