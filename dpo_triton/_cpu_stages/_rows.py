"""What the loops take of tensors and options."""

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._checks import TOKEN_STATS
from .._records import Scaling, Stats

# A zero of each type of logits: in the loops bfloat16 is uint16, and float16 is int16.
ELEMENTS: dict[torch.dtype, Any] = {
    torch.bfloat16: np.uint16(0),
    torch.float16: np.int16(0),
    torch.float32: np.float32(0),
    torch.float64: np.float64(0),
}
ENTROPY, MEAN_LOGIT, TOP1, LOG_SUM_SQ_PROBS = 1, 2, 4, 8  # in the order of the partials' channels
FLAGS = dict(zip(TOKEN_STATS, (ENTROPY, MEAN_LOGIT, TOP1, LOG_SUM_SQ_PROBS), strict=True))


def real(x: float, dtype: torch.dtype) -> Any:
    return np.float64(x) if dtype == torch.float64 else np.float32(x)


def contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Itself if it is: two operators that change nothing take longer than a small loop."""
    return x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous()


def int64(x: Tensor) -> Tensor:
    return contiguous(x, torch.int64)


def flags(stats: Stats) -> int | None:
    """None without stats: a type of its own, for which loops are compiled without theirs."""
    return sum(FLAGS[name] for name in stats) or None


class Numbers(NamedTuple):
    """Those of a Scaling, as numbers of the type that sums are in."""

    exponent_scale: Any  # which all three stages must use
    slope: Any
    logit_scale: Any
    softcap: Any  # None without one

    @property
    def of_cap(self) -> tuple[Any, Any]:
        return self.logit_scale, self.softcap


@functools.lru_cache(64)  # to make them takes as long as a small loop
def numbers(scaling: Scaling, dtype: torch.dtype) -> Numbers:
    return Numbers(
        real(scaling.exponent_scale, dtype),
        real(scaling.slope, dtype),
        real(scaling.logit_scale, dtype),
        None if scaling.softcap is None else real(scaling.softcap, dtype),
    )
