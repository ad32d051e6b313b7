"""What each process does in the tests of sharded sequences and of DTensors."""

from typing import Any

import torch
import torch.distributed as dist
from parallel_cases import failing, head, inputs, shard_of, upstream_of
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import dpo_triton
from dpo_triton import VocabShard


def part_of(x: Tensor, bounds: list[int], number: int) -> Tensor:
    """The tokens between two bounds of each sequence, (B, T, ...)."""
    return x[:, bounds[number] : bounds[number + 1]]


def sequence_case(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    bounds: list[int],
    is_packed: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """The tokens between the bounds are this rank's; the others' have no scored token, if so."""
    rank = dist.get_rank()
    logits, labels, mask = (part_of(x, bounds, rank) for x in inputs(*shape, dtype, device))
    if is_packed:
        options["cu_seqlens"] = torch.arange(shape[0] + 1, device=device) * labels.shape[1]
        logits, labels, mask = logits.flatten(0, 1), labels.flatten(), mask.flatten()
    leaf = logits.clone().requires_grad_()
    value, stats = dpo_triton.fused_seq_logprob(
        leaf,
        labels,
        mask,
        sequence_group=dist.group.WORLD,
        stats=("lengths", "token_logps"),
        **options,
    )
    grad = torch.autograd.grad(value, leaf, upstream_of(value))[0]
    return dict(value=value.detach(), stats=stats, grad=grad)


def sequence_head_case(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    bounds: list[int],
    is_trained: bool,
) -> dict[str, Any]:
    rank = dist.get_rank()
    hidden, weight, bias, labels, mask = head(*shape, dtype, device)
    leaf = part_of(hidden, bounds, rank).clone().requires_grad_()
    weight.requires_grad_(is_trained)
    value = dpo_triton.fused_linear_seq_logprob(
        leaf,
        weight,
        part_of(labels, bounds, rank),
        part_of(mask, bounds, rank),
        bias=bias,
        sequence_group=dist.group.WORLD,
    )
    asked = [leaf, weight] if is_trained else [leaf]
    grads = torch.autograd.grad(value, asked, upstream_of(value))
    return dict(value=value.detach(), grads=grads)


def both_case(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    failing_rank: int | None = None,
) -> Any:
    """Two shards of the vocabulary by two of the sequences."""
    mesh = init_device_mesh(device.type, (2, 2), mesh_dim_names=("sequence", "vocab"))
    place, number = mesh.get_local_rank("sequence"), mesh.get_local_rank("vocab")
    hidden, weight, bias, labels, mask = head(*shape, dtype, device)
    bounds = [0, 2, shape[1]]
    half = weight.shape[0] // 3
    start, stop = [(0, half), (half, weight.shape[0])][number]
    leaf = part_of(hidden, bounds, place).clone().requires_grad_()
    labels = part_of(labels, bounds, place)
    if dist.get_rank() == failing_rank:
        labels = labels.float()

    def step() -> Tensor:
        return dpo_triton.fused_linear_seq_logprob(
            leaf,
            weight[start:stop],
            labels,
            part_of(mask, bounds, place),
            bias=bias[start:stop],
            vocab_shard=VocabShard(start, stop, mesh.get_group("vocab")),
            sequence_group=mesh.get_group("sequence"),
        )

    if failing_rank is not None:
        return failing(step)
    value = step()
    grad = torch.autograd.grad(value, leaf, upstream_of(value))[0]
    return dict(value=value.detach(), grad=grad, place=place)


def sequence_error_case(device: torch.device, kind: str, wrong_rank: int) -> Any:
    logits, labels, mask = inputs(3, 4, 8, torch.float32, device)
    options: dict[str, Any] = {}
    is_wrong = dist.get_rank() == wrong_rank
    if kind == "shift":
        options["shift"] = True
    elif kind == "batch" and is_wrong:
        logits, labels, mask = logits[:2], labels[:2], mask[:2]
    elif kind == "reduction" and is_wrong:
        options["reduction"] = "sum"
    elif kind == "labels' dtype" and is_wrong:
        labels = labels.float()
    return failing(
        lambda: dpo_triton.fused_seq_logprob(
            logits, labels, mask, sequence_group=dist.group.WORLD, **options
        )
    )


# DTensors.


def dtensor_logits_case(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    are_labels_dtensors: bool,
) -> dict[str, Any]:
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    logits, labels, mask = inputs(*shape, dtype, device)
    leaf = distribute_tensor(logits, mesh, [Shard(-1)]).requires_grad_()
    if are_labels_dtensors:
        labels = distribute_tensor(labels, mesh, [Replicate()])
    value = dpo_triton.fused_seq_logprob(leaf, labels, mask)
    grad: Any = torch.autograd.grad(value, leaf, upstream_of(value))[0]
    assert isinstance(grad, DTensor)
    assert grad.placements == leaf.placements
    return dict(value=value.detach(), grad=grad.full_tensor())


def tensor_parallel_case(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    is_trained: bool,
) -> dict[str, Any]:
    """Hidden states are replicated, the head is in shards and never whole."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    hidden, weight, bias, labels, mask = head(*shape, dtype, device)
    states = distribute_tensor(hidden, mesh, [Replicate()]).requires_grad_()
    weight, bias = (
        distribute_tensor(x, mesh, [Shard(0)]).requires_grad_(is_trained) for x in (weight, bias)
    )
    value = dpo_triton.fused_linear_seq_logprob(states, weight, labels, mask, bias=bias)
    asked = [states, weight, bias] if is_trained else [states]
    grads: Any = torch.autograd.grad(value, asked, upstream_of(value))
    assert grads[0].placements == (Replicate(),)
    if is_trained:
        assert grads[1].placements == (Shard(0),)
    local = grads[0].to_local()
    return dict(value=value.detach(), grads=[local, *(x.full_tensor() for x in grads[1:])])


def data_parallel_case(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    mesh_shape: tuple[int, ...],
) -> dict[str, Any]:
    """Another batch on each rank, and one head in shards, as FSDP2 (or HSDP) keeps it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device.type, mesh_shape)
    placements = [Replicate()] * (len(mesh_shape) - 1) + [Shard(0)]
    batch, *rest = shape
    hidden, weight, _, labels, mask = head(batch * size, *rest, dtype, device)
    own = slice(rank * batch, (rank + 1) * batch)
    leaf = hidden[own].clone().requires_grad_()
    weight = distribute_tensor(weight, mesh, placements).requires_grad_()
    value = dpo_triton.fused_linear_seq_logprob(leaf, weight, labels[own], mask[own])
    grads: Any = torch.autograd.grad(value.sum(), [leaf, weight])
    assert grads[1].placements == tuple(placements)
    return dict(value=value.detach(), grad=grads[0], weight_grad=grads[1].full_tensor())


def frees_the_whole_head_case(device: torch.device) -> bool:
    """Of a head that does not train, nothing of its size is held until the backward pass."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    hidden, weight, _, labels, mask = head(2, 3, 8, 64, torch.float32, device)
    weight = distribute_tensor(weight, mesh, [Shard(0)])
    held = []

    def note(x: Tensor) -> Tensor:
        held.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        dpo_triton.fused_linear_seq_logprob(hidden.requires_grad_(), weight, labels, mask)
    return (64, 8) not in [tuple(shape) for shape in held]


def placement_errors_case(device: torch.device) -> list[Any]:
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    flat = init_device_mesh(device.type, (2, 2), mesh_dim_names=("data", "tensor"))
    hidden, weight, bias, labels, _ = head(4, 4, 8, 16, torch.float32, device)
    logits = torch.randn(4, 4, 16, device=device)
    sharded = distribute_tensor(weight, mesh, [Shard(0)])
    states = distribute_tensor(hidden, mesh, [Replicate()])
    linear, plain = dpo_triton.fused_linear_seq_logprob, dpo_triton.fused_seq_logprob
    calls: list[Any] = [
        lambda: plain(distribute_tensor(logits, mesh, [Shard(1)]), labels),
        lambda: plain(distribute_tensor(logits, mesh, [Replicate()]), labels),
        lambda: plain(distribute_tensor(logits, flat, [Shard(0), Shard(2)]), labels),
        lambda: linear(hidden, distribute_tensor(weight, mesh, [Shard(1)]), labels),
        lambda: linear(hidden, distribute_tensor(weight, mesh, [Replicate()]), labels),
        lambda: linear(hidden, sharded, labels, bias=bias),
        lambda: linear(distribute_tensor(hidden, mesh, [Shard(1)]), sharded, labels),
        lambda: linear(states, weight, labels),
        lambda: linear(states, sharded, labels, bias=bias),
        lambda: linear(hidden, sharded, labels, vocab_shard=shard_of([0, 4, 8, 12, 16])),
        lambda: plain(
            distribute_tensor(logits, mesh, [Shard(2)]),
            distribute_tensor(labels, mesh, [Shard(0)]),
        ),
    ]
    return [failing(call) for call in calls]
