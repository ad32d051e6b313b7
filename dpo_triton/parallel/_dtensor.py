"""DTensors among the arguments: what they say of shards, and this rank's part of them."""

from typing import Any

import torch

from .._autograd import Logits, have_dtensor
from .._head import Head
from .._records import Tokens, VocabShard

_SERVED = (
    "served are logits with placements [Shard({last})] on a mesh of one dimension (vocabulary-"
    "parallel), a weight [Shard(0)] there with hidden [Replicate()] on the same mesh (tensor "
    "parallel), and a weight of Shard(0), and Replicate(), on any mesh with a plain hidden (FSDP2)"
)


def local_logits(
    source: Logits, tokens: Tokens, shard: VocabShard | None
) -> tuple[Logits, Tokens, VocabShard | None]:
    """The arguments as plain tensors, and the shard that DTensor logits are."""
    logits: Any = source.logits
    if not _is_dtensor(logits):
        return source, tokens, shard
    _refuse_both(shard)
    if _placements(logits) != [f"S({logits.ndim - 1})"]:
        raise _not_served("logits", logits, logits.ndim - 1)
    shard = _shard_of(logits, logits.ndim - 1, "logits")
    local = logits.to_local(grad_placements=logits.placements)
    return source._replace(logits=local), _replicated(tokens), shard


def local_head(
    head: Head, tokens: Tokens, shard: VocabShard | None
) -> tuple[Head, Tokens, VocabShard | None]:
    """The arguments as plain tensors: the rows of a head that are here, or all of it, gathered."""
    if not have_dtensor(head.tensors):
        return head, tokens, shard
    _refuse_both(shard)
    hidden: Any = head.hidden
    parts: dict[str, Any] = {"weight": head.weight, "bias": head.bias}
    if _is_dtensor(hidden):
        if _placements(hidden) != ["R"]:
            raise _not_served("hidden", hidden)
        for name, tensor in parts.items():
            if tensor is None:
                continue
            if not _is_dtensor(tensor) or _placements(tensor) != ["S(0)"]:
                raise _not_served(name, tensor)
            if tensor.device_mesh != hidden.device_mesh:
                raise ValueError(
                    f"{name} and hidden must be on the same mesh, got {tensor.device_mesh} and "
                    f"{hidden.device_mesh}; redistribute hidden to the head's"
                )
            shard = _shard_of(tensor, 0, name)
            parts[name] = tensor.to_local(grad_placements=tensor.placements)
        parts["hidden"] = hidden.to_local(grad_placements=hidden.placements)
        tokens = _replicated(tokens)
    else:
        for name, tensor in parts.items():
            if tensor is None:
                continue
            if not _is_dtensor(tensor) or set(_placements(tensor)) - {"R"} != {"S(0)"}:
                raise _not_served(name, tensor)
            parts[name] = _gathered(tensor)
    return head._replace(**parts), tokens, shard


def _is_dtensor(tensor: object) -> bool:
    return have_dtensor((tensor,))


def _placements(tensor: Any) -> list[str]:
    """One short name a dimension of the mesh: S(dim) for Shard, R for Replicate, else as it is."""
    names = []
    for placement in tensor.placements:
        if placement.is_replicate():
            names.append("R")
        elif type(placement).__name__ == "Shard":
            names.append(f"S({placement.dim % tensor.ndim})")
        else:
            names.append(str(placement))
    return names


def _shard_of(tensor: Any, dim: int, name: str) -> VocabShard:
    """This rank's columns: those of torch.chunk, as Shard has it."""
    vocab_size, group = tensor.shape[dim], tensor.device_mesh.get_group()
    width = -(-vocab_size // tensor.device_mesh.size())
    start = min(tensor.device_mesh.get_local_rank() * width, vocab_size)
    stop = min(start + width, vocab_size)
    here = tensor.to_local().shape[dim]
    if here != stop - start:
        raise ValueError(
            f"{name} is a DTensor of {vocab_size} tokens in Shard({dim}), of which this rank has "
            f"{here}, not the {stop - start} of torch.chunk; pass its local tensor and a VocabShard"
        )
    return VocabShard(start, stop, group)


def _replicated(tokens: Tokens) -> Tokens:
    """Plain tensors of what stands beside a sharded tensor."""
    local: dict[str, Any] = {}
    for name in ("labels", "mask", "cu_seqlens"):
        tensor: Any = getattr(tokens, name)
        if _is_dtensor(tensor):
            if set(_placements(tensor)) != {"R"}:
                raise ValueError(
                    "labels, mask and cu_seqlens must be plain tensors or replicated DTensors, got "
                    f"placements {list(tensor.placements)}; call redistribute, or to_local"
                )
            local[name] = tensor.to_local()
    return tokens._replace(**local)


class _Averaged(torch.autograd.Function):
    """The gradients that a mesh's ranks add up, divided by their number, as FSDP2 has it."""

    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Any:
        ctx.num_ranks = tensor.device_mesh.size()
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad / ctx.num_ranks


def _gathered(tensor: Any) -> Any:
    from torch.distributed.tensor import Partial

    if torch.is_grad_enabled() and tensor.requires_grad:
        tensor = _Averaged.apply(tensor)  # type: ignore[no-untyped-call]
    return tensor.full_tensor(grad_placements=[Partial()] * tensor.device_mesh.ndim)


def _refuse_both(shard: VocabShard | None) -> None:
    if shard is not None:
        raise ValueError(
            "vocab_shard is for plain tensors, and a DTensor was passed, which says itself what "
            "this rank has; leave vocab_shard out, or pass to_local()"
        )


def _not_served(name: str, tensor: Any, last: int = 2) -> ValueError:
    got = f"placements {list(tensor.placements)}" if _is_dtensor(tensor) else "a plain tensor"
    return ValueError(f"{name} got {got}; {_SERVED.format(last=last)}")
