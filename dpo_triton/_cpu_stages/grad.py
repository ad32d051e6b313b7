"""Third stage: the gradient of the logits; see `kernels/grad.py` for the mathematics."""

import numpy as np
from numba import carray
from torch import Tensor

from .._records import Columns, Scaling, Scored
from .._torch_stages.grad import zeros_like
from ._compiled import compiled, inner
from ._numbers import (
    BLOCK,
    at,
    claim,
    exp2_and_subnormals,
    fma,
    number,
    rounded,
    softmax_rows,
    tanh,
    view,
)
from ._rows import ELEMENTS, int64, numbers
from ._threads import share_rows


@compiled
def grad_rows(
    counter, step, num_tokens, seq_len, shift, first_column, num_columns,
    logits, element, stride_b, stride_t, labels, weights, grad_logps, grad_stride_b, grad_stride_t,
    softmax, pitch, slope, logit_scale, softcap, out, out_stride_b, out_stride_t, fill_zeros,
):  # fmt: skip
    """Write the gradient of the rows of scored tokens, claiming `step` rows at a time, and zeros to
    the others if asked to. Logits have the type of `element`, all others that of `slope`."""
    labels, weights = view(labels, num_tokens, 0), view(weights, num_tokens, slope)
    complement, reference, share, scale = softmax_rows(softmax, pitch, slope)
    u = np.empty(BLOCK, weights.dtype)
    one = weights.dtype.type(1.0)
    while True:
        first = claim(counter, step)
        if first >= num_tokens:
            return
        for row in range(first, min(first + step, num_tokens)):
            n = row + 1 if shift else row
            b, t = row // seq_len, row % seq_len
            place = b * out_stride_b + t * out_stride_t
            if n >= num_tokens or weights[n] == 0:
                if fill_zeros:
                    carray(at(out, place, element), num_columns)[:] = element
                continue
            index = n // seq_len * grad_stride_b + n % seq_len * grad_stride_t
            upstream = carray(at(grad_logps, index, slope), 1)[0]
            coefficient = upstream * weights[n] * slope
            offset = b * stride_b + t * stride_t
            for start in range(0, num_columns, BLOCK):
                size = min(BLOCK, num_columns - start)
                x = carray(at(logits, offset + start, element), size)
                y = labels[n] - first_column - start
                chain = one
                if softcap is not None and 0 <= y < size:  # its own, before u is overwritten
                    chain = chain_of(tanh(number(x[y]) * (logit_scale / softcap)), logit_scale)
                gradient_of_others(
                    x,
                    size,
                    u,
                    scale[n],
                    reference[n],
                    -coefficient * share[n],
                    logit_scale,
                    softcap,
                )
                if 0 <= y < size:
                    u[y] = coefficient * complement[n] * chain
                to = carray(at(out, place + start, element), size)
                for i in range(size):
                    to[i] = rounded(u[i], element)


@inner
def chain_of(tanh_x, logit_scale):
    """du / dx with a softcap."""
    return logit_scale - logit_scale * (tanh_x * tanh_x)


@inner
def gradient_of_others(x, size, u, scale, reference, share, logit_scale, softcap):
    """u[i] = share * 2 ** (scale * u - reference) * du / dx."""
    for i in range(size):
        if softcap is None:
            u[i] = share * exp2_and_subnormals(fma(number(x[i]), scale, -reference))
        else:
            th = tanh(number(x[i]) * (logit_scale / softcap))
            p = share * exp2_and_subnormals(fma(softcap * th, scale, -reference))
            u[i] = p * chain_of(th, logit_scale)


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
    of_scaling = numbers(scaling, dtype)
    grad_logps, labels = grad_logps.to(dtype), int64(scored.labels)
    share_rows(
        grad_rows, batch * seq_len, num_columns,
        seq_len, scored.shift, columns.first, num_columns, logits.data_ptr(),
        ELEMENTS[logits.dtype], *logits.stride()[:2], labels.data_ptr(),
        scored.weights.data_ptr(), grad_logps.data_ptr(), *grad_logps.stride(),
        softmax.data_ptr(), softmax.stride(0), of_scaling.slope,
        *of_scaling.of_cap, out.data_ptr(), *out.stride()[:2], not is_fresh,
    )  # fmt: skip
    return out
