"""Log-probabilities of label sequences, and of their tokens, from logits."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from . import _checks, parallel
from ._autograd import Logprob
from ._backends import BackendName, resolve_backend
from ._dtensor import local_logits
from ._weights import sum_dtype
from .parallel import Peers, VocabShard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

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
    vocab_shard: VocabShard | None = None,
    sequence_group: "ProcessGroup | None" = None,
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
    vocab_shard: VocabShard | None = None,
    sequence_group: "ProcessGroup | None" = None,
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
    vocab_shard: VocabShard | None = None,
    sequence_group: "ProcessGroup | None" = None,
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
        vocab_shard: which columns of the vocabulary logits are, on this rank: see `VocabShard`,
            also for what is sent. All else is given alike to every rank, and every rank gets the
            same bits. Logits as a DTensor that is sharded in its last dimension over a mesh of one
            dimension say so themselves; labels beside them may be replicated DTensors.
        sequence_group: a process group whose ranks hold some of the tokens of every sequence each,
            any number of them (context parallel): values and "lengths" are those of whole
            sequences, the same bits on every rank. Of labels that are aligned already: not with
            `shift`. The gradient is that of the whole sequence's value, where every rank goes
            on to compute the same loss of it; a trainer that then averages gradients over these
            ranks divides by their number once too often. 24 bytes a sequence and rank are sent.
        backend: "triton", "cpu" (compiled by numba), "torch", or "auto": Triton on a GPU, "cpu" on
            a CPU where numba is installed, PyTorch elsewhere. A named one runs or raises.

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
        On every rank of a group if on one: a RuntimeError that names the rank and its error, or a
            ValueError that names the ranks that were given different arguments.
        NotImplementedError: a group under torch.compile.

    With a vocabulary in shards that begin and end where splits do (multiples of 16384, Triton),
    the result has the bits of the whole one. The PyTorch backend sums what logits a rank has as one
    split: there, and with other shards, it is within the same error.

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7 (the sum); the mean is what MiniMind and
        Tulu 3 (arXiv:2411.15124, length-normalised DPO) train with.
    """
    logits, labels, mask, cu_seqlens, vocab_shard = local_logits(
        logits, labels, mask, cu_seqlens, vocab_shard
    )
    with parallel.peers(vocab_shard, sequence_group) as peers:
        _checks.check_choices(reduction, stats, _checks.SEQUENCE_STATS, ignore_index, backend)
        values, lengths, logps, token_stats = parallel.uncompiled(_logprob, peers)(
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
            peers=peers,
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
    vocab_shard: VocabShard | None = None,
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
    vocab_shard: VocabShard | None = None,
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
    vocab_shard: VocabShard | None = None,
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
    logits, labels, mask, cu_seqlens, vocab_shard = local_logits(
        logits, labels, mask, cu_seqlens, vocab_shard
    )
    with parallel.peers(vocab_shard, None) as peers:
        _checks.check_choices(None, stats, _checks.SEQUENCE_STATS[1:], ignore_index, backend)
        result, _, logps, token_stats = parallel.uncompiled(_logprob, peers)(
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
            peers=peers,
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
    peers: Peers | None,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Check, dispatch, and name the stats. Packed tokens are a batch of one to the stages."""
    _checks.check_logits(logits, cu_seqlens, inplace_backward)
    _checks.check_tokens(logits, labels, mask, cu_seqlens)
    _checks.check_scaling(temperature, logit_scale, softcap)
    if cu_seqlens is not None:
        logits, labels = logits[None], labels[None]
        mask = None if mask is None else mask[None]
    if reduction == "none" and mask is not None:  # says only which tokens are scored
        mask = mask != 0
    stage_stats = [name for name in _checks.TOKEN_STATS if name in stats]
    if peers is not None:
        stages = resolve_backend(backend, logits.device, logits.dtype)
        peers.agree(
            labels,
            mask,
            cu_seqlens,
            bool(shift),
            ignore_index,
            sum_dtype(logits.dtype),
            logits.shape[-1],
            stages.num_splits,
            {
                "dtype of logits": str(logits.dtype),
                "reduction": reduction,
                "temperature": float(temperature),
                "logit_scale": float(logit_scale),
                "softcap": softcap,
                "stats": stage_stats,
                "backend": stages.name,
            },
        )
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
        peers,
    )
    if cu_seqlens is not None:
        logps, token_stats = logps[0], token_stats[:, 0]
        result = result[0] if reduction == "none" else result
    return result, lengths, logps, dict(zip(stage_stats, token_stats, strict=True))
