"""Batches of hidden states and a head, and the rows of all implementations on one."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.common import measure
from benchmarks.common.accuracy import (
    CHECK_MASK,
    CHECK_VOCAB_SIZES,
    beyond,
    relative_rounding,
    rounding,
)
from benchmarks.common.cases import Call, Result, Session
from benchmarks.common.peers import Peer, brief
from benchmarks.common.report import BACKWARD, FORWARD
from benchmarks.head.peers import FORMULA, FORMULA_SCORED, simpo
from benchmarks.head.rows import FROZEN, TRAINED, Row
from dpo_triton import reference

LOGIT_DEVIATION = 3.0


@dataclass(frozen=True)
class Shape:
    name: str  # of a model
    hidden_size: int
    vocab_size: int
    batch: int  # sequences, even
    seq_len: int


@dataclass(frozen=True)
class Batch:
    shape: Shape
    hidden: Tensor  # (B, T, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) int64, 1 where scored
    share: float  # of the rows scored, as it was asked for

    @property
    def dtype(self) -> str:
        return str(self.hidden.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.shape.name}, {self.dtype}, {self.share:.0%} scored"

    @cached_property
    def truth(self) -> tuple[Tensor, Tensor, Tensor]:
        """float64 values (B,) and the loss's gradients of hidden and weight, one sequence at a
        time."""
        exact = self.weight.double().requires_grad_()

        def value(b: int, rows: Tensor) -> Tensor:
            scored = self.mask[b] != 0
            labels = self.labels[b : b + 1, scored]
            return reference.seq_logprob(rows[None, scored] @ exact.T, labels)[0]

        with torch.no_grad():
            values = torch.stack([value(b, rows) for b, rows in enumerate(self.hidden.double())])
        values.requires_grad_()
        (upstream,) = torch.autograd.grad(simpo(values), values)
        grad_weight = torch.zeros_like(exact, requires_grad=False)
        grads_hidden = []
        for b, rows in enumerate(self.hidden.double()):
            rows.requires_grad_()
            of_rows, of_weight = torch.autograd.grad(value(b, rows) * upstream[b], (rows, exact))
            grads_hidden.append(of_rows)
            grad_weight += of_weight
        return values.detach(), torch.stack(grads_hidden), grad_weight

    @cached_property
    def roundings(self) -> tuple[float, float, float]:
        """Half a unit in the last place of the largest value, in float32 and nats, and of the
        largest gradients of hidden and weight, in their dtype and relative to them."""
        values, grad_hidden, grad_weight = self.truth
        of_hidden, of_weight = (
            relative_rounding(g, self.hidden.dtype) for g in (grad_hidden, grad_weight)
        )
        return rounding(values, torch.float32), of_hidden, of_weight


def make_inputs(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden, weight and labels; logits are normal with deviation 3."""
    device = generator.device
    tokens = (shape.batch, shape.seq_len)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    hidden = normal(*tokens, shape.hidden_size)
    weight = normal(shape.vocab_size, shape.hidden_size)
    weight *= LOGIT_DEVIATION / shape.hidden_size**0.5
    labels = torch.randint(shape.vocab_size, tokens, generator=generator, device=device)
    return hidden.to(dtype), weight.to(dtype), labels


def make_batches(
    shape: Shape, dtype: torch.dtype, shares: list[float], generator: torch.Generator
) -> Iterator[Batch]:
    """Yield a batch for each share of scored rows, of the same hidden states and weight."""
    hidden, weight, labels = make_inputs(shape, dtype, generator)
    for share in shares:
        mask = torch.ones_like(labels)
        # The prompt, of every sequence.
        mask[:, : shape.seq_len - max(1, round(share * shape.seq_len))] = 0
        yield Batch(shape, hidden, weight, labels, mask, share)


def make_call(peer: Peer, batch: Batch, passes: str, head: str) -> Call:
    """An implementation on a batch: without autograd, or with the gradients that the head asks."""
    hidden, weight = batch.hidden.detach(), batch.weight.detach()
    labels, mask = batch.labels, batch.mask

    def forward() -> Result:
        with torch.no_grad():
            return peer.fn(hidden, weight, labels, mask)[0], ()

    if passes == FORWARD:
        return Call(peer, forward)
    leaves = [hidden] if head == FROZEN else [hidden, weight]
    for leaf in leaves:
        leaf.requires_grad_()

    def forward_backward() -> Result:
        values, loss = peer.fn(hidden, weight, labels, mask)
        return values.detach(), torch.autograd.grad(loss, leaves)

    return Call(peer, forward_backward)


def measure_case(
    session: Session, batch: Batch, passes: str, head: str, peers: list[Peer], rounds: int
) -> list[Row]:
    """Return a row for each peer that runs, of as many samples as rounds."""
    made = (make_call(peer, batch, passes, head) for peer in peers)
    where = f"{batch}, {passes}, {head}"
    calls = session.measure(
        made,
        where,
        batch.truth,
        rounds,
        lambda call: [measure.time_once_ms(call.fn, session.device)],
    )
    shape = batch.shape
    ms = {call.peer.name: call.ms for call in calls}
    floor = ms.get(FORMULA_SCORED, ms.get(FORMULA))
    of_values, of_grad_hidden, of_grad_weight = batch.roundings
    grads_mib = (batch.hidden.nbytes + (head == TRAINED) * batch.weight.nbytes) / 2**20
    rows = []
    for call in calls:
        of_hidden, of_weight = (*call.grad_errors, None, None)[:2]
        above = grads_mib if passes == BACKWARD else 0.0
        rows.append(
            Row(
                impl=call.peer.name,
                model=shape.name,
                hidden_size=shape.hidden_size,
                vocab_size=shape.vocab_size,
                batch=shape.batch,
                seq_len=shape.seq_len,
                dtype=batch.dtype,
                scored_share=batch.share,
                passes=passes,
                head=head,
                **call.times(),
                peak_mib=None if call.peak_mib is None else call.peak_mib - above,
                value_error=call.value_error,
                value_rounding=of_values,
                hidden_grad_error=of_hidden,
                hidden_grad_rounding=of_grad_hidden,
                weight_grad_error=of_weight,
                weight_grad_rounding=of_grad_weight,
                of_floor=None if floor is None else call.ms / floor,
            )
        )
    return rows


def complaints(
    ours: Peer, plain: Peer, dtypes: list[torch.dtype], device: torch.device
) -> list[str]:
    """Compare small batches with float64, holes in the mask among them; return what is off.

    Right is at most twice the error of the plain formula and a rounding of the result.
    """
    found = []
    for vocab_size in CHECK_VOCAB_SIZES:
        for dtype, head in itertools.product(dtypes, (TRAINED, FROZEN)):
            shape = Shape("check", 24, vocab_size, 2, 7)
            generator = torch.Generator(device).manual_seed(vocab_size)
            hidden, weight, labels = make_inputs(shape, dtype, generator)
            mask = torch.tensor(CHECK_MASK, device=device)
            batch = Batch(shape, hidden, weight, labels, mask, float(mask.float().mean()))
            where = f"{ours.name}, V = {vocab_size}, {batch.dtype}, {head} head"
            call, other = (make_call(peer, batch, BACKWARD, head) for peer in (ours, plain))
            try:
                call.try_out(batch.truth, device)
            except Exception as error:
                found.append(f"{where}: {brief(error)}")
                continue
            other.try_out(batch.truth, device)
            stray = float(call.run()[1][0][mask == 0].abs().max())
            errors = zip(
                ("values", "gradient of hidden", "gradient of weight"),
                (call.value_error, *call.grad_errors),
                (other.value_error, *other.grad_errors),
                batch.roundings,
                strict=False,
            )
            budgets = [(what, error, 2 * (plain + half)) for what, error, plain, half in errors]
            found += beyond(where, [*budgets, ("gradient where nothing is scored", stray, 0.0)])
    return found
