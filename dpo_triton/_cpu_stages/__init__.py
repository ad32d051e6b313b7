"""The three stages for a CPU, compiled by numba; `dpo_triton.kernels` is their twin.

A file each, with the loops over rows and what calls them.
"""

from .._torch_stages import num_splits
from .check import check
from .combine import combine
from .grad import grad
from .partials import partials

__all__ = ["check", "combine", "grad", "num_splits", "partials"]
