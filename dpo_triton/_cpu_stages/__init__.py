"""The three stages for a CPU, compiled by numba; `dpo_triton.kernels` is their twin."""

from .combine import combine
from .grad import grad
from .partials import num_splits, partials

__all__ = ["combine", "grad", "num_splits", "partials"]
