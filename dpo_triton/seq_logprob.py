"""Log-probabilities of label sequences, and of their tokens, from logits."""

from collections.abc import Sequence
from typing import Literal, overload

from torch import Tensor

from . import _checks
from ._autograd import Logprob
from ._backends import BackendName

Reduction = Literal["mean", "sum"]


@overload
def fused_seq_logprob(  # type: ignore[overload-overlap]
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "mean",
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    stats: tuple[()] = (),
    inplace_backward: bool = False,
    backend: BackendName = "auto",
) -> Tensor: ...
@overload
def fused_seq_logprob(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "mean",
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    stats: Sequence[str],
    inplace_backward: bool = False,
    backend: BackendName = "auto",
) -> tuple[Tensor, dict[str, Tensor]]: ...
def fused_seq_logprob(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "mean",
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    stats: Sequence[str] = (),
    inplace_backward: bool = False,
    backend: BackendName = "auto",
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Log-probability of each label sequence, in nats: one pass over the logits, one back.

    `sum_t w[b, t] * log p(labels[b, t])`, divided by `sum_t w[b, t]` for the mean, where p is the
    softmax of `cap(logit_scale * logits) / temperature`, `cap(u) = softcap * tanh(u / softcap)`.
    A token is scored where its weight is not 0 and its label is not `ignore_index`; the logits of
    one that is not scored are never read.

    Args:
        logits: (B, T, V), or (N, V) with `cu_seqlens`; float32, bfloat16, float16, or float64
            (torch backend). Contiguous in V; any batch and time strides.
        labels: (B, T) or (N,), int64 or int32. `labels[b, t]` is scored by `logits[b, t]`, unless
            `shift`.
        mask: shape of labels; bool, integer or floating: the weight of each token, in float32.
            None scores every label other than `ignore_index`.
        reduction: "mean", the length-normalised form, or "sum".
        shift: score `labels[:, 1:]` by `logits[:, :-1]`, the mask taken at the label, with nothing
            sliced or copied. The gradient covers all of logits, zero at a sequence's last position.
        cu_seqlens: (S + 1,) int32 or int64: running sum of the lengths of packed sequences, from 0
            to N.
        ignore_index: the label of tokens that do not count.
        temperature: divides the logits; positive.
        logit_scale: multiplies them first (Cohere, Granite); positive.
        softcap: bound of the logits (Gemma), or None; positive.
        stats: names out of "lengths" (sums of weights, per sequence) and, per token and 0 where
            not scored, "token_logps" (nats, not weighted), "entropy" (nats), "mean_logit" (over
            the vocabulary, after scaling), "top1" (1 where the label is the argmax) and
            "log_sum_sq_probs" (log of sum_v p_v ** 2).
        inplace_backward: the backward pass writes the gradient over logits and so saves its
            memory. A second backward pass, or that of another function that saved the logits,
            then raises a RuntimeError.
        backend: "triton", "torch", or "auto": Triton on a GPU, PyTorch elsewhere. A named one runs
            or raises.

    Returns:
        (B,) or (S,) float32, float64 for float64 logits; 0, with a gradient of 0, for a sequence
        without a scored token. With stats, a pair of that and a dict from name to detached tensor.
        Per-token tensors are aligned with labels: with `shift`, the first position of a sequence
        is never scored.

    Raises:
        TypeError, ValueError: an argument that does not fit.
        IndexError: a scored label outside of the vocabulary. Triton, which does not wait for the
            device, gives NaN for that sequence, and raises only with DPO_TRITON_DEBUG=1.
        RuntimeError, ModuleNotFoundError: Triton is asked for and cannot run here.

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7 (the sum); the mean is what MiniMind and
        Tulu 3 (arXiv:2411.15124, length-normalised DPO) train with.
    """
    _checks.check_choices(reduction, stats, _checks.SEQUENCE_STATS, ignore_index, backend)
    values, lengths, logps, token_stats = _logprob(
        logits,
        labels,
        mask,
        reduction=reduction,
        shift=shift,
        cu_seqlens=cu_seqlens,
        ignore_index=ignore_index,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        stats=stats,
        inplace_backward=inplace_backward,
        backend=backend,
    )
    if not stats:
        return values
    every = {"lengths": lengths, "token_logps": logps, **token_stats}
    return values, {name: every[name] for name in stats}


@overload
def fused_token_logprob(  # type: ignore[overload-overlap]
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
    stats: tuple[()] = (),
    inplace_backward: bool = False,
    backend: BackendName = "auto",
) -> Tensor: ...
@overload
def fused_token_logprob(
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
    stats: Sequence[str],
    inplace_backward: bool = False,
    backend: BackendName = "auto",
) -> tuple[Tensor, dict[str, Tensor]]: ...
def fused_token_logprob(
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
    inplace_backward: bool = False,
    backend: BackendName = "auto",
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Log-probability of each label, in nats, 0 where it is not scored; differentiable.

    Arguments and errors are those of `fused_seq_logprob`. A weight only says here whether a token
    is scored: the result is not multiplied by it. "lengths" is not among the `stats`.

    Returns:
        (B, T) or (N,) float32, float64 for float64 logits, aligned with labels: with `shift` the
        first position of each sequence is 0. With stats, a pair of that and a dict from name to
        detached tensor.
    """
    _checks.check_choices(None, stats, _checks.SEQUENCE_STATS[1:], ignore_index, backend)
    if mask is not None and isinstance(mask, Tensor):
        mask = mask != 0
    result, _, logps, token_stats = _logprob(
        logits,
        labels,
        mask,
        reduction="none",
        shift=shift,
        cu_seqlens=cu_seqlens,
        ignore_index=ignore_index,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        stats=stats,
        inplace_backward=inplace_backward,
        backend=backend,
    )
    if not stats:
        return result
    every = {"token_logps": logps, **token_stats}
    return result, {name: every[name] for name in stats}


def _logprob(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    *,
    reduction: str,
    shift: bool,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    stats: Sequence[str],
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Check, dispatch, and name the stats. Packed tokens are a batch of one to the stages."""
    _checks.check_logits(logits, cu_seqlens, inplace_backward)
    _checks.check_tokens(logits, labels, mask, cu_seqlens)
    _checks.check_scaling(temperature, logit_scale, softcap)
    if cu_seqlens is not None:
        logits, labels = logits[None], labels[None]
        mask = None if mask is None else mask[None]
    stage_stats = [name for name in _checks.TOKEN_STATS if name in stats]
    result, lengths, logps, token_stats = Logprob.apply(  # type: ignore[no-untyped-call]
        logits,
        labels,
        mask,
        cu_seqlens,
        reduction,
        bool(shift),
        ignore_index,
        float(temperature),
        float(logit_scale),
        None if softcap is None else float(softcap),
        stage_stats,
        inplace_backward,
        backend,
    )
    if cu_seqlens is not None:
        logps, token_stats = logps[0], token_stats[:, 0]
        result = result[0] if reduction == "none" else result
    return result, lengths, logps, dict(zip(stage_stats, token_stats, strict=True))
