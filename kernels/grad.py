"""Third stage: the gradient of the logits, one read and one write of each logit that is scored.

    d logp / d z[n, y] = 1 - p[n, y]        d logp / d z[n, j] = -p[n, j]    (j != y)
    p[n, j] = share[n] * 2 ** (u[n, j] * exponent_scale[n] - reference[n])

times the token's coefficient and the slope of z in x. The scale of exponents is slope / ln 2 but in
rows of logits so large that only those equal to the peak have a share: see `combine`. A row that is
not scored is not read: it gets zeros.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from ._tiles import (
    SPLIT_V,
    cap,
    from_own,
    gpu_target,
    load,
    load_tail,
    on_device,
    own_columns,
    store,
    store_tail,
    vector_width,
    warp_size,
)
from .partials import num_splits


@triton.jit
def _logits_grad(
    x,  # (R, THREADS, VEC) float32 logits
    scaled_share,
    reference,
    exponent_scale,
    logit_scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
):
    # (gradient of a token that is not the target, du / dx)
    u = cap(x, logit_scale, softcap, HAS_SOFTCAP)
    d = tl.exp2(tl.fma(u, exponent_scale, -reference)) * scaled_share
    chain = 1.0
    if HAS_SOFTCAP:
        t = u / softcap
        chain = logit_scale * (1.0 - t * t)
        d *= chain
    return d, chain


# One program per logits row and split. Row n holds the scores of token n + SHIFT.
@triton.jit(
    do_not_specialize=[
        "stride_logits_b", "stride_logits_t", "stride_grad_logps_b", "stride_grad_logps_t",
        "stride_grad_logits_b", "stride_grad_logits_t", "stride_softmax",
        "num_tokens", "seq_len", "num_columns", "num_splits", "first_column",
    ]
)  # fmt: skip
def _grad_kernel(
    logits_ptr,  # (B, T, W), W contiguous
    labels_ptr,  # (B * T,) int32 or int64
    weights_ptr,  # (B * T,) float32, 0 where not scored
    grad_logps_ptr,  # (B, T) float32, any strides
    softmax_ptr,  # (4, B * T) float32: complement, reference, share and exponent_scale
    grad_logits_ptr,  # (B, T, W), W contiguous, out; may be logits itself
    stride_logits_b,
    stride_logits_t,
    stride_grad_logps_b,
    stride_grad_logps_t,
    stride_grad_logits_b,
    stride_grad_logits_t,
    stride_softmax,
    num_tokens,
    seq_len,
    num_columns,  # W
    num_splits,
    first_column,  # of these columns in the vocabulary
    slope,  # of z in u
    logit_scale,
    softcap,
    SHIFT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    LOGITS_VEC: tl.constexpr,  # neighbours that the rows of logits allow
    BLOCK_V: tl.constexpr,
    THREADS: tl.constexpr,
    VEC: tl.constexpr,  # those that the gradient's allow too
):
    dtype = grad_logits_ptr.dtype.element_ty
    row = tl.program_id(0) // num_splits
    token = row + SHIFT  # past a sequence's end it is the next one's first, which has no weight
    n = token.to(tl.int64)  # B * T * V passes 2**31
    b = (row // seq_len).to(tl.int64)  # divided in 32 bits: 64 take a function of their own
    t = (row % seq_len).to(tl.int64)
    row_start = b * stride_logits_b + t * stride_logits_t
    row_ptr = logits_ptr + tl.multiple_of(row_start, LOGITS_VEC)
    out_start = b * stride_grad_logits_b + t * stride_grad_logits_t
    out_ptr = grad_logits_ptr + tl.multiple_of(out_start, VEC)
    R: tl.constexpr = BLOCK_V // (THREADS * VEC)
    TAIL_R: tl.constexpr = 8 // VEC  # what is left of a tile goes in narrow ones
    first = tl.program_id(0) % num_splits * SPLIT_V
    bound = tl.minimum(first + SPLIT_V, num_columns)
    # Full tiles load and store without a mask: a column bound would break their 16-byte accesses.
    tail = first + (bound - first) // BLOCK_V * BLOCK_V

    weight = tl.load(weights_ptr + n, mask=n < num_tokens, other=0.0)
    if weight != 0.0:
        y = tl.load(labels_ptr + n).to(tl.int64) - first_column
        upstream_ptr = grad_logps_ptr + (token // seq_len).to(tl.int64) * stride_grad_logps_b
        upstream_ptr += (token % seq_len).to(tl.int64) * stride_grad_logps_t
        upstream = tl.load(upstream_ptr).to(tl.float32)
        coefficient = upstream * weight * tl.cast(slope, tl.float32)
        softmax_ptr += n
        target_grad = coefficient * tl.load(softmax_ptr)
        softmax_ptr += stride_softmax
        reference = tl.load(softmax_ptr)
        softmax_ptr += stride_softmax
        scaled_share = -coefficient * tl.load(softmax_ptr)
        exponent_scale = tl.load(softmax_ptr + stride_softmax)
        own = own_columns(R, THREADS, VEC)
        for start in range(first, tail, BLOCK_V):
            x = load(row_ptr + start, R, THREADS, VEC)
            d, chain = _logits_grad(
                x, scaled_share, reference, exponent_scale, logit_scale, softcap, HAS_SOFTCAP
            )
            if (y >= start) & (y < start + BLOCK_V):
                is_target = own == from_own(y - start, THREADS, VEC)
                store(out_ptr + start, tl.where(is_target, target_grad * chain, d))
            else:
                store(out_ptr + start, d)
        for start in range(tail, bound, TAIL_R * THREADS * VEC):
            x = load_tail(row_ptr + start, bound - start, 0.0, TAIL_R, THREADS, VEC)
            d, chain = _logits_grad(
                x, scaled_share, reference, exponent_scale, logit_scale, softcap, HAS_SOFTCAP
            )
            is_target = own_columns(TAIL_R, THREADS, VEC) == from_own(y - start, THREADS, VEC)
            d = tl.where(is_target, target_grad * chain, d)
            store_tail(out_ptr + start, d, bound - start)
    else:
        zeros = tl.zeros([R, THREADS, VEC], dtype)
        for start in range(first, tail, BLOCK_V):
            store(out_ptr + start, zeros)
        few = tl.zeros([TAIL_R, THREADS, VEC], dtype)
        for start in range(tail, bound, TAIL_R * THREADS * VEC):
            store_tail(out_ptr + start, few, bound - start)


def grad(
    grad_logps: Tensor,
    logits: Tensor,
    scored: Any,  # a Scored
    softmax: Tensor,
    columns: Any,  # a Columns
    scaling: Any,  # a Scaling
    out: Tensor | None,
) -> Tensor:
    """Return the gradient of logits, (B, T, W) in their dtype, in `out` if given, which may be
    logits. They are the W columns from `columns.first` on of the vocabulary.

    grad_logps is (B, T), of any strides: an expanded (B, 1) is read as it is. softmax is
    (4, B * T), a RowSoftmax, its rows as far apart as one likes.
    """
    if out is None:
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    labels, weights, shift = scored
    batch, seq_len, num_columns = logits.shape
    num_tokens, splits = batch * seq_len, num_splits(num_columns)
    has_softcap = scaling.softcap is not None
    with on_device(logits):
        launch(
            _grad_kernel,
            num_tokens * splits,
            (logits, labels.contiguous(), weights, grad_logps, softmax, out),
            (
                *logits.stride()[:2],
                *grad_logps.stride(),
                *out.stride()[:2],
                softmax.stride(0),
                num_tokens,
                seq_len,
                num_columns,
                splits,
                columns.first,
            ),
            (scaling.slope, scaling.logit_scale, scaling.softcap or 0.0),
            _constants(
                shift, has_softcap, vector_width(logits), vector_width(out), gpu_target(logits)
            ),
        )
    return out


@functools.cache
def _constants(
    shift: bool, has_softcap: bool, of_logits: int, of_out: int, target: Any
) -> dict[str, Any]:
    config = launch_config(min(of_logits, of_out), has_softcap, target)
    return dict(SHIFT=shift, HAS_SOFTCAP=has_softcap, LOGITS_VEC=of_logits, **config)


def launch_config(vec: int, has_softcap: bool, target: Any) -> dict[str, int]:
    """Columns of a tile, threads, neighbouring logits of an access, and warps.

    As in partials, but 16 logits a thread at a time, or 8 with a softcap: both a logit and its
    gradient take registers.
    """
    block = 512 if has_softcap else 1024
    return dict(BLOCK_V=block, THREADS=64, VEC=vec, num_warps=64 // warp_size(target))
