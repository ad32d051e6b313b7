"""Batches of hidden states and a head, and the rows of all implementations on one."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common.cases import DEVIATION, HEADS, Batch, Call, Case
from benchmarks.common.check import CHECK_SHAPE
from benchmarks.common.report import BOTH
from benchmarks.head.peers import FORMULA, FORMULA_SCORED, simpo
from benchmarks.head.rows import Row


@dataclass(frozen=True)
class Shape:
    name: str  # of a model
    hidden_size: int
    vocab_size: int
    batch: int  # sequences, even
    seq_len: int


def make_batch(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Batch:
    device = generator.device
    tokens = (shape.batch, shape.seq_len)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    hidden = normal(*tokens, shape.hidden_size)
    weight = normal(shape.vocab_size, shape.hidden_size)
    weight *= DEVIATION / shape.hidden_size**0.5
    labels = torch.randint(shape.vocab_size, tokens, generator=generator, device=device)
    inputs = (hidden.to(dtype), weight.to(dtype), labels, torch.ones_like(labels))
    return Batch(shape.name, *inputs, 1.0, upstream_of_simpo, shape.batch)


def upstream_of_simpo(values: Tensor) -> Tensor:
    leaf = values.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(simpo(leaf), leaf)[0]


def check_batch(vocab_size: int, dtype: torch.dtype, generator: torch.Generator) -> Batch:
    return make_batch(Shape("check", 24, vocab_size, *CHECK_SHAPE), dtype, generator)


def rows_of(case: Case, calls: list[Call]) -> list[Row]:
    """Return a row for each implementation that ran."""
    batch = case.batch
    assert batch.weight is not None
    by_name = {call.peer.name: call for call in calls}
    floor = by_name.get(FORMULA_SCORED, by_name.get(FORMULA))
    of_grads = batch.rows.nbytes + case.trains_weight * batch.weight.nbytes
    above = of_grads / 2**20 if case.passes == BOTH else 0.0
    rows = []
    for call in calls:
        of_hidden, of_weight = (*call.grad_errors, None, None)[:2]
        row = Row(
            **case.common(call),
            model=batch.name,
            hidden_size=batch.rows.shape[-1],
            head=HEADS[case.trains_weight],
            hidden_grad_error=of_hidden,
            hidden_grad_rounding=batch.roundings[1],
            weight_grad_error=of_weight,
            weight_grad_rounding=batch.roundings[2],
            of_floor=None if floor is None else floor.speedup_over(call),
        )
        peak = None if call.peak_mib is None else call.peak_mib - above
        rows.append(dataclasses.replace(row, peak_mib=peak))
    return rows
