"""Log-probabilities of label sequences, and of their tokens, from hidden states and the head."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

from torch import Tensor
from torch.distributed import ProcessGroup

from ._autograd import Options, log_probabilities
from ._backends import BackendName
from ._head import Head
from ._records import Scaling, Tokens, VocabShard
from .seq_logprob import Reduction, SequenceOptions, Stat, TokenOptions, TokenStat

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def fused_linear_seq_logprob(  # type: ignore[overload-overlap]
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    stats: tuple[()] = (),
    tile_bytes: int | None = None,
    **options: "Unpack[SequenceOptions]",
) -> Tensor: ...
@overload
def fused_linear_seq_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    stats: Sequence[Stat],
    tile_bytes: int | None = None,
    **options: "Unpack[SequenceOptions]",
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
    stats: Sequence[Stat] = (),
    tile_bytes: int | None = None,
    vocab_shard: VocabShard | None = None,
    sequence_group: ProcessGroup | None = None,
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
    scaling = Scaling(temperature, logit_scale, softcap)
    return log_probabilities(
        Head(hidden, weight, bias, tile_bytes),
        Tokens(labels, mask, cu_seqlens, shift, ignore_index),
        Options(reduction, scaling, stats, backend, vocab_shard, sequence_group),
    )


@overload
def fused_linear_token_logprob(  # type: ignore[overload-overlap]
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    stats: tuple[()] = (),
    tile_bytes: int | None = None,
    **options: "Unpack[TokenOptions]",
) -> Tensor: ...
@overload
def fused_linear_token_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    stats: Sequence[TokenStat],
    tile_bytes: int | None = None,
    **options: "Unpack[TokenOptions]",
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
    stats: Sequence[TokenStat] = (),
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
    scaling = Scaling(temperature, logit_scale, softcap)
    return log_probabilities(
        Head(hidden, weight, bias, tile_bytes),
        Tokens(labels, mask, cu_seqlens, shift, ignore_index),
        Options(None, scaling, stats, backend, vocab_shard),
    )
