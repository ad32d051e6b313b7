"""How many operators and kernels the host starts in a pass of the head."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks.common import goals
from benchmarks.common.cases import HEADS
from benchmarks.common.goals import Goal
from benchmarks.common.peers import OURS, Peer
from benchmarks.common.report import BACKWARD, FORWARD, shown
from benchmarks.head.peers import TRL
from dpo_triton._head import _autograd, _operators
from gpu_lab.driver import Lab
from gpu_lab.operators import Operators

MOST_LAUNCHES = 16  # of a pass
MOST_FROZEN_OPERATORS = 70  # of the backward pass


@dataclass(frozen=True)
class Count:
    impl: str = shown("implementation")
    head: str = shown("head")  # trained or frozen
    passes: str = shown("pass")
    operators: int = shown("operators")  # of aten, views too
    launches: int = shown("Triton launches")


@contextlib.contextmanager
def opened() -> Iterator[None]:
    """Have the head call the bodies of its operators, as which alone they would be seen, and take
    the tiles that it takes on a GPU."""
    names = ("linear_logprob", "linear_logprob_grad")
    before = {name: getattr(_autograd, name) for name in names}
    of_cpu = _autograd.TILE_BYTES.pop("cpu")
    for name in names:
        setattr(_autograd, name, getattr(_operators, f"_{name}"))
    try:
        yield
    finally:
        _autograd.TILE_BYTES["cpu"] = of_cpu
        for name, operator in before.items():
            setattr(_autograd, name, operator)


def count(
    lab: Lab, heads: Sequence[Peer], num_tokens: int, hidden_size: int, vocab_size: int
) -> list[Count]:
    """Count the passes of heads, trained and frozen, on two sequences of which all is scored."""
    rows = []
    weight = torch.zeros(vocab_size, hidden_size, dtype=torch.bfloat16)
    hidden = torch.zeros(2, num_tokens // 2, hidden_size, dtype=torch.bfloat16)
    labels = torch.zeros(hidden.shape[:2], dtype=torch.int64)
    mask, ones = torch.ones_like(labels), torch.ones(2)
    for peer in heads:
        for trains_weight, head in HEADS.items():
            leaves = [hidden.clone().requires_grad_(), weight.clone()]
            leaves[1].requires_grad_(trains_weight)
            lab.records.clear()
            with opened(), Operators() as forward:
                values = peer.fn(*leaves, labels, mask)
            launched = len(lab.records)
            needed = leaves if trains_weight else leaves[:1]
            with opened(), Operators() as backward:
                torch.autograd.grad(values, needed, ones)
            launches = (launched, len(lab.records) - launched)
            for passes, seen, n in zip(
                (FORWARD, BACKWARD), (forward, backward), launches, strict=True
            ):
                rows.append(Count(peer.name, head, passes, len(seen.started), n))
    return rows


def judge(rows: Sequence[Count]) -> Iterator[Goal]:
    """Of our head, beside TRL's where that was counted."""
    theirs = {(row.head, row.passes): row.operators for row in rows if row.impl == TRL}
    for row in (row for row in rows if row.impl == OURS):
        where = f"{row.head} head, {row.passes}"
        most = theirs.get((row.head, row.passes))
        if most is not None:
            yield goals.at_most(f"operators beside TRL's, {where}", most, row.operators, "{:.0f}")
        yield goals.at_most(f"Triton launches, {where}", MOST_LAUNCHES, row.launches, "{:.0f}")
        if (row.head, row.passes) == (HEADS[False], BACKWARD):
            most = MOST_FROZEN_OPERATORS
            yield goals.at_most(f"operators, {where}", most, row.operators, "{:.0f}")
