"""Every complaint about inputs; those that read values, and so wait for a GPU, come last."""

import operator
from collections.abc import Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._backends import BACKEND_NAMES
from ._records import Scaling, Tokens

if TYPE_CHECKING:
    from ._autograd import Options

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum")
# In the order of the partials' channels.
TOKEN_STATS = ("entropy", "mean_logit", "top1", "log_sum_sq_probs")
SEQUENCE_STATS = ("lengths", "token_logps", *TOKEN_STATS)


def check_logits(logits: Tensor, cu_seqlens: Tensor | None, inplace_backward: bool) -> None:
    """Dtype, layout and dimensions of logits."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a torch.Tensor, got {type(logits).__name__}")
    if logits.dtype not in LOGITS_DTYPES:
        raise TypeError(
            f"logits must be float32, bfloat16, float16 or float64, got {logits.dtype}; "
            "pass the model's logits, not token ids"
        )
    if logits.device.type == "mps":
        raise ValueError(
            "logits are on an mps device, which has no float64 for the sums over tokens; "
            "pass logits.cpu() and labels.cpu()"
        )
    if cu_seqlens is None and logits.ndim != 3:
        raise ValueError(
            f"logits must be (B, T, V), got {tuple(logits.shape)}; for packed (N, V) logits pass "
            "cu_seqlens, for one sequence logits[None] and labels[None]"
        )
    if cu_seqlens is not None and logits.ndim != 2:
        raise ValueError(
            f"logits must be (N, V) with cu_seqlens, got {tuple(logits.shape)}; "
            "drop cu_seqlens for a padded batch, or flatten to logits.view(-1, V)"
        )
    if logits.shape[-1] == 0:
        raise ValueError(
            "logits must have at least one token in their last dimension, the vocabulary, got "
            f"shape {tuple(logits.shape)}"
        )
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(
            "logits must be contiguous in their last dimension, the vocabulary, got strides "
            f"{tuple(logits.stride())}; call logits.contiguous(), or transpose before the head"
        )
    if inplace_backward and _rows_overlap(logits):
        raise ValueError(
            f"inplace_backward=True needs rows that do not share memory, got logits of shape "
            f"{tuple(logits.shape)} and strides {tuple(logits.stride())}; logits made by expand() "
            "or as_strided() cannot hold their own gradient: pass logits.contiguous()"
        )


def _rows_overlap(logits: Tensor) -> bool:
    """Whether a step along a dimension may land in what smaller steps cover."""
    covered = logits.shape[-1]
    leading = zip(logits.stride()[:-1], logits.shape[:-1], strict=True)
    for stride, size in sorted(step for step in leading if step[1] > 1):
        if stride < covered:
            return True
        covered += stride * (size - 1)
    return False


def check_hidden(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    """Dtype, dimensions and device of hidden states and head."""
    tensors = {"hidden": hidden, "weight": weight}
    if bias is not None:
        tensors["bias"] = bias
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in LOGITS_DTYPES:
            raise TypeError(
                f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}"
            )
        if tensor.device.type == "mps":
            raise ValueError(
                f"{name} is on an mps device, which has no float64 for the sums over tokens; "
                f"pass {name}.cpu()"
            )
        if tensor.device != hidden.device:
            raise ValueError(
                f"{name} must be on the device of hidden, {hidden.device}, got {tensor.device}; "
                f"pass {name}.to(hidden.device)"
            )
    if cu_seqlens is None and hidden.ndim != 3:
        raise ValueError(
            f"hidden must be (B, T, H), got {tuple(hidden.shape)}; for packed (N, H) hidden states "
            "pass cu_seqlens, for one sequence hidden[None] and labels[None]"
        )
    if cu_seqlens is not None and hidden.ndim != 2:
        raise ValueError(
            f"hidden must be (N, H) with cu_seqlens, got {tuple(hidden.shape)}; "
            "drop cu_seqlens for a padded batch, or flatten to hidden.flatten(0, 1)"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        cure = "pass weight.t()" if weight.shape[:1] == hidden.shape[-1:] else "pass lm_head.weight"
        raise ValueError(
            f"weight must be (V, H) = (V, {hidden.shape[-1]}) for hidden {tuple(hidden.shape)}, "
            f"got {tuple(weight.shape)}; {cure}"
        )
    if weight.numel() == 0:
        raise ValueError(
            f"weight must have at least one token and one feature, got {tuple(weight.shape)}; "
            "a sharded one must be gathered first"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must be (V,) = ({weight.shape[0]},) for weight {tuple(weight.shape)}, "
            f"got {tuple(bias.shape)}"
        )


def check_product_dtypes(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """One dtype, where autocast does not choose it."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(
                f"{name} must have the dtype of hidden, {hidden.dtype}, got {tensor.dtype}; "
                f"pass hidden.to({name}.dtype), or run under torch.autocast"
            )


def check_tile_bytes(tile_bytes: int | None) -> None:
    """A positive number of bytes."""
    if tile_bytes is None:
        return
    if isinstance(tile_bytes, bool) or not isinstance(tile_bytes, int):
        raise TypeError(f"tile_bytes must be an int or None, got {type(tile_bytes).__name__}")
    if tile_bytes <= 0:
        raise ValueError(
            f"tile_bytes must be positive, got {tile_bytes}; None is the default of the device"
        )


def check_tokens(logits: Tensor, tokens: Tokens, name_of_logits: str) -> None:
    """Shape, dtype and device of what stands beside the logits, or what they are made of."""
    labels, mask, cu_seqlens, _, _ = tokens
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor, got {type(labels).__name__}")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must have shape {tuple(logits.shape[:-1])} for {name_of_logits} "
            f"{tuple(logits.shape)}, got {tuple(labels.shape)}; labels[b, t] is scored by "
            f"{name_of_logits}[b, t]: for next tokens pass both whole, with shift=True"
        )
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32, got {labels.dtype}; call labels.long()")
    tensors = {"labels": labels}
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a torch.Tensor or None, got {type(mask).__name__}")
        if mask.shape != labels.shape:
            raise ValueError(
                f"mask must have the shape of labels, {tuple(labels.shape)}, got "
                f"{tuple(mask.shape)}; with shift=True it is taken at the label: slice neither"
            )
        if mask.dtype.is_complex:
            raise TypeError(f"mask must be bool, integer or floating, got {mask.dtype}")
        if mask.requires_grad:
            raise ValueError(
                "mask must not require a gradient, which is not computed; pass mask.detach()"
            )
        tensors["mask"] = mask
    if cu_seqlens is not None:
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
            got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
            raise TypeError(f"cu_seqlens must be an int32 or int64 tensor, got {got}")
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(
                f"cu_seqlens must have shape (S + 1,), got {tuple(cu_seqlens.shape)}; "
                "it is the running sum of the sequences' lengths with a 0 in front"
            )
        tensors["cu_seqlens"] = cu_seqlens
    for name, tensor in tensors.items():
        if tensor.device != logits.device:
            raise ValueError(
                f"{name} must be on the device of {name_of_logits}, {logits.device}, got "
                f"{tensor.device}; pass {name}.to({name_of_logits}.device)"
            )


# Far beyond any model's numbers; inside, no product of theirs leaves float32's range.
LEAST_SCALE, LARGEST_SCALE = 1e-15, 1e15


def checked_scaling(scaling: Scaling) -> Scaling:
    """Positive, finite numbers, as Python's."""
    numbers: dict[str, Any] = {}
    for name, value in scaling._asdict().items():
        if value is None and name == "softcap":
            numbers[name] = None
            continue
        if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}{_cure(value)}")
        number = value if type(value) is float else float(value)
        if not LEAST_SCALE <= number <= LARGEST_SCALE:
            cure = "; pass None for no cap" if name == "softcap" else ""
            raise ValueError(
                f"{name} must be positive and finite, from {LEAST_SCALE} to {LARGEST_SCALE}, got "
                f"{value}{cure}"
            )
        numbers[name] = number
    return Scaling(**numbers)


def _cure(value: object) -> str:
    if isinstance(value, Tensor) and value.numel() == 1:
        return "; of a tensor pass .item(), which waits for the device"
    if isinstance(value, Tensor):
        return (
            f" of shape {tuple(value.shape)}; for one per sequence or token divide the logits "
            "themselves, as in logits / temperature[:, None, None], or the hidden states of a head "
            "without a bias"
        )
    return ""


def checked_index(ignore_index: Any) -> int:
    """An integer of int64, as Python's."""
    index = ignore_index if type(ignore_index) is int else _index(ignore_index)
    if not -(2**63) <= index < 2**63:
        raise ValueError(
            f"ignore_index must be in int64, from -2**63 to 2**63 - 1, got {ignore_index}; no "
            "label is beyond that: to ignore none pass one that is not used, such as -1"
        )
    return index


def _index(ignore_index: Any) -> int:
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, Integral):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    return operator.index(ignore_index)


def check_no_tangents(inputs: Mapping[str, object]) -> None:
    """No dual numbers: their tangents would be dropped, and derivatives be 0."""
    for name, tensor in inputs.items():
        if isinstance(tensor, Tensor) and _has_tangent(tensor):
            raise NotImplementedError(
                f"{name} must not carry a tangent, got a dual tensor: dpo_triton has no "
                "forward-mode AD (torch.func.jvp, torch.autograd.forward_ad); take "
                "torch.autograd.grad, or dpo_triton.reference, which is plain PyTorch"
            )


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def check_choices(options: "Options") -> None:
    """Names out of a list."""
    reduction, _, stats, backend, *_ = options
    if reduction is not None and reduction not in REDUCTIONS:
        raise ValueError(
            f'reduction must be "mean" or "sum", got {reduction!r}; '
            "for one value per token use fused_token_logprob or fused_linear_token_logprob"
        )
    if isinstance(stats, str):
        raise string_of_stats(stats)
    # A value per token has no sequences, and so no lengths.
    allowed = SEQUENCE_STATS[1:] if reduction is None else SEQUENCE_STATS
    for name in stats:
        if name not in allowed:
            raise ValueError(f"stats must be out of {', '.join(allowed)}; got {name!r}")
    if backend not in BACKEND_NAMES:
        *names, last = (f'"{name}"' for name in BACKEND_NAMES)
        raise ValueError(f"backend must be {', '.join(names)} or {last}, got {backend!r}")


def string_of_stats(stats: str) -> TypeError:
    """A name alone would be a sequence of letters."""
    return TypeError(
        f'stats must be a sequence of names, got the string {stats!r}; pass ("{stats}",)'
    )


def check_values(tokens: Tokens, weights: Tensor, vocab_size: int) -> None:
    """What shapes do not say: cu_seqlens, and labels of non-zero weight (B, T)."""
    labels, cu_seqlens = tokens.labels, tokens.cu_seqlens
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, labels.numel())
    _check_scored_labels(labels, weights, vocab_size, cu_seqlens is not None)


def _check_cu_seqlens(cu_seqlens: Tensor, num_tokens: int) -> None:
    """Whether packed sequences follow each other inside of the tokens."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] > num_tokens or sorted(bounds) != bounds:
        shown = bounds if len(bounds) <= 8 else [*bounds[:4], "...", bounds[-1]]
        raise ValueError(
            f"cu_seqlens must rise from 0 to at most the number of tokens, {num_tokens}, got "
            f"{shown}; it is the running sum of the sequences' lengths with a 0 in front, and what "
            "comes after its last entry is padding"
        )


def _check_scored_labels(labels: Tensor, weights: Tensor, vocab_size: int, is_packed: bool) -> None:
    """Whether the labels (B, T) of non-zero weight lie in the vocabulary."""
    outside = ((weights != 0) & ((labels < 0) | (labels >= vocab_size))).nonzero()
    if len(outside) > 0:
        b, t = outside[0].tolist()
        position = f"{t}" if is_packed else f"{b}, {t}"
        raise IndexError(
            f"labels[{position}] is {int(labels[b, t])}, outside of the vocabulary "
            f"[0, {vocab_size}), and so are {len(outside)} scored labels in all; "
            "mask them, or set them to ignore_index"
        )
