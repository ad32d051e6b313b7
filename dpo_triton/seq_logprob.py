"""Log-probabilities of label sequences, and of their tokens, from logits."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypedDict, overload

from torch import Tensor
from torch.distributed import ProcessGroup

from ._autograd import Logits, Options, log_probabilities
from ._backends import BackendName
from ._records import Scaling, Tokens, VocabShard

if TYPE_CHECKING:
    from typing_extensions import Unpack

Reduction = Literal["mean", "sum"]
DistributionStat = Literal["entropy", "mean_logit", "top1", "log_sum_sq_probs"]
TokenStat = Literal["token_logps", DistributionStat]
Stat = Literal["lengths", TokenStat]


class ScoreOptions(TypedDict, total=False):
    """What every function takes beside tensors; the functions' docstrings describe it."""

    shift: bool
    ignore_index: int
    temperature: float
    logit_scale: float
    softcap: float | None
    backend: BackendName


class TokenOptions(ScoreOptions, total=False):
    """For the overloads here, and those from hidden states."""

    cu_seqlens: Tensor | None
    vocab_shard: VocabShard | None


class SequenceOptions(TokenOptions, total=False):
    reduction: Reduction
    sequence_group: ProcessGroup | None


@overload
def fused_seq_logprob(  # type: ignore[overload-overlap]
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    stats: tuple[()] = (),
    inplace_backward: bool = False,
    **options: "Unpack[SequenceOptions]",
) -> Tensor: ...
@overload
def fused_seq_logprob(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    stats: Sequence[Stat],
    inplace_backward: bool = False,
    **options: "Unpack[SequenceOptions]",
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
    stats: Sequence[Stat] = (),
    inplace_backward: bool = False,
    vocab_shard: VocabShard | None = None,
    sequence_group: ProcessGroup | None = None,
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
            to at most N. Tokens beyond its last entry are padding: not scored, with a gradient of
            0. An entry that is out of order or beyond N is an error of the PyTorch backend; Triton
            reads nothing outside of the tensors, gives values that mean nothing, and raises only
            with DPO_TRITON_DEBUG=1.
        ignore_index: the label of tokens that do not count.
        temperature: divides the logits; from 1e-15 to 1e15, like the next two.
        logit_scale: multiplies them first (Cohere, Granite).
        softcap: bound of the logits (Gemma), or None.
        stats: names out of "lengths" (sums of weights, per sequence) and, per token and 0 where
            not scored, "token_logps" (nats, not weighted), "entropy" (nats), "mean_logit" (over
            the vocabulary, after scaling), "top1" (1 where the label is the argmax) and
            "log_sum_sq_probs" (log of sum_v p_v ** 2).
        inplace_backward: the backward pass writes the gradient over logits and so saves its
            memory. A second backward pass, or that of another function that saved the logits,
            then raises a RuntimeError; so does this function under saved-tensor hooks
            (non-reentrant checkpointing), where nobody could tell.
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
    scaling = Scaling(temperature, logit_scale, softcap)
    return log_probabilities(
        Logits(logits, inplace_backward),
        Tokens(labels, mask, cu_seqlens, shift, ignore_index),
        Options(reduction, scaling, stats, backend, vocab_shard, sequence_group),
    )


@overload
def fused_token_logprob(  # type: ignore[overload-overlap]
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    stats: tuple[()] = (),
    inplace_backward: bool = False,
    **options: "Unpack[TokenOptions]",
) -> Tensor: ...
@overload
def fused_token_logprob(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    stats: Sequence[TokenStat],
    inplace_backward: bool = False,
    **options: "Unpack[TokenOptions]",
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
    stats: Sequence[TokenStat] = (),
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
    scaling = Scaling(temperature, logit_scale, softcap)
    return log_probabilities(
        Logits(logits, inplace_backward),
        Tokens(labels, mask, cu_seqlens, shift, ignore_index),
        Options(None, scaling, stats, backend, vocab_shard),
    )
