"""How far results are from float64 on the same inputs."""

import math

import torch
from torch import Tensor


def relative_error(grad: Tensor, truth: Tensor) -> float:
    """Largest absolute error of a gradient's first elements, relative to the largest element."""
    grad = grad.detach()[: len(truth)]  # it may be the leaf itself
    errors = [(g - t).abs().max() for g, t in zip(grad.split(4096), truth.split(4096), strict=True)]
    return float(torch.stack(errors).max() / truth.abs().max())


def rounding(x: Tensor, dtype: torch.dtype) -> float:
    """Half a unit in the last place of the largest element of x, stored as dtype."""
    _, exponent = math.frexp(float(x.abs().max()))  # largest = m * 2 ** exponent, 0.5 <= m < 1
    return math.ldexp(torch.finfo(dtype).eps / 2, exponent - 1)


def relative_rounding(x: Tensor, dtype: torch.dtype) -> float:
    """The same, relative to that element."""
    return rounding(x, dtype) / float(x.abs().max())
