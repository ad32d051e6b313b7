"""Log-probabilities of label sequences, and of their tokens, from hidden states and the head."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from . import _checks, _head, parallel
from ._autograd import LinearLogprob
from ._backends import BackendName, resolve_backend
from ._dtensor import local_head
from ._weights import sum_dtype
from .parallel import Peers, VocabShard
from .seq_logprob import Reduction

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Memory of the tiles where the caller names none. On a GPU a tile should be thousands of rows.
TILE_BYTES = {"cpu": 56 * 2**20}
TILE_BYTES_ELSEWHERE = 256 * 2**20
# What a rank with few of the columns takes at least, beyond its share of that.
LEAST_TILE_BYTES = 4 * 2**20


@overload
def fused_linear_seq_logprob(  # type: ignore[overload-overlap]
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    reduction: Reduction = "mean",
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    stats: tuple[()] = (),
    tile_bytes: int | None = None,
    vocab_shard: VocabShard | None = None,
    sequence_group: "ProcessGroup | None" = None,
    backend: BackendName = "auto",
) -> Tensor: ...
@overload
def fused_linear_seq_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    reduction: Reduction = "mean",
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    stats: Sequence[str],
    tile_bytes: int | None = None,
    vocab_shard: VocabShard | None = None,
    sequence_group: "ProcessGroup | None" = None,
    backend: BackendName = "auto",
) -> tuple[Tensor, dict[str, Tensor]]: ...
def fused_linear_seq_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    reduction: Reduction = "mean",
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    stats: Sequence[str] = (),
    tile_bytes: int | None = None,
    vocab_shard: VocabShard | None = None,
    sequence_group: "ProcessGroup | None" = None,
    backend: BackendName = "auto",
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Log-probability of each label sequence, in nats, without logits: only tiles of them exist.

    The value is that of `fused_seq_logprob(hidden @ weight.T + bias, ...)`. Rows that are not
    scored are dropped before the product. Gradients go to those of hidden, weight and bias that
    require one; with a head that does not train (a frozen or a LoRA model) the gradient of hidden
    is made in the forward pass, and the backward pass has no matrix product.

    Args:
        hidden: (B, T, H), or (N, H) with `cu_seqlens`: what the head is applied to; float32,
            bfloat16, float16, or float64 (torch backend).
        weight: (V, H), of the dtype of hidden; under autocast of any dtype, and products are in
            autocast's. A tied embedding's gradients add up.
        labels: (B, T) or (N,), int64 or int32. `labels[b, t]` is scored by `hidden[b, t]`, unless
            `shift`.
        mask: shape of labels; bool, integer or floating: the weight of each token, in float32.
        bias: (V,), or None.
        reduction, shift, cu_seqlens, ignore_index, temperature, logit_scale, softcap, stats,
            backend: see `fused_seq_logprob`. logit_scale multiplies the bias too.
        vocab_shard: which rows of the head weight and bias are, on this rank; see
            `fused_seq_logprob`. Their gradients are of those rows; that of hidden is whole, on
            every rank. A weight that is a DTensor in Shard(0) says so itself: if hidden is a
            replicated DTensor, it is a shard of the vocabulary (tensor parallel). If hidden is a
            plain tensor, the ranks have different batches (data parallel, FSDP2): the weight is
            gathered, once, and freed after the backward pass (after the forward pass if it does
            not train), and its gradient is averaged over the mesh and scattered.
        sequence_group: see `fused_seq_logprob`. The gradients of weight and bias are of this
            rank's tokens: add them up over the ranks.
        tile_bytes: memory for logits; by default 56 MiB on a CPU, 256 MiB on a GPU, and of that its
            share, at least 4 MiB, for a rank that has some of the columns. Tiles that it
            has room for are kept for the backward pass of a head that trains, the others are made
            again there. A tile has at least one row, of 4096 logits.

    Returns:
        (B,) or (S,) float32, float64 for float64 products; 0, with gradients of 0, for a sequence
        without a scored token. With stats, a pair of that and a dict from name to detached tensor.
        Sums over tiles are float32 for 16-bit weights too. On a CPU a 16-bit product is rounded to
        its dtype before it is added.

    Raises:
        TypeError, ValueError: an argument that does not fit.
        IndexError, RuntimeError, ModuleNotFoundError: as `fused_seq_logprob`.

    A row's value does not depend on the other rows as far as the device's matrix product has that
    property. On a CPU (MKL, oneDNN) it had, but for float32 products of fewer than 8 rows: some of
    those values moved, by at most 3e-7 * (1 + |logp|). With and without gradients, and with a
    frozen head, a value has the same bits. The number of scored rows is read on the host: a GPU is
    waited for, once a pass.
    As far as products have that property, a vocabulary in shards that begin and end at multiples of
    4096 columns has the bits of the whole one, and so have the gradients of weight and bias; others
    are within the same error. The gradient of hidden is added up over ranks in float32, then
    rounded once.

    Source: Wijmans et al. 2024, arXiv:2411.09009 (tiles of logits recomputed in the backward pass);
        of the values, see `fused_seq_logprob`.
    """
    hidden, weight, bias, labels, mask, cu_seqlens, vocab_shard = local_head(
        hidden, weight, bias, labels, mask, cu_seqlens, vocab_shard
    )
    with parallel.peers(vocab_shard, sequence_group) as peers:
        _checks.check_choices(reduction, stats, _checks.SEQUENCE_STATS, ignore_index, backend)
        values, lengths, logps, token_stats = parallel.uncompiled(_linear_logprob, peers)(
            hidden,
            weight,
            labels,
            mask,
            bias=bias,
            reduction=reduction,
            shift=shift,
            cu_seqlens=cu_seqlens,
            ignore_index=ignore_index,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            stats=stats,
            tile_bytes=tile_bytes,
            backend=backend,
            peers=peers,
        )
    if not stats:
        return values
    every = {"lengths": lengths, "token_logps": logps, **token_stats}
    return values, {name: every[name] for name in stats}


@overload
def fused_linear_token_logprob(  # type: ignore[overload-overlap]
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    stats: tuple[()] = (),
    tile_bytes: int | None = None,
    vocab_shard: VocabShard | None = None,
    backend: BackendName = "auto",
) -> Tensor: ...
@overload
def fused_linear_token_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    stats: Sequence[str],
    tile_bytes: int | None = None,
    vocab_shard: VocabShard | None = None,
    backend: BackendName = "auto",
) -> tuple[Tensor, dict[str, Tensor]]: ...
def fused_linear_token_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    stats: Sequence[str] = (),
    tile_bytes: int | None = None,
    vocab_shard: VocabShard | None = None,
    backend: BackendName = "auto",
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Log-probability of each label, in nats, 0 where it is not scored; differentiable.

    Arguments and errors are those of `fused_linear_seq_logprob`. A weight only says here whether a
    token is scored: the result is not multiplied by it. "lengths" is not among the `stats`.

    Returns:
        (B, T) or (N,) float32, float64 for float64 products, aligned with labels: with `shift` the
        first position of each sequence is 0. With stats, a pair of that and a dict from name to
        detached tensor.
    """
    hidden, weight, bias, labels, mask, cu_seqlens, vocab_shard = local_head(
        hidden, weight, bias, labels, mask, cu_seqlens, vocab_shard
    )
    with parallel.peers(vocab_shard, None) as peers:
        _checks.check_choices(None, stats, _checks.SEQUENCE_STATS[1:], ignore_index, backend)
        result, _, logps, token_stats = parallel.uncompiled(_linear_logprob, peers)(
            hidden,
            weight,
            labels,
            mask,
            bias=bias,
            reduction="none",
            shift=shift,
            cu_seqlens=cu_seqlens,
            ignore_index=ignore_index,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            stats=stats,
            tile_bytes=tile_bytes,
            backend=backend,
            peers=peers,
        )
    if not stats:
        return result
    every = {"token_logps": logps, **token_stats}
    return result, {name: every[name] for name in stats}


def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    *,
    bias: Tensor | None,
    reduction: str,
    shift: bool,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    stats: Sequence[str],
    tile_bytes: int | None,
    backend: str,
    peers: Peers | None,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Check, dispatch, and name the stats. Packed tokens are a batch of one to the stages."""
    _checks.check_hidden(hidden, weight, bias, cu_seqlens)
    _checks.check_tokens(hidden, labels, mask, cu_seqlens, "hidden")
    _checks.check_scaling(temperature, logit_scale, softcap)
    _checks.check_tile_bytes(tile_bytes)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        _checks.check_product_dtypes(hidden, weight, bias)
        dtype = hidden.dtype
    if cu_seqlens is not None:
        hidden, labels = hidden[None], labels[None]
        mask = None if mask is None else mask[None]
    if reduction == "none" and mask is not None:  # says only which tokens are scored
        mask = mask != 0
    stage_stats = [name for name in _checks.TOKEN_STATS if name in stats]
    needs = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden, weight, bias)
    ]
    share = 1.0
    if peers is not None:
        stages = resolve_backend(backend, hidden.device, dtype)
        peers.agree(
            labels,
            mask,
            cu_seqlens,
            bool(shift),
            ignore_index,
            sum_dtype(dtype),
            weight.shape[0],
            _head.num_splits,
            {
                "hidden's dtype and size": [str(hidden.dtype), hidden.shape[-1]],
                "dtype of products": str(dtype),
                "reduction": reduction,
                "temperature": float(temperature),
                "logit_scale": float(logit_scale),
                "softcap": softcap,
                "stats": stage_stats,
                "whether hidden requires a gradient": needs[0],
                "backend": stages.name,
            },
        )
        if peers.columns is not None:
            share = peers.columns.width / peers.columns.vocab_size
    if tile_bytes is None:
        default = TILE_BYTES.get(device, TILE_BYTES_ELSEWHERE)
        tile_bytes = max(int(default * share), LEAST_TILE_BYTES)
    result, lengths, logps, token_stats = LinearLogprob.apply(  # type: ignore[no-untyped-call]
        hidden,
        weight,
        bias,
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
        dtype,
        tile_bytes,
        needs,
        backend,
        peers,
    )
    if cu_seqlens is not None:
        logps, token_stats = logps[0], token_stats[:, 0]
        result = result[0] if reduction == "none" else result
    return result, lengths, logps, dict(zip(stage_stats, token_stats, strict=True))
