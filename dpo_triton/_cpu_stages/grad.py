"""Third stage: the gradient of the logits; see `kernels/grad.py` for the mathematics."""

import numpy as np
import torch
from torch import Tensor

from . import _loops
from ._rows import array, element, exponent_scale, numbers
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
    grad_logps = grad_logps.to(dtype)
    scale = exponent_scale(temperature, logit_scale, softcap, dtype)
    slope = (1.0 if softcap is not None else logit_scale) / temperature
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
        element(logits.dtype),
        *logits.stride()[:2],
        array(labels.long()),
        array(weights),
        grad_logps.data_ptr(),
        *grad_logps.stride(),
        tuple(array(x) for x in of_grad),
        numbers(dtype, slope, None)[0],
        *numbers(dtype, logit_scale, softcap),
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
