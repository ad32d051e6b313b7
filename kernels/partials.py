"""First stage: one pass over the logits, from (B, T, V) to a few float32 numbers a token and split.

    z[n, j] = slope * u[n, j]      with a softcap u = softcap * tanh(logit_scale * x / softcap) and
                                   slope = 1 / temperature; else u = x, logit_scale in the slope
    peak    = max over j != y of u[n, j]
    total   = sum over j != y of exp(slope * (u[n, j] - peak))

The target y stays out of the sum: z[n, y] - logsumexp(z[n]) is 0, with a gradient of 0, once the
target leads by 17 nats in float32; the sum of the others keeps its precision at any margin.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import (
    LOWEST,
    SPLIT_V,
    cap,
    exponent_error,
    exponent_scale,
    on_device,
    starts_a_sequence,
)


@triton.jit
def _fold(
    x,  # (BLOCK_V,) float32 logits of the columns from start, -inf from bound on
    start,
    bound,
    y,
    u_y,  # the target's u
    peak,
    total,
    weighted,
    logit_sum,
    rivals,
    square_sum,
    exponent_scale,
    logit_scale,
    softcap,
    IS_TAIL: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN_LOGIT: tl.constexpr,
    TOP1: tl.constexpr,
    LOG_SUM_SQ_PROBS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # One tile into the running sums. The maximum is the tile's, not each lane's: one exp2 a logit.
    v = start + tl.arange(0, BLOCK_V)
    u = cap(x, logit_scale, softcap, HAS_SOFTCAP)
    if IS_TAIL and HAS_SOFTCAP:
        u = tl.where(v < bound, u, -float("inf"))  # the cap of -inf is finite
    if MEAN_LOGIT:
        logit_sum += tl.sum(tl.where(v < bound, u, 0.0)) if IS_TAIL else tl.sum(u)
    if TOP1:  # the first maximum wins a tie, as in torch.argmax
        rivals = tl.maximum(rivals, tl.max(((u > u_y) | ((u == u_y) & (v < y))).to(tl.float32)))
    if (y >= start) & (y < start + BLOCK_V):
        u = tl.where(v == y, -float("inf"), u)
    new_peak = tl.maximum(peak, tl.max(u))
    drop = peak * exponent_scale - new_peak * exponent_scale
    shrink = tl.exp2(drop)
    # Rounded once, so exact near the peak, where it matters.
    exponent = tl.fma(u, exponent_scale, -(new_peak * exponent_scale))
    e = tl.exp2(exponent)
    if ENTROPY:  # a banned token's exponent is -inf, and its share 0
        products = tl.where(e > 0.0, e * exponent, 0.0)
        weighted = (weighted + drop * total) * shrink + tl.sum(products)
    if LOG_SUM_SQ_PROBS:
        square_sum = square_sum * shrink * shrink + tl.sum(e * e)
    total = total * shrink + tl.sum(e)
    return new_peak, total, weighted, logit_sum, rivals, square_sum


# One program per token n and split k: token n is scored by logits row n - SHIFT, and split k has
# the columns from k * SPLIT_V on. Programs of one token are neighbours; the first of them stores
# its weight. Sizes are not specialised: a batch of another shape compiles nothing.
@triton.jit(
    do_not_specialize=[
        "num_tokens", "seq_len", "vocab_size", "num_splits", "num_sequences", "ignore_index",
    ]
)  # fmt: skip
def _partials_kernel(
    logits_ptr,  # (B, T, V), V contiguous; B and T strided, since callers slice logits
    labels_ptr,  # (B, T) int32 or int64
    mask_ptr,  # (B, T) any dtype, or None
    cu_seqlens_ptr,  # (S + 1,) int32 or int64, or None
    partials_ptr,  # (C, K, B * T) float32, out: peak, total, then what each stat asks for
    target_ptr,  # (B * T,) float32, out: u of the target
    weights_ptr,  # (B, T) float32, out: 0 where a token is not scored
    stride_logits_b,
    stride_logits_t,
    num_tokens,
    seq_len,
    vocab_size,
    num_splits,
    num_sequences,
    ignore_index,
    exponent_scale,  # slope / ln 2
    logit_scale,
    softcap,
    SHIFT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN_LOGIT: tl.constexpr,
    TOP1: tl.constexpr,
    LOG_SUM_SQ_PROBS: tl.constexpr,
    SPLIT_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    split = tl.program_id(0) % num_splits
    n = (tl.program_id(0) // num_splits).to(tl.int64)  # B * T * V passes 2**31
    y = tl.load(labels_ptr + n).to(tl.int64)
    weight = 1.0
    if HAS_MASK:
        weight = tl.load(mask_ptr + n).to(tl.float32)
    weight = tl.where(y == ignore_index, 0.0, weight)
    if SHIFT:  # nothing predicts the first token of a sequence
        if PACKED:
            is_first = starts_a_sequence(cu_seqlens_ptr, num_sequences, n)
        else:
            is_first = n % seq_len == 0
        weight = tl.where(is_first, 0.0, weight)
    if split == 0:
        tl.store(weights_ptr + n, weight)

    if weight != 0.0:
        exponent_scale = tl.cast(exponent_scale, tl.float32)
        row = n - 1 if SHIFT else n
        row_ptr = logits_ptr + row // seq_len * stride_logits_b + row % seq_len * stride_logits_t
        in_vocabulary = (y >= 0) & (y < vocab_size)  # else NaN, never a stray read
        x_y = tl.load(row_ptr + y, mask=in_vocabulary, other=float("nan")).to(tl.float32)
        u_y = cap(x_y, logit_scale, softcap, HAS_SOFTCAP)
        if split == 0:
            tl.store(target_ptr + n, u_y)

        peak = LOWEST
        total = 0.0
        weighted = 0.0  # sum of 2 ** exponent * exponent, for the entropy
        logit_sum = 0.0  # sum of u, target included
        rivals = 0.0  # 1 where another token beats the target
        square_sum = 0.0  # sum of 4 ** exponent
        first = split * SPLIT_V
        bound = tl.minimum(first + SPLIT_V, vocab_size)
        # Full tiles load without a mask: a column bound would break their 16-byte loads.
        tail = first + (bound - first) // BLOCK_V * BLOCK_V
        for start in range(first, tail, BLOCK_V):
            x = tl.load(row_ptr + start + tl.arange(0, BLOCK_V)).to(tl.float32)
            peak, total, weighted, logit_sum, rivals, square_sum = _fold(
                x, start, bound, y, u_y, peak, total, weighted, logit_sum, rivals, square_sum,
                exponent_scale, logit_scale, softcap, False,
                HAS_SOFTCAP, ENTROPY, MEAN_LOGIT, TOP1, LOG_SUM_SQ_PROBS, BLOCK_V,
            )  # fmt: skip
        if tail < bound:
            v = tail + tl.arange(0, BLOCK_V)
            x = tl.load(row_ptr + v, mask=v < bound, other=-float("inf")).to(tl.float32)
            peak, total, weighted, logit_sum, rivals, square_sum = _fold(
                x, tail, bound, y, u_y, peak, total, weighted, logit_sum, rivals, square_sum,
                exponent_scale, logit_scale, softcap, True,
                HAS_SOFTCAP, ENTROPY, MEAN_LOGIT, TOP1, LOG_SUM_SQ_PROBS, BLOCK_V,
            )  # fmt: skip

        error = exponent_error(peak, exponent_scale)
        correction = tl.exp2(error)
        out_ptr = partials_ptr + split * num_tokens + n
        channel = (tl.num_programs(0)).to(tl.int64)  # K * B * T: from one channel to the next
        tl.store(out_ptr, peak)
        tl.store(out_ptr + channel, total * correction)
        out_ptr += 2 * channel
        if ENTROPY:
            tl.store(out_ptr, (weighted + error * total) * correction)
            out_ptr += channel
        if MEAN_LOGIT:
            tl.store(out_ptr, logit_sum)
            out_ptr += channel
        if TOP1:
            tl.store(out_ptr, rivals)
            out_ptr += channel
        if LOG_SUM_SQ_PROBS:
            tl.store(out_ptr, square_sum * correction * correction)


def num_splits(vocab_size: int) -> int:
    """Entries of the partials for each token."""
    return (vocab_size + SPLIT_V - 1) // SPLIT_V


def partials(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    shift: bool,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    stats: Sequence[str],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return float32 partials (C, K, B * T), target (B * T,) and weights (B, T).

    C is 2 (peak, total) and one more for each of `stats`; K the splits of SPLIT_V columns. What
    belongs to a token that is not scored is left unwritten, but for its weight, which is 0.
    """
    batch, seq_len, vocab_size = logits.shape
    num_tokens = batch * seq_len
    splits = num_splits(vocab_size)
    weights = torch.empty((batch, seq_len), dtype=torch.float32, device=logits.device)
    target = weights.new_empty(num_tokens)
    partials = weights.new_empty((2 + len(stats), splits, num_tokens))
    if num_tokens == 0:
        return partials, target, weights
    with on_device(logits):
        _partials_kernel[(num_tokens * splits,)](
            logits,
            labels.contiguous(),
            None if mask is None else mask.contiguous(),
            None if cu_seqlens is None else cu_seqlens.contiguous(),
            partials,
            target,
            weights,
            logits.stride(0),
            logits.stride(1),
            num_tokens,
            seq_len,
            vocab_size,
            splits,
            0 if cu_seqlens is None else cu_seqlens.numel() - 1,
            ignore_index,
            exponent_scale(temperature, logit_scale, softcap),
            logit_scale,
            softcap or 0.0,
            SHIFT=shift,
            HAS_MASK=mask is not None,
            PACKED=cu_seqlens is not None,
            HAS_SOFTCAP=softcap is not None,
            ENTROPY="entropy" in stats,
            MEAN_LOGIT="mean_logit" in stats,
            TOP1="top1" in stats,
            LOG_SUM_SQ_PROBS="log_sum_sq_probs" in stats,
            SPLIT_V=SPLIT_V,
            **launch_config(),
        )
    return partials, target, weights


def launch_config() -> dict[str, int]:
    """Tile width and warps: 32 logits a thread, loads of 16 bytes, nothing spilled."""
    return dict(BLOCK_V=4096, num_warps=4)
