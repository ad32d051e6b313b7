"""One case of a head, a batch and a pass: every implementation is run on it, each gives a row."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import accuracy
import measure
import numpy as np
import torch
from linear_peers import FORMULA, FORMULA_SCORED, LinearPeer, simpo
from linear_report import FROZEN, TRAINED, LinearRow
from peers import brief, forget_kept_buffers
from report import BACKWARD, FORWARD
from torch import Tensor

from dpo_triton import reference

LOGIT_DEVIATION = 3.0
CHECK_VOCAB_SIZES = (257, 5003)  # less than a tile, and more


@dataclass(frozen=True)
class Shape:
    name: str  # of a model
    hidden_size: int
    vocab_size: int
    batch: int  # sequences, even
    seq_len: int


@dataclass(frozen=True)
class Truth:
    values: Tensor  # (B,) float64
    grad_hidden: Tensor  # (B, T, H) float64
    grad_weight: Tensor  # (V, H) float64


@dataclass(frozen=True)
class Batch:
    shape: Shape
    hidden: Tensor  # (B, T, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) int64, 1 where scored
    share: float  # of the rows scored, as it was asked for
    truth: Truth

    @property
    def dtype(self) -> str:
        return str(self.hidden.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.shape.name}, {self.dtype}, {self.share:.0%} scored"


Result = tuple[Tensor, tuple[Tensor, ...]]  # values (B,), gradients of hidden and weight, or none


@dataclass
class Call:
    """An implementation on its way to a row."""

    peer: LinearPeer
    fn: Callable[[], Result]
    peak_mib: float | None = None  # above inputs and gradients
    value_error: float = 0.0
    grad_errors: tuple[float, ...] = ()  # of hidden and weight
    samples: list[float] = field(default_factory=list)  # ms


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
        truth = float64_truth(hidden, weight, labels, mask)
        yield Batch(shape, hidden, weight, labels, mask, share, truth)


def float64_truth(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Truth:
    """Return values and gradients of the loss in float64, one sequence at a time."""
    exact = weight.double().requires_grad_()

    def value(b: int, rows: Tensor) -> Tensor:
        scored = mask[b] != 0
        return reference.seq_logprob(rows[None, scored] @ exact.T, labels[b : b + 1, scored])[0]

    with torch.no_grad():
        values = torch.stack([value(b, rows) for b, rows in enumerate(hidden.double())])
    values.requires_grad_()
    (upstream,) = torch.autograd.grad(simpo(values), values)
    grad_weight = torch.zeros_like(exact, requires_grad=False)
    grads_hidden = []
    for b, rows in enumerate(hidden.double()):
        rows.requires_grad_()
        of_rows, of_weight = torch.autograd.grad(value(b, rows) * upstream[b], (rows, exact))
        grads_hidden.append(of_rows)
        grad_weight += of_weight
    return Truth(values.detach(), torch.stack(grads_hidden), grad_weight)


def relative_error(grad: Tensor, truth: Tensor) -> float:
    """Largest absolute error of a gradient, relative to its largest element."""
    errors = [(g - t).abs().max() for g, t in zip(grad.split(4096), truth.split(4096), strict=True)]
    return float(torch.stack(errors).max() / truth.abs().max())


def roundings(batch: Batch) -> tuple[float, float, float]:
    """Half a unit in the last place of the largest value, in float32 and nats, and of the largest
    gradients of hidden and weight, in their dtype and relative to them."""
    grads = (batch.truth.grad_hidden, batch.truth.grad_weight)
    of_hidden, of_weight = (
        accuracy.rounding(grad, batch.hidden.dtype) / float(grad.abs().max()) for grad in grads
    )
    return accuracy.rounding(batch.truth.values, torch.float32), of_hidden, of_weight


def make_call(peer: LinearPeer, batch: Batch, passes: str, head: str) -> Call:
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


def try_out(call: Call, truth: Truth, device: torch.device) -> None:
    """Run once, for the memory and the errors, and to warm up."""
    if call.peer.ours:
        forget_kept_buffers()
    results: list[Result] = []
    call.peak_mib = measure.peak_mib(lambda: results.append(call.fn()), device)
    values, grads = results.pop()
    if call.peak_mib is not None:
        call.peak_mib -= sum(grad.nbytes for grad in grads) / 2**20
    call.value_error = float((values - truth.values).abs().max())
    exact = (truth.grad_hidden, truth.grad_weight)
    call.grad_errors = tuple(map(relative_error, grads, exact[: len(grads)]))


def measure_case(
    batch: Batch,
    passes: str,
    head: str,
    peers: list[LinearPeer],
    rounds: int,
    failures: dict[str, list[str]],
    progress: Callable[[], object],
) -> list[LinearRow]:
    """Return a row for each peer that runs, of as many samples as rounds, each in another order;
    add the rest to failures, what happened -> where.

    progress is called when a peer has been tried, and each time that it has been timed.
    """
    device = batch.hidden.device
    calls = []
    for peer in peers:
        call = make_call(peer, batch, passes, head)
        try:
            try_out(call, batch.truth, device)
        except Exception as error:  # a peer may lack a device or memory; we may not
            if peer.ours:
                raise
            where = f"{batch}, {passes}, {head}"
            failures.setdefault(f"{peer.name}: {brief(error)}", []).append(where)
        else:
            calls.append(call)
        progress()
    for turn in range(rounds):
        first = turn % len(calls)
        for call in calls[first:] + calls[:first]:
            call.samples.append(measure.time_once_ms(call.fn, device))
            progress()
    return _to_rows(calls, batch, passes, head)


def _to_rows(calls: list[Call], batch: Batch, passes: str, head: str) -> list[LinearRow]:
    shape = batch.shape
    ms = {call.peer.name: float(np.median(call.samples)) for call in calls}
    floor = ms.get(FORMULA_SCORED, ms.get(FORMULA))
    of_values, of_grad_hidden, of_grad_weight = roundings(batch)
    rows = []
    for call in calls:
        p20, p80 = np.quantile(call.samples, [0.2, 0.8]).tolist()
        of_hidden, of_weight = (*call.grad_errors, None, None)[:2]
        rows.append(
            LinearRow(
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
                ms=ms[call.peer.name],
                ms_p20=p20,
                ms_p80=p80,
                samples=len(call.samples),
                peak_mib=call.peak_mib,
                value_error=call.value_error,
                value_rounding=of_values,
                hidden_grad_error=of_hidden,
                hidden_grad_rounding=of_grad_hidden,
                weight_grad_error=of_weight,
                weight_grad_rounding=of_grad_weight,
                of_floor=None if floor is None else ms[call.peer.name] / floor,
            )
        )
    return rows


def complaints(
    ours: LinearPeer, plain: LinearPeer, dtypes: list[torch.dtype], device: torch.device
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
            mask = torch.tensor([[0, 0, 1, 0, 1, 1, 0], [1] * 7], device=device)
            truth = float64_truth(hidden, weight, labels, mask)
            batch = Batch(shape, hidden, weight, labels, mask, 5 / 7, truth)
            where = f"{ours.name}, V = {vocab_size}, {batch.dtype}, {head} head"
            call, other = (make_call(peer, batch, BACKWARD, head) for peer in (ours, plain))
            try:
                try_out(call, truth, device)
            except Exception as error:
                found.append(f"{where}: {brief(error)}")
                continue
            try_out(other, truth, device)
            stray = float(call.fn()[1][0][mask == 0].abs().max())
            rounding, *of_grads = roundings(batch)
            budgets = [
                ("values", call.value_error, 2 * (other.value_error + rounding)),
                ("gradient where nothing is scored", stray, 0.0),
                *(
                    (f"gradient of {name}", error, 2 * (plain_error + rounding))
                    for name, error, plain_error, rounding in zip(
                        ("hidden", "weight"),
                        call.grad_errors,
                        other.grad_errors,
                        of_grads,
                        strict=False,
                    )
                ),
            ]
            found += [
                f"{where}: {what} off by {error:.1e}, at most {budget:.1e} is right"
                for what, error, budget in budgets
                if not error <= budget  # NaN is off too
            ]
    return found
