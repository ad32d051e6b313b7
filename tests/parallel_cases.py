"""What each process of the tests of sharded vocabularies does.

A case is a function of this module that every rank runs on inputs drawn from one seed; what it
returns the test compares, in its own process. `run` runs many, as starting processes takes seconds.
"""

import datetime
import importlib.util
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from processes import with_narrow_tiles
from torch import Tensor

import dpo_triton
from benchmarks.common.measure import map_buffers, peak_mib
from benchmarks.parallel.ways import Sent
from dpo_triton import VocabShard
from dpo_triton._head import backward, forward


class Case(NamedTuple):
    function: Callable[..., Any]
    options: dict[str, Any]


def run(cases: dict[str, Case], seed: int) -> dict[str, Any]:
    """The cases' results on this rank. One that raises does not take the others with it."""
    if importlib.util.find_spec("triton"):  # as in the tests' own process
        with_narrow_tiles()
    results = {}
    for name, (function, options) in cases.items():
        torch.manual_seed(seed)
        try:
            results[name] = function(**options)
        except Exception:
            results[name] = dict(raised=traceback.format_exc())
    return results


def of_ranks(results: list[dict[str, Any]], name: str) -> list[Any]:
    """What a case returned on each rank; what it raised is raised here."""
    found = [of_rank[name] for of_rank in results]
    for rank, result in enumerate(found):
        if isinstance(result, dict) and "raised" in result:
            raise AssertionError(f"rank {rank}: {result['raised']}")
    return found


class Inputs(NamedTuple):
    logits: Tensor  # (B, T, V)
    labels: Tensor  # (B, T)
    mask: Tensor  # float weights, with holes


def inputs(
    batch: int,
    seq_len: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Inputs:
    """The second sequence has no scored token. Drawn on the CPU: the same on every device."""
    logits = (torch.randn(batch, seq_len, vocab_size) * 3).to(dtype)
    tensors = logits, *_tokens(batch, seq_len, vocab_size)
    return Inputs(*(x.to(device) for x in tensors))


class Head(NamedTuple):
    hidden: Tensor  # (B, T, H)
    weight: Tensor  # (V, H)
    bias: Tensor  # (V,)
    labels: Tensor
    mask: Tensor


def head(
    batch: int,
    seq_len: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Head:
    hidden = torch.randn(batch, seq_len, hidden_size).to(dtype)
    weight = (torch.randn(vocab_size, hidden_size) * 3 / hidden_size**0.5).to(dtype)
    bias = torch.randn(vocab_size).to(dtype)
    tensors = hidden, weight, bias, *_tokens(batch, seq_len, vocab_size)
    return Head(*(x.to(device) for x in tensors))


def _tokens(batch: int, seq_len: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, vocab_size, (batch, seq_len))
    mask = torch.rand(batch, seq_len) * 2 * (torch.rand(batch, seq_len) > 0.3)
    mask[1:2] = 0
    return labels, mask


def upstream_of(value: Tensor) -> Tensor:
    """Another gradient for each value."""
    numbers = torch.arange(1, value.numel() + 1, dtype=value.dtype, device=value.device)
    return numbers.view_as(value) / 4


def shard_of(bounds: list[int], order: list[int] | None = None) -> VocabShard:
    """This rank's of the shards between the bounds: rank r has number order[r]."""
    number = dist.get_rank() if order is None else order[dist.get_rank()]
    return VocabShard(bounds[number], bounds[number + 1])


def padded(columns: Tensor, width: int, dim: int) -> Tensor:
    """With so many columns more, which nobody may read."""
    size = list(columns.shape)
    size[dim] = width
    return torch.cat([columns, columns.new_full(size, torch.nan)], dim)


def logits_case(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    bounds: list[int],
    order: list[int] | None = None,
    padding: int = 0,
    function: str = "fused_seq_logprob",
    targets_below: int | None = None,
    is_rounded: bool = False,
    is_packed: bool = False,
    **options: Any,
) -> dict[str, Any]:
    logits, labels, mask = inputs(*shape, dtype, device)
    if targets_below is not None:
        labels %= targets_below
    if is_rounded:  # so that maxima are tied
        logits = logits.round()
    if is_packed:
        batch, seq_len = labels.shape
        options["cu_seqlens"] = torch.arange(batch + 1, device=device) * seq_len
        logits, labels, mask = logits.flatten(0, 1), labels.flatten(), mask.flatten()
    shard = shard_of(bounds, order)
    own = padded(logits[..., shard.start : shard.stop], padding, -1).requires_grad_()
    with Sent() as sent:
        value = getattr(dpo_triton, function)(own * 1, labels, mask, vocab_shard=shard, **options)
    value, stats = value if "stats" in options else (value, {})
    with Sent() as sent_back:
        (grad,) = torch.autograd.grad(value, own, upstream_of(value))
    return dict(
        value=value.detach(),
        stats=stats,
        grad=grad,
        sent=sent.counts(),
        sent_back=sent_back.counts(),
    )


def head_case(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    bounds: list[int],
    is_trained: bool,
    order: list[int] | None = None,
    padding: int = 0,
    under_autocast: bool = False,
    **options: Any,
) -> dict[str, Any]:
    hidden, weight, bias, labels, mask = head(*shape, dtype, device)
    shard = shard_of(bounds, order)
    rows = slice(shard.start, shard.stop)
    hidden.requires_grad_()
    weight = padded(weight[rows], padding, 0).requires_grad_(is_trained)
    bias = padded(bias[rows], padding, 0).requires_grad_(is_trained)
    with Sent() as sent, torch.autocast(device.type, torch.bfloat16, enabled=under_autocast):
        value = dpo_triton.fused_linear_seq_logprob(
            hidden, weight, labels, mask, bias=bias, vocab_shard=shard, **options
        )
    value, stats = value if "stats" in options else (value, {})
    asked = [hidden, weight, bias] if is_trained else [hidden]
    with Sent() as sent_back:
        grads = torch.autograd.grad(value, asked, upstream_of(value))
    return dict(
        value=value.detach(),
        stats=stats,
        grads=grads,
        sent=sent.counts(),
        sent_back=sent_back.counts(),
    )


def failing(function: Callable[[], object]) -> dict[str, Any] | None:
    """What the function raises, and how soon."""
    start = time.monotonic()
    try:
        function()
    except Exception as error:
        seconds = time.monotonic() - start
        return dict(kind=type(error).__name__, message=str(error), seconds=seconds)
    return None


def splits_case(device: torch.device, stats: tuple[str, ...]) -> dict[str, Any]:
    """Shards that end where Triton's splits do, beside the whole, which rank 0 computes."""
    bounds = [
        0,
        16384,
        2 * 16384,
        3 * 16384,
        3 * 16384 + 48,
    ]  # a multiple of 16: aligned as they are
    logits, labels, mask = inputs(2, 3, bounds[-1], torch.bfloat16, device)
    options = dict(stats=stats, backend="triton")
    shard = shard_of(bounds)
    own = logits[..., shard.start : shard.stop].clone().requires_grad_()
    value, found = dpo_triton.fused_seq_logprob(own, labels, mask, vocab_shard=shard, **options)
    results: dict[str, Any] = dict(value=value.detach(), stats=found)
    results["grad"] = torch.autograd.grad(value.sum(), own)[0]
    if dist.get_rank() == 0:
        logits.requires_grad_()
        value, results["whole_stats"] = dpo_triton.fused_seq_logprob(
            logits, labels, mask, **options
        )
        results["whole_value"] = value.detach()
        results["whole_grad"] = torch.autograd.grad(value.sum(), logits)[0]
    return results


def mismatch_case(device: torch.device, kind: str, wrong_rank: int) -> dict[str, Any] | None:
    """Rank wrong_rank passes something else, in shards of 8 columns."""
    rank, size = dist.get_rank(), dist.get_world_size()
    logits, labels, mask = inputs(3, 4, 8 * size, torch.float32, device)
    mask[0, 0] = 1.0
    logits = logits[..., rank * 8 : (rank + 1) * 8]
    start, stop = rank * 8, (rank + 1) * 8
    options: dict[str, Any] = {}
    if rank == wrong_rank:
        if kind == "shape":
            logits, labels, mask = logits[:, :3], labels[:, :3], mask[:, :3]
        elif kind == "labels":
            labels[0, 0] = (labels[0, 0] + 1) % (8 * size)
        elif kind == "mask":
            mask = mask * 0.5
        elif kind == "dtype":
            logits = logits.bfloat16()
        elif kind == "temperature":
            options["temperature"] = 0.7
        elif kind == "stats":
            options["stats"] = ("entropy",)
        elif kind == "overlap":
            start, stop = start - 1, stop - 1
        elif kind == "gap":
            start, logits = start + 1, logits[..., 1:]
        elif kind == "width":
            logits = logits[..., :7]
        elif kind == "labels' dtype":
            labels = labels.float()
        elif kind == "reduction":
            options["reduction"] = "median"
    return failing(
        lambda: dpo_triton.fused_seq_logprob(
            logits, labels, mask, vocab_shard=VocabShard(start, stop), **options
        )
    )


def out_of_vocabulary_case(device: torch.device) -> dict[str, Any] | None:
    rank, size = dist.get_rank(), dist.get_world_size()
    logits, labels, mask = inputs(3, 4, 8 * size, torch.float32, device)
    labels[0, 1], mask[0, 1] = 8 * size, 1.0
    shard = VocabShard(rank * 8, rank * 8 + 8)
    own = logits[..., shard.start : shard.stop]
    return failing(lambda: dpo_triton.fused_seq_logprob(own, labels, mask, vocab_shard=shard))


def failing_stage_case(device: torch.device, stage: str, wrong_rank: int) -> dict[str, Any] | None:
    """A rank runs out of memory in the middle of a pass over a head."""
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden, weight, _, labels, mask = head(3, 4, 8, 5 * size, torch.float32, device)
    mask[0] = 1.0
    shard = VocabShard(5 * rank, 5 * rank + 5)
    own = weight[shard.start : shard.stop].requires_grad_()
    hidden.requires_grad_()
    original = forward.fill_

    def out_of_memory(*args: Any) -> None:
        raise MemoryError("no room for a tile")

    def step(fails: bool = True) -> None:
        if stage == "forward" and rank == wrong_rank and fails:
            forward.fill_ = out_of_memory
        value = dpo_triton.fused_linear_seq_logprob(
            hidden,
            own,
            labels,
            mask,
            vocab_shard=shard,
            tile_bytes=4,  # no tile is kept
        )
        if stage == "backward" and rank == wrong_rank and fails:
            backward.fill_ = out_of_memory
        value.sum().backward()

    step(fails=False)  # compiles, which is not what is timed
    try:
        return failing(step)
    finally:
        forward.fill_ = backward.fill_ = original


def missing_rank_case(
    device: torch.device, wrong_rank: int, timeout_s: float
) -> dict[str, Any] | None:
    """A rank never calls, having failed elsewhere: the group's own timeout ends that."""
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(timeout=datetime.timedelta(seconds=timeout_s))
    logits, labels, mask = inputs(3, 4, 8 * size, torch.float32, device)
    shard = VocabShard(rank * 8, rank * 8 + 8, group)
    own = logits[..., shard.start : shard.stop]
    if rank == wrong_rank:
        return None
    return failing(lambda: dpo_triton.fused_seq_logprob(own, labels, mask, vocab_shard=shard))


def create_graph_case(device: torch.device) -> dict[str, Any] | None:
    shard = shard_of([8 * r for r in range(dist.get_world_size() + 1)])
    hidden, weight, _, labels, mask = head(
        3, 4, 8, 8 * dist.get_world_size(), torch.float32, device
    )
    own = weight[shard.start : shard.stop]
    value = dpo_triton.fused_linear_seq_logprob(
        hidden.requires_grad_(), own, labels, mask, vocab_shard=shard
    )
    return failing(lambda: torch.autograd.grad(value.sum(), hidden, create_graph=True))


def peak_case(
    device: torch.device, shape: tuple[int, int, int, int], kind: str, is_sharded: bool
) -> float | None:
    """MiB above the inputs in a forward and a backward pass, on bfloat16."""
    if not is_sharded and dist.get_rank() > 0:
        return 0.0
    batch, seq_len, hidden_size, vocab_size = shape
    width = -(-vocab_size // dist.get_world_size()) if is_sharded else vocab_size
    start = dist.get_rank() * width
    stop = min(start + width, vocab_size)
    shard = VocabShard(start, stop) if is_sharded else None
    map_buffers()
    if kind == "logits":
        logits, labels, mask = inputs(batch, seq_len, vocab_size, torch.bfloat16, device)
        leaf = logits[..., start:stop].clone().requires_grad_()
        scored: Any = (leaf,)
        function: Any = dpo_triton.fused_seq_logprob
    else:
        leaf, weight, _, labels, mask = head(
            batch, seq_len, hidden_size, vocab_size, torch.bfloat16, device
        )
        leaf.requires_grad_()
        scored = leaf, weight[start:stop].clone().requires_grad_(kind == "trained")
        function = dpo_triton.fused_linear_seq_logprob

    def forward_and_backward() -> tuple[Tensor, ...]:
        value = function(*scored, labels, mask, vocab_shard=shard)
        return torch.autograd.grad(value.sum(), [x for x in scored if x.requires_grad])

    forward_and_backward()  # warm, as the stages' own buffer stays
    return peak_mib(forward_and_backward, device)
