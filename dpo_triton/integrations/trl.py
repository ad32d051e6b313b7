"""TRL: the head of its DPO and KTO trainers, and the log-probabilities of the others, fused.

    import dpo_triton.integrations.trl

    with dpo_triton.integrations.trl.fused():  # or: undo = enable(); ...; undo()
        trainer.train()

Since TRL 1.15, DPO, KTO and every other trainer with TRL's fused head make no logits:
`chunked_log_probs` takes the place of its `ChunkedLogProbFunction`, and rows that are not scored
are dropped before the head on every device (TRL's own keeps them on a CPU). CPO, SimPO and ORPO
call `get_batch_logps` with logits, and before 1.15 all trainers call `selective_log_softmax`.
Enabling imports trl.experimental, which warns unless TRL_EXPERIMENTAL_SILENCE is set.
"""

from typing import Any

import torch
from torch import Tensor

from ..linear import fused_linear_token_logprob
from ..seq_logprob import DistributionStat, Reduction, fused_seq_logprob, fused_token_logprob
from ._patching import Integration, Replacement

__all__ = ["chunked_log_probs", "enable", "fused", "get_batch_logps", "selective_log_softmax"]

# TRL's names of what its head returns after the log-probabilities, in its order, and ours.
_STATS: dict[str, DistributionStat] = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "top1",
}

_NO_LABEL = -(2**31)  # a negative label is a mistake


def chunked_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int | None = None,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = tuple(_STATS),
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Log-probabilities of targets under the head, in nats, and what TRL logs beside them.

    Args:
        hidden: (N, H) floating. Without autocast the product is in its dtype.
        weight: (V, H) floating.
        bias: (V,) or None.
        targets: (N,) int64; all are scored.
        temperature: divides the logits; positive.
        chunk_size: not used; tiles are as large as `fused_linear_token_logprob` makes them.
        final_logit_softcapping: bound of the logits, or None.
        logit_scale: multiplies the logits first; positive.
        outputs: which of "entropy", "log_sum_sq_probs", "mean_logits" and "is_top1" to return.

    Returns:
        Five of (N,), None where not asked for: log-probabilities, which alone are differentiable,
        entropy (nats), log of sum_v p_v ** 2, the mean of the scaled logits, and whether the target
        is the first of the largest logits. float32, float64 for float64 products; the last bool.

    Raises:
        ValueError, TypeError, IndexError: those of `dpo_triton.fused_linear_token_logprob`.
        NotImplementedError: a loss on the entropy, in its backward pass; a head that trains and is
            partitioned by DeepSpeed ZeRO-3.

    Source: `kernels/chunked_logprob.py` of TRL.
    """
    if torch.is_grad_enabled() and weight.requires_grad and hasattr(weight, "ds_id"):
        raise NotImplementedError(
            "weight is partitioned by DeepSpeed ZeRO-3, whose head is not there in the backward "
            "pass; train with ZeRO-2, or with LoRA and a head that does not train, or undo this"
        )
    if not torch.is_autocast_enabled(hidden.device.type):
        weight = weight.to(hidden.dtype)
        bias = None if bias is None else bias.to(hidden.dtype)
    logps, stats = fused_linear_token_logprob(
        hidden[None],
        weight,
        targets[None],
        bias=bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=final_logit_softcapping,
        # token_logps are free, and with them there always is a dict
        stats=("token_logps", *(_STATS[name] for name in _STATS if name in outputs)),
    )
    entropy, log_sum_sq_probs, mean_logits, top1 = (
        stats[name][0] if name in stats else None for name in _STATS.values()
    )
    if entropy is not None:
        entropy = _OnlyLogged.apply(entropy, logps)  # type: ignore[no-untyped-call]
    return logps[0], entropy, log_sum_sq_probs, mean_logits, None if top1 is None else top1 != 0


class _OnlyLogged(torch.autograd.Function):
    """The entropy, in the graph: a loss on it is refused, where a detached one would be ignored."""

    @staticmethod
    def forward(ctx: Any, entropy: Tensor, logps: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)  # DistributedDataParallel asks for the gradient of all
        return entropy.clone()

    @staticmethod
    def backward(ctx: Any, grad_entropy: Tensor | None) -> tuple[None, None]:
        if grad_entropy is None or not grad_entropy.any():
            return None, None
        raise NotImplementedError(
            "the entropy of dpo_triton.integrations.trl has no gradient, and a loss uses it; train "
            "with entropy_coef=0, or undo this for a trainer with an entropy bonus"
        )


def get_batch_logps(
    logits: Tensor, labels: Tensor, average_log_prob: bool = False, is_encoder_decoder: bool = False
) -> Tensor:
    """Sum, or mean over its scored tokens, of each sequence's log-probabilities, in nats.

    Args:
        logits: (B, T, V) floating; position t scores `labels[:, t + 1]`.
        labels: (B, T) int64; a token of -100 counts for nothing.
        average_log_prob: the mean, as SimPO, ORPO and IPO have it.
        is_encoder_decoder: position t scores `labels[:, t]`.

    Returns:
        (B,) float32, also for 16-bit logits; float64 for float64 ones. 0 for a sequence without a
        scored token, where TRL's own mean is NaN.

    Raises:
        ValueError, TypeError, IndexError: those of `dpo_triton.fused_seq_logprob`.

    Source: `experimental/cpo/cpo_trainer.py` of TRL.
    """
    reduction: Reduction = "mean" if average_log_prob else "sum"
    return fused_seq_logprob(logits, labels, reduction=reduction, shift=not is_encoder_decoder)


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-probabilities at index under `logits / temperature`, in nats.

    Args:
        logits: (..., V) floating, of at least two dimensions.
        index: (...) int64, or (..., K) for K of each row.
        temperature: positive.
        row_mask: shape of index; 0 where a token counts for nothing, or None.

    Returns:
        The shape of index: float32, as on TRL's GPU path, also for 16-bit logits; float64 for
        float64 ones. 0 where row_mask is.

    Raises:
        ValueError, TypeError, IndexError: those of `dpo_triton.fused_token_logprob`.

    Source: `trainer/utils.py` of TRL.
    """
    if index.ndim == logits.ndim:
        masks = [None] * index.shape[-1] if row_mask is None else row_mask.unbind(-1)
        columns = [
            selective_log_softmax(logits, column, temperature, mask)
            for column, mask in zip(index.unbind(-1), masks, strict=True)
        ]
        return torch.stack(columns, -1)
    # logits[:, :-1] is no view of (N, V): time stays a dimension of its own.
    mask = None if row_mask is None else row_mask.reshape(-1, *row_mask.shape[-1:])
    logps = fused_token_logprob(
        logits.reshape(-1, *logits.shape[-2:]),
        index.reshape(-1, *index.shape[-1:]),
        mask,
        ignore_index=_NO_LABEL,
        temperature=temperature,
    )
    return logps.view(index.shape)


def _selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    return selective_log_softmax(logits, index)


def _always(device: torch.device) -> bool:
    return True


_PLAIN = (  # selective_log_softmax(logits, index)
    *("0.29.1", "1.0.0", "1.1.0", "1.2.0", "1.3.0", "1.4.0", "1.5.0", "1.5.1", "1.6.0", "1.7.0"),
    *("1.7.1", "1.8.0", "1.9.0", "1.9.1", "1.9.2", "1.10.0", "1.11.0", "1.12.0", "1.13.0"),
)
_WITH_HEAD = ("1.15.0", "1.16.0")
_WITH_OPTIONS = ("1.14.0", "1.14.1", "1.14.2", *_WITH_HEAD)
_integration = Integration(
    framework="TRL",
    distribution="trl",
    tested=(*_PLAIN, *_WITH_OPTIONS),
    replacements=(
        Replacement(
            "trl.kernels.chunked_logprob", "ChunkedLogProbFunction", chunked_log_probs, _WITH_HEAD
        ),
        # Whether the head drops the rows that are not scored; TRL: where its Triton kernels run.
        Replacement("trl.trainer.utils", "_use_triton", _always, ("1.16.0",)),
        Replacement(
            "trl.trainer.utils", "selective_log_softmax", selective_log_softmax, _WITH_OPTIONS
        ),
        Replacement("trl.trainer.utils", "selective_log_softmax", _selective_log_softmax, _PLAIN),
        *(
            Replacement(f"trl.experimental.{owner}", "get_batch_logps", get_batch_logps)
            for owner in ("cpo.cpo_trainer:CPOTrainer", "orpo.orpo_trainer:ORPOTrainer")
        ),
    ),
)
enable = _integration.enable
fused = _integration.fused
