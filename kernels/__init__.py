"""The three stages as Triton kernels, a file each with its launcher.

Imported as `dpo_triton.kernels` and under no other name (PyPI's `kernels` package owns the
top-level one). Nothing here checks its inputs: the callers in `dpo_triton` have.
"""

from .combine import combine
from .grad import grad
from .partials import num_splits, partials

__all__ = ["combine", "grad", "num_splits", "partials"]
