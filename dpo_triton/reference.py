"""The specification: the same functions in plain PyTorch, without a fast path, differentiable by
autograd.

In float64 it is the truth that the tests compare with. The target is left out of the sum, so that a
log-probability near 0 keeps its relative precision at any margin.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def seq_logprob(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: str = "mean",
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    stats: Sequence[str] = (),
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Log-probability of each sequence, (B,) or (S,); see `dpo_triton.fused_seq_logprob`.

    Computed in the dtype of logits, in float32 for 16-bit ones.
    """
    token_stats = [name for name in stats if name not in ("lengths", "token_logps")]
    token_logps, every = token_logprob(
        logits,
        labels,
        None if mask is None else mask != 0,
        shift=shift,
        cu_seqlens=cu_seqlens,
        ignore_index=ignore_index,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        stats=["token_logps", *token_stats],
    )
    weights = _weights(labels, mask, shift, cu_seqlens, ignore_index, token_logps.dtype)
    weighted = torch.where(weights != 0, weights * token_logps, 0.0)
    if cu_seqlens is None:
        sequences = [slice(b, b + 1) for b in range(labels.shape[0])]
    else:
        bounds = cu_seqlens.tolist()
        sequences = [slice(lo, hi) for lo, hi in itertools.pairwise(bounds)]
    values = weighted.flatten()[:0]  # without a sequence: empty, and attached all the same
    lengths = token_logps.new_zeros(len(sequences))
    if sequences:
        values = torch.stack([weighted[s].sum() for s in sequences])
        lengths = torch.stack([weights[s].sum() for s in sequences])
        if reduction == "mean":
            is_empty = torch.stack([(weights[s] == 0).all() for s in sequences])
            values = values / torch.where(is_empty, 1.0, lengths)
    if not stats:
        return values
    every["lengths"] = lengths
    return values, {name: every[name] for name in stats}


def token_logprob(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    stats: Sequence[str] = (),
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Log-probability of each label, (B, T) or (N,); see `dpo_triton.fused_token_logprob`."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    scored = _weights(labels, mask, shift, cu_seqlens, ignore_index, dtype) != 0
    y = labels[scored].long()[:, None]
    rows = scored.nonzero()
    rows[:, -1] -= int(shift)  # labels[b, t] is scored by logits[b, t - 1]
    z = logits[tuple(rows.T)].to(dtype) * logit_scale  # (scored, V)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature

    z_y = z.gather(1, y)
    others = z.scatter(1, y, -torch.inf)
    # With no other token left the target is certain, and nothing has a gradient.
    alone = (others == -torch.inf).all(1, keepdim=True)
    log_odds = torch.where(alone, 0.0, others).logsumexp(1, keepdim=True) - z_y
    logp = torch.where(alone, 0.0, -F.softplus(log_odds, threshold=40.0))
    undefined = z.isnan().any(1, keepdim=True) | (z.amax(1, keepdim=True).abs() == torch.inf)
    logp = torch.where(undefined, torch.nan, logp)

    def per_token(values: Tensor) -> Tensor:
        return torch.zeros(labels.shape, dtype=dtype, device=logits.device).index_put(
            tuple(scored.nonzero().T), values.to(dtype)
        )

    token_logps = per_token(logp[:, 0])
    if not stats:
        return token_logps
    with torch.no_grad():
        log_p = z.log_softmax(1)
        every = {"token_logps": token_logps.detach()}
        if "entropy" in stats:
            every["entropy"] = per_token(torch.special.entr(log_p.exp()).sum(1))
        if "mean_logit" in stats:
            every["mean_logit"] = per_token(z.mean(1))
        if "top1" in stats:
            every["top1"] = per_token(z.argmax(1) == y[:, 0])
        if "log_sum_sq_probs" in stats:
            every["log_sum_sq_probs"] = per_token((2 * log_p).logsumexp(1))
    return token_logps, {name: every[name] for name in stats}


def linear_seq_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Log-probability of each sequence from (B, T, H) or (N, H) hidden states and a (V, H) head;
    options are those of `seq_logprob`; see `dpo_triton.fused_linear_seq_logprob`."""
    logits = _linear(hidden, weight, labels, mask, bias, options)
    return seq_logprob(logits, labels, mask, **options)


def linear_token_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Log-probability of each label; see `dpo_triton.fused_linear_token_logprob`."""
    logits = _linear(hidden, weight, labels, mask, bias, options)
    return token_logprob(logits, labels, mask, **options)


def _linear(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """Logits (..., V). Hidden states that score nothing count as 0: in the head's gradient, NaN
    times a gradient of 0 would be NaN."""
    shift = options.get("shift", False)
    packing = options.get("cu_seqlens"), options.get("ignore_index", -100)
    is_scored = _weights(labels, mask, shift, *packing, torch.float64) != 0
    # The first token is never scored by a shift, so that nothing wraps around.
    is_read = is_scored.roll(-int(shift), -1)
    return F.linear(torch.where(is_read[..., None], hidden, 0.0), weight, bias)


def _weights(
    labels: Tensor,
    mask: Tensor | None,
    shift: bool,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    dtype: torch.dtype,
) -> Tensor:
    """Weight of each token, 0 where it is not scored."""
    weights = torch.ones(labels.shape, dtype=dtype, device=labels.device)
    if mask is not None:
        weights = mask.to(dtype).clone()
    weights[labels.long() == ignore_index] = 0.0  # int32 would wrap what is beyond it
    if cu_seqlens is not None:
        weights[int(cu_seqlens[-1]) :] = 0.0  # padding after the last sequence
    if shift and cu_seqlens is None:
        weights[:, :1] = 0.0
    elif shift and cu_seqlens is not None:
        starts = cu_seqlens[:-1]
        weights[starts[starts < len(labels)].long()] = 0.0
    return weights
