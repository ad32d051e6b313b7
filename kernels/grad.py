"""Third stage: the gradient of the logits, one read and one write of each logit that is scored.

    d logp / d z[n, y] = 1 - exp(logp)
    d logp / d z[n, j] = -exp(z[n, j]) / sum of exp(z[n])    (j != y)

times the token's coefficient and the slope of z in x. A row that is not scored is not read: it gets
zeros.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import LN2, cap, exponent_error, exponent_scale, on_device, one_minus_exp


@triton.jit
def _logits_grad(
    x,  # (BLOCK_V,) float32 logits
    start,
    y,
    logp_ptr,
    coefficient,
    probability_scale,
    peak,
    exponent_scale,
    logit_scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    u = cap(x, logit_scale, softcap, HAS_SOFTCAP)
    exponent = tl.fma(u, exponent_scale, -(peak * exponent_scale))
    d = tl.exp2(exponent) * probability_scale
    if (y >= start) & (y < start + BLOCK_V):
        others = one_minus_exp(tl.load(logp_ptr).to(tl.float64)).to(tl.float32)
        d = tl.where(start + tl.arange(0, BLOCK_V) == y, coefficient * others, d)
    if HAS_SOFTCAP:  # du / dx = logit_scale * (1 - tanh ** 2)
        t = u / softcap
        d *= logit_scale * (1.0 - t * t)
    return d


# One program per logits row and tile. Row n holds the scores of token n + SHIFT.
@triton.jit(do_not_specialize=["num_tokens", "seq_len", "vocab_size", "num_tiles"])
def _grad_kernel(
    logits_ptr,  # (B, T, V), V contiguous
    labels_ptr,  # (B * T,) int32 or int64
    weights_ptr,  # (B * T,) float32, 0 where not scored
    grad_logps_ptr,  # (B, T) float32, any strides
    logps_ptr,  # (B * T,) float32
    peak_ptr,  # (B * T,) float32
    total_ptr,  # (B * T,) float32
    grad_logits_ptr,  # (B, T, V), V contiguous, out; may be logits itself
    stride_logits_b,
    stride_logits_t,
    stride_grad_logps_b,
    stride_grad_logps_t,
    stride_grad_logits_b,
    stride_grad_logits_t,
    num_tokens,
    seq_len,
    vocab_size,
    num_tiles,
    exponent_scale,
    logit_scale,
    softcap,
    SHIFT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    start = tl.program_id(0) % num_tiles * BLOCK_V
    row = (tl.program_id(0) // num_tiles).to(tl.int64)
    n = row + SHIFT  # past a sequence's end it is the next one's first token, which has no weight
    b = row // seq_len
    t = row % seq_len
    row_ptr = logits_ptr + b * stride_logits_b + t * stride_logits_t
    out_ptr = grad_logits_ptr + b * stride_grad_logits_b + t * stride_grad_logits_t
    v = start + tl.arange(0, BLOCK_V)
    # Full tiles load and store without a mask: a column bound would break their 16-byte accesses.
    is_full = start + BLOCK_V <= vocab_size

    weight = tl.load(weights_ptr + n, mask=n < num_tokens, other=0.0)
    if weight != 0.0:
        y = tl.load(labels_ptr + n).to(tl.int64)
        upstream_ptr = grad_logps_ptr + n // seq_len * stride_grad_logps_b
        coefficient = (
            tl.load(upstream_ptr + n % seq_len * stride_grad_logps_t).to(tl.float32) * weight
        )
        exponent_scale = tl.cast(exponent_scale, tl.float32)
        coefficient *= exponent_scale * LN2  # the slope of z in u
        peak = tl.load(peak_ptr + n)
        correction = tl.exp2(exponent_error(peak, exponent_scale))
        probability_scale = -coefficient * correction / tl.load(total_ptr + n)
        if is_full:
            x = tl.load(row_ptr + v).to(tl.float32)
            d = _logits_grad(
                x, start, y, logps_ptr + n, coefficient, probability_scale, peak,
                exponent_scale, logit_scale, softcap, HAS_SOFTCAP, BLOCK_V,
            )  # fmt: skip
            tl.store(out_ptr + v, d.to(grad_logits_ptr.dtype.element_ty))
        else:
            x = tl.load(row_ptr + v, mask=v < vocab_size, other=0.0).to(tl.float32)
            d = _logits_grad(
                x, start, y, logps_ptr + n, coefficient, probability_scale, peak,
                exponent_scale, logit_scale, softcap, HAS_SOFTCAP, BLOCK_V,
            )  # fmt: skip
            tl.store(out_ptr + v, d.to(grad_logits_ptr.dtype.element_ty), mask=v < vocab_size)
    else:
        zeros = tl.zeros([BLOCK_V], grad_logits_ptr.dtype.element_ty)
        if is_full:
            tl.store(out_ptr + v, zeros)
        else:
            tl.store(out_ptr + v, zeros, mask=v < vocab_size)


def grad(
    grad_logps: Tensor,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    logps: Tensor,
    peak: Tensor,
    total: Tensor,
    shift: bool,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    out: Tensor | None,
) -> Tensor:
    """Return the gradient of logits, (B, T, V) in their dtype, in `out` if given, which may be
    logits.

    grad_logps is (B, T), of any strides: an expanded (B, 1) is read as it is.
    """
    if out is None:
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    batch, seq_len, vocab_size = logits.shape
    config = launch_config()
    num_tiles = triton.cdiv(vocab_size, config["BLOCK_V"])
    if out.numel() == 0:
        return out
    with on_device(logits):
        _grad_kernel[(batch * seq_len * num_tiles,)](
            logits,
            labels.contiguous(),
            weights,
            grad_logps,
            logps,
            peak,
            total,
            out,
            *logits.stride()[:2],
            *grad_logps.stride(),
            *out.stride()[:2],
            batch * seq_len,
            seq_len,
            vocab_size,
            num_tiles,
            exponent_scale(temperature, logit_scale, softcap),
            logit_scale,
            softcap or 0.0,
            SHIFT=shift,
            HAS_SOFTCAP=softcap is not None,
            **config,
        )
    return out


def launch_config() -> dict[str, int]:
    """Tile width and warps: 16 logits a thread, loads and stores of 16 bytes, nothing spilled."""
    return dict(BLOCK_V=4096, num_warps=8)
