"""Third stage: the gradient of the logits; see `kernels/grad.py` for the mathematics."""

import numpy as np
import torch
from torch import Tensor

from .._records import Columns, Scaling, Scored
from . import _loops
from ._rows import ELEMENTS, cap_numbers, int64, real
from ._threads import share_rows


def grad(
    grad_logps: Tensor,
    logits: Tensor,
    scored: Scored,
    softmax: Tensor,
    columns: Columns,
    scaling: Scaling,
    out: Tensor | None,
) -> Tensor:
    """Return the gradient of logits, (B, T, W), in `out` if given, which may be logits itself.

    They are the W columns from `columns.first` on of the vocabulary. grad_logps is (B, T); it is
    not read where a token is not scored.
    """
    batch, seq_len, num_columns = logits.shape
    dtype = scored.weights.dtype
    is_fresh = out is None
    out = zeros_like(logits) if out is None else out
    grad_logps, labels = grad_logps.to(dtype), int64(scored.labels)
    share_rows(
        _loops.grad_rows, batch * seq_len, num_columns,
        seq_len, scored.shift, columns.first, num_columns, logits.data_ptr(),
        ELEMENTS[logits.dtype], *logits.stride()[:2], labels.data_ptr(),
        scored.weights.data_ptr(), grad_logps.data_ptr(), *grad_logps.stride(),
        softmax.data_ptr(), softmax.stride(0), real(scaling.slope, dtype),
        *cap_numbers(scaling, dtype), out.data_ptr(), *out.stride()[:2], not is_fresh,
    )  # fmt: skip
    return out


def zeros_like(logits: Tensor) -> Tensor:
    """Contiguous zeros, straight from the operating system by NumPy's calloc.

    Pages of rows that are not scored are then never touched, and large gradients ask for huge
    pages.
    """
    words = {2: np.int16, 4: np.int32, 8: np.int64}[logits.element_size()]
    return torch.from_numpy(np.zeros(logits.shape, words)).view(logits.dtype)
