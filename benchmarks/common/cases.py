"""A batch, a pass and a setting: every implementation runs on it in turns with the others."""

import dataclasses
import itertools
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import accuracy, measure, report
from benchmarks.common.command import Run
from benchmarks.common.peers import Peer, brief
from benchmarks.common.report import BOTH, FORWARD, shown
from dpo_triton import reference

Result = tuple[Tensor, tuple[Tensor, ...]]  # values (B,), and gradients, or none
HEADS = {True: "trained", False: "frozen"}  # whose weight has no gradient
DEVIATION = 3.0  # of logits, which are normal
CHUNK = 2**24  # numbers that are drawn at a time


def increasing(values: Tensor) -> Tensor:
    """An upstream gradient that tells sequences apart."""
    return 1 + torch.arange(len(values), device=values.device) / 8


@dataclass(frozen=True)
class Batch:
    name: str  # of its shape
    rows: Tensor  # (B, T, V) logits, or (B, T, H) hidden states
    weight: Tensor | None  # (V, H), the head that hidden states go to
    labels: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) int64, 1 where scored
    share: float  # of the rows scored, as it was asked for
    upstream: Callable[[Tensor], Tensor]  # values (B,) -> what the loss says of them
    num_checked: int  # sequences that are compared with float64, the first ones

    @property
    def vocab_size(self) -> int:
        return self.rows.shape[-1] if self.weight is None else self.weight.shape[0]

    @property
    def dtype(self) -> str:
        return str(self.rows.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.name}, {self.dtype}, {self.share:.0%} scored"

    def scoring(self, share: float) -> "Batch":
        """The same with a mask: the first part of each sequence, the prompt, is not scored."""
        seq_len = self.labels.shape[1]
        mask = torch.ones_like(self.labels)
        mask[:, : seq_len - max(1, round(share * seq_len))] = 0
        return dataclasses.replace(self, mask=mask, share=share)

    @cached_property
    def truth(self) -> tuple[Tensor, ...]:
        """float64 values (C,) and the loss's gradients of the rows and the weight, of the first
        sequences, one at a time."""
        weight = None if self.weight is None else self.weight.double().requires_grad_()

        def value(b: int, rows: Tensor) -> Tensor:
            scored = self.mask[b] != 0
            logits = rows[None, scored]
            logits = logits if weight is None else logits @ weight.T
            return reference.seq_logprob(logits, self.labels[b : b + 1, scored])[0]

        every = range(self.num_checked)
        with torch.no_grad():
            values = torch.stack([value(b, self.rows[b].double()) for b in every])
        upstream = self.upstream(values).tolist()
        grads, sums = [], [] if weight is None else [torch.zeros_like(weight, requires_grad=False)]
        for b in every:
            leaf = self.rows[b].double().requires_grad_()
            inputs = [leaf] if weight is None else [leaf, weight]
            of_rows, *of_weight = torch.autograd.grad(value(b, leaf) * upstream[b], inputs)
            grads.append(of_rows)
            for total, part in zip(sums, of_weight, strict=True):
                total += part
        return values, torch.stack(grads), *sums

    @cached_property
    def roundings(self) -> tuple[float, ...]:
        """Half a unit in the last place of the largest value, in float32 and nats, and of the
        largest gradients, in their dtype and relative to them."""
        values, *grads = self.truth
        of_grads = (accuracy.relative_rounding(grad, self.rows.dtype) for grad in grads)
        return accuracy.rounding(values, torch.float32), *of_grads

    def call(self, peer: Peer, passes: str, trains_weight: bool = True) -> "Call":
        """An implementation: without autograd, or with the gradients of the rows and the weight."""
        overwrites = peer.overwrites_logits and passes == BOTH
        rows = self.rows.clone() if overwrites else self.rows.detach()
        inputs = [rows] if self.weight is None else [rows, self.weight.detach()]

        def forward() -> Result:
            with torch.no_grad():
                result = peer.fn(*inputs, self.labels, self.mask)
                return result[0] if peer.has_own_loss else result, ()

        if passes == FORWARD:
            return Call(peer, forward)
        leaves = inputs if trains_weight else inputs[:1]
        for leaf in leaves:
            leaf.requires_grad_()

        def forward_backward() -> Result:
            result = peer.fn(*inputs, self.labels, self.mask)
            if peer.has_own_loss:
                values, loss = result
                return values.detach(), torch.autograd.grad(loss, leaves)
            upstream = self.upstream(result.detach())
            return result.detach(), torch.autograd.grad(result, leaves, upstream)  # no .grad

        def restore() -> None:
            with torch.no_grad():
                rows.copy_(self.rows)

        return Call(peer, forward_backward, restore if overwrites else None)


class Shape(NamedTuple):
    name: str
    hidden_size: int | None  # of what goes to a head; None: logits
    vocab_size: int
    batch: int  # sequences
    seq_len: int

    def draw(
        self,
        dtype: torch.dtype,
        generator: torch.Generator,
        upstream: Callable[[Tensor], Tensor] = increasing,
        num_checked: int | None = None,
    ) -> Batch:
        """A batch of which all is scored; num_checked: by default all of its sequences."""
        device, tokens = generator.device, (self.batch, self.seq_len)

        def normal(*size: int, deviation: float = 1.0) -> Tensor:
            result = torch.empty(size, dtype=dtype, device=device)
            for some in result.split(max(1, CHUNK // result[0].numel())):  # never all in float32
                x = torch.randn(some.shape, generator=generator, device=device)
                some.copy_(x.mul_(deviation))
            return result

        if self.hidden_size is None:
            rows, weight = normal(*tokens, self.vocab_size, deviation=DEVIATION), None
        else:
            rows, deviation = normal(*tokens, self.hidden_size), DEVIATION / self.hidden_size**0.5
            weight = normal(self.vocab_size, self.hidden_size, deviation=deviation)
        labels = torch.randint(self.vocab_size, tokens, generator=generator, device=device)
        checked = self.batch if num_checked is None else min(self.batch, num_checked)
        every = torch.ones_like(labels)
        return Batch(self.name, rows, weight, labels, every, 1.0, upstream, checked)


@dataclass
class Call:
    """An implementation on its way to a row."""

    peer: Peer
    fn: Callable[[], Result]
    restore: Callable[[], None] | None = None  # undoes what fn does to its inputs
    peak_mib: float | None = None  # above the inputs, with the gradients; None: not known
    value_error: float = 0.0  # nats
    grad_errors: tuple[float, ...] = ()  # relative to the largest element
    rounds: list[list[float]] = field(default_factory=list)  # samples of each, ms

    def run(self) -> Result:
        """Call fn on the inputs as they were."""
        if self.restore is not None:
            self.restore()
        return self.fn()

    def try_out(
        self, truth: Sequence[Tensor], device: torch.device, *, warms_up: bool = True
    ) -> None:
        """Run for the memory and the errors; before that to compile and load, unless told not to.

        Args:
            truth: float64 values and gradients, of the first sequences alone or of all.
        """
        if warms_up:
            self.run()
        if self.restore is not None:
            self.restore()
        results: list[Result] = []
        self.peak_mib = measure.peak_mib(lambda: results.append(self.fn()), device)
        values, grads = results.pop()
        self.value_error = float((values.detach()[: len(truth[0])] - truth[0]).abs().max())
        errors = map(accuracy.relative_error, grads, truth[1:])
        self.grad_errors = tuple(errors)

    @property
    def ms(self) -> float:
        return statistics.median(itertools.chain(*self.rounds))

    def speedup_over(self, other: "Call | None") -> float | None:
        """How often its time the other's is: the median over the rounds, in which both ran."""
        if other is None:
            return None
        pairs = zip(other.rounds, self.rounds, strict=True)
        return statistics.median(
            statistics.median(theirs) / statistics.median(ours) for theirs, ours in pairs
        )


@dataclass(frozen=True, kw_only=True)
class CaseRow:
    """One implementation in one case."""

    impl: str = shown("implementation")
    passes: str = shown("pass")  # FORWARD, without autograd, or BOTH, which is both
    dtype: str = shown("dtype")
    vocab_size: int
    batch: int
    seq_len: int
    scored_share: float = shown("scored", "{:.0%}")  # of the rows
    ms: float = shown("ms", "{:.3f}")  # median
    ms_p20: float = shown("p20", "{:.3f}")
    ms_p80: float = shown("p80", "{:.3f}")
    samples: int
    peak_mib: float | None = shown("peak MiB", "{:.1f}")  # None: not known
    value_error: float = shown("value error", "{:.1e}")  # largest against float64, nats
    value_rounding: float  # half a unit in the last place of the largest value, in float32


R = TypeVar("R", bound=CaseRow)


@dataclass(frozen=True)
class Case:
    group: str  # of the table that its rows go to
    batch: Batch
    passes: str
    peers: list[Peer]
    rounds: int  # over all implementations, each time in another order
    min_run_s: float | None  # of an implementation in a round; None: one call, not warmed up
    trains_weight: bool = True
    threads: int = field(default_factory=torch.get_num_threads)
    neighbours: int = 0  # other processes that keep a core busy

    def __str__(self) -> str:
        more = [] if self.trains_weight else ["frozen"]
        more += [f"{self.threads} threads"] if self.min_run_s is not None else []
        return ", ".join([str(self.batch), self.passes, *more])

    def common(self, call: Call) -> dict[str, Any]:
        """The fields of `CaseRow`."""
        samples = list(itertools.chain(*call.rounds))
        p20, p80 = np.quantile(samples, [0.2, 0.8]).tolist()
        batch, seq_len = self.batch.labels.shape
        return dict(
            impl=call.peer.name, passes=self.passes, dtype=self.batch.dtype,
            vocab_size=self.batch.vocab_size, batch=batch, seq_len=seq_len,
            scored_share=self.batch.share, ms=call.ms, ms_p20=p20, ms_p80=p80,
            samples=len(samples), peak_mib=call.peak_mib, value_error=call.value_error,
            value_rounding=self.batch.roundings[0],
        )  # fmt: skip


def measure_case(case: Case, run: Run) -> list[Call]:
    """Try the implementations out and time them; what happened to those that fail is the run's."""
    with measure.setting(case.threads, case.neighbours):
        calls = [call for peer in case.peers if (call := _tried_out(peer, case, run)) is not None]
        for call in measure.turns(calls, case.rounds):
            options = dict(min_run_s=case.min_run_s, restore=call.restore)
            call.rounds.append(measure.times_ms(call.fn, run.device, **options))
    return calls


def _tried_out(peer: Peer, case: Case, run: Run) -> Call | None:
    try:
        call = case.batch.call(peer, case.passes, case.trains_weight)
        call.try_out(case.batch.truth, run.device, warms_up=case.min_run_s is not None)
    except Exception as error:  # a peer may lack a compiler or memory; we may not
        if peer.ours:
            raise
        run.failures.setdefault(f"{peer.name}: {brief(error)}", []).append(str(case))
        return None
    return call


def measure_all(
    run: Run, cases: Iterable[Case], total: int, rows_of: Callable[[Case, list[Call]], list[R]]
) -> list[R]:
    """Return the rows of all cases, of which there are `total`. A group's are printed when it is
    done."""
    from tqdm import tqdm

    every: list[R] = []
    with tqdm(total=total, unit="case", leave=False) as progress:
        for group, of_group in itertools.groupby(cases, key=lambda case: case.group):
            found = []
            for case in of_group:
                progress.set_description(str(case))
                found.append(rows_of(case, measure_case(case, run)))
                progress.update()
            tqdm.write(f"\n{group}\n{report.table(*found)}", file=sys.stdout)
            every += itertools.chain(*found)
    return every
