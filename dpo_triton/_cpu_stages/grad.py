"""Third stage: the gradient of the logits; see `kernels/grad.py` for the mathematics."""

import numpy as np
import torch
from torch import Tensor

from . import _loops
from ._rows import ELEMENTS, REAL, as_int64, exponent_scale
from ._threads import share_rows


def grad(
    grad_logps: Tensor,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    complement: Tensor,
    reference: Tensor,
    share: Tensor,
    shift: bool,
    first_column: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    out: Tensor | None,
) -> Tensor:
    """Return the gradient of logits, (B, T, W), in `out` if given, which may be logits itself.

    They are the W columns from first_column on of the vocabulary.

    grad_logps is (B, T); it is not read where a token is not scored.
    """
    batch, seq_len, num_columns = logits.shape
    num_tokens = batch * seq_len
    dtype = weights.dtype
    fresh = out is None
    if out is None:
        out = _zeros(logits)
    grad_logps, labels = grad_logps.to(dtype), as_int64(labels)
    real = REAL[dtype]
    scale = exponent_scale(temperature, logit_scale, softcap, dtype)
    of_grad = (complement, reference, share, torch.full_like(share, scale))
    share_rows(
        _loops.grad_rows,
        num_tokens,
        num_columns,
        seq_len,
        num_columns,
        shift,
        first_column,
        logits.data_ptr(),
        ELEMENTS[logits.dtype],
        *logits.stride()[:2],
        labels.data_ptr(),
        weights.data_ptr(),
        grad_logps.data_ptr(),
        *grad_logps.stride(),
        tuple(x.data_ptr() for x in of_grad),
        real((1.0 if softcap is not None else logit_scale) / temperature),
        real(logit_scale),
        None if softcap is None else real(softcap),
        out.data_ptr(),
        *out.stride()[:2],
        not fresh,
    )
    return out


def _zeros(logits: Tensor) -> Tensor:
    """Contiguous zeros like logits, straight from the operating system by NumPy's calloc.

    Pages of rows that are not scored are then never touched, and large gradients ask for huge
    pages.
    """
    words = {2: np.int16, 4: np.int32, 8: np.int64}[logits.element_size()]
    return torch.from_numpy(np.zeros(logits.shape, words)).view(logits.dtype)
