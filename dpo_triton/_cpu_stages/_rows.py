"""What the loops take of tensors and options."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# A number of each type of logits: in the loops bfloat16 is uint16, and float16 is int16.
ELEMENTS = {
    torch.bfloat16: np.uint16(0),
    torch.float16: np.int16(0),
    torch.float32: np.float32(0),
    torch.float64: np.float64(0),
}
REAL = {torch.float32: np.float32, torch.float64: np.float64}
FLAGS = {"entropy": 1, "mean_logit": 2, "top1": 4, "log_sum_sq_probs": 8}


def as_int64(x: Tensor) -> Tensor:
    """Contiguous: itself, if it is."""
    return x.to(torch.int64).contiguous()


def flags(stats: Sequence[str]) -> int:
    return sum(FLAGS[name] for name in stats)


def exponent_scale(
    temperature: float, logit_scale: float, softcap: float | None, dtype: torch.dtype
) -> Any:
    """Slope of z in u over ln 2, as a number of dtype: all three stages must use the same."""
    slope = (1.0 if softcap is not None else logit_scale) / temperature
    return REAL[dtype](min(slope / math.log(2.0), 2.0**120))
