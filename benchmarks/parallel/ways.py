"""Three ways to score tokens with a head whose vocabulary is sharded, on real processes, and the
bytes that they send."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import dpo_triton
from benchmarks.common.batches import Shape
from benchmarks.common.logits_peers import log_softmax, masked_mean
from benchmarks.common.peers import OURS
from dpo_triton import VocabShard

Way = Callable[[Tensor, Tensor, Tensor, Tensor, VocabShard], Tensor]

GATHERED, MEGATRON = "gathered logits", "three all-reduces"
DESCRIPTIONS = {
    OURS: "fused_linear_seq_logprob(vocab_shard=...): partials gathered once, tiles of logits",
    GATHERED: "every rank gathers all logits, then log_softmax in float32",
    MEGATRON: "maximum, target and sum of exponentials of float32 logits reduced one by one, as "
    "Megatron-LM does (Shoeybi et al. 2019, arXiv:1909.08053)",
}


SCORED_SHARE = 0.5
COLLECTIVES = ("all_gather", "all_to_all_single", "all_reduce")


class Sent:
    """Bytes that this rank hands to each kind of collective, in its context.

    Of all_gather and all_to_all_single for each other rank, of all_reduce what is reduced.
    """

    def __enter__(self) -> "Sent":
        self.calls, self.bytes = 0, dict.fromkeys(COLLECTIVES, 0)
        self._originals = {name: getattr(dist, name) for name in COLLECTIVES}
        for name in COLLECTIVES:
            setattr(dist, name, partial(self._note, name))
        return self

    def __exit__(self, *error: Any) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)

    def _note(self, name: str, *inputs: Any, **options: Any) -> Any:
        self.calls += 1
        mine = inputs[0] if name == "all_reduce" else inputs[1]
        parts = options.get("input_split_sizes")
        self.bytes[name] += max(parts) * mine.element_size() if parts else mine.nbytes
        return self._originals[name](*inputs, **options)

    def counts(self) -> tuple[int, ...]:
        """Of all_gather, all_to_all_single and all_reduce."""
        return tuple(self.bytes.values())

    def leaving(self) -> float:
        """Bytes that leave this rank, of an all-reduce in a ring."""
        size = dist.get_world_size()
        gathered, exchanged, reduced = self.counts()
        return (size - 1) * (gathered + exchanged + 2 / size * reduced)


def measure(shape: Shape, seed: int) -> dict[str, dict[str, Any]]:
    """On a rank: errors against float64, and bytes, of a forward and a backward pass of each."""
    generator = torch.Generator().manual_seed(seed)
    batch = shape.draw(torch.bfloat16, generator)
    hidden, weight, labels = batch.rows, batch.weight, batch.labels
    assert weight is not None
    mask = torch.rand(labels.shape, generator=generator) < SCORED_SHARE
    rank, size = dist.get_rank(), dist.get_world_size()
    width = -(-shape.vocab_size // size)
    shard = VocabShard(rank * width, min((rank + 1) * width, shape.vocab_size))
    rows = slice(shard.start, shard.stop)
    logits = F.linear(hidden.double(), weight.double())
    exact = dpo_triton.reference.seq_logprob(logits, labels, mask)
    results = {}
    for name, way in WAYS.items():
        leaf = hidden.clone().requires_grad_()
        own = weight[rows].clone().requires_grad_()
        with Sent() as forward:
            values = way(leaf, own, labels, mask, shard)
        with Sent() as backward:
            values.sum().backward()
        results[name] = dict(
            values=values.detach(),
            error=float((values.detach() - exact).abs().max()),
            forward=forward.leaving(),
            backward=backward.leaving(),
            calls=forward.calls + backward.calls,
            num_scored=int(mask.sum()),
        )
    return results


class _ToAllRanks(torch.autograd.Function):
    """Hidden states that every rank has; their gradient is what all ranks say of them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        dist.all_reduce(grad)
        return grad


class _Gathered(torch.autograd.Function):
    """Logits (M, W) of a rank to (M, V) of all: shards narrower than the first are filled up."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, shard: VocabShard, vocab_size: int) -> Tensor:
        ctx.columns = slice(shard.start, shard.stop)
        width = -(-vocab_size // dist.get_world_size())
        mine = F.pad(own, (0, width - own.shape[1])).contiguous()
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(every, mine)
        return torch.cat(every, 1)[:, :vocab_size]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[:, ctx.columns].contiguous(), None, None


class _ThreeReductions(torch.autograd.Function):
    """Log-probabilities (M,) from own logits (M, W)."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, labels: Tensor, shard: VocabShard) -> Tensor:
        x = own.float()
        largest = x.amax(1)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        x -= largest[:, None]
        y = labels - shard.start
        is_here = (y >= 0) & (y < own.shape[1])
        y = torch.where(is_here, y, 0)
        target = torch.where(is_here, x.gather(1, y[:, None])[:, 0], 0.0)
        dist.all_reduce(target)
        x.exp_()
        total = x.sum(1)
        dist.all_reduce(total)
        x /= total[:, None]
        ctx.save_for_backward(x, y, is_here)
        ctx.dtype = own.dtype
        return target - total.log()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        p, y, is_here = ctx.saved_tensors
        d = -p * grad[:, None]
        d[torch.arange(len(y)), y] += grad * is_here
        return d.to(ctx.dtype), None, None


def _ours(
    hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, shard: VocabShard
) -> Tensor:
    return dpo_triton.fused_linear_seq_logprob(hidden, weight, labels, mask, vocab_shard=shard)


def _gathered(own: Tensor, labels: Tensor, shard: VocabShard) -> Tensor:
    return log_softmax(_Gathered.apply(own, shard, _vocab_size(shard)), labels)


def _of_scored(logps_of: Callable[[Tensor, Tensor, VocabShard], Tensor]) -> Way:
    """Of scored tokens only: logps_of takes their own logits (M, W) and labels to (M,)."""

    def way(
        hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, shard: VocabShard
    ) -> Tensor:
        own = F.linear(_ToAllRanks.apply(hidden)[mask], weight)
        logps = logps_of(own, labels[mask], shard)
        return masked_mean(torch.zeros(labels.shape).masked_scatter(mask, logps), mask)

    return way


def _vocab_size(shard: VocabShard) -> int:
    stops: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(stops, shard.stop)
    return max(stops)


WAYS: dict[str, Way] = {
    OURS: _ours,
    GATHERED: _of_scored(_gathered),
    MEGATRON: _of_scored(_ThreeReductions.apply),
}
