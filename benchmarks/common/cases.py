"""A batch and a setting: every implementation runs there in turns with the others."""

import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import measure, report
from benchmarks.common.batches import Batch, Shape, increasing, relative_error
from benchmarks.common.command import Run
from benchmarks.common.peers import Peer, Place, brief
from benchmarks.common.report import BOTH, FORWARD, shown

Result = tuple[Tensor, tuple[Tensor, ...]]  # values (B,), and gradients, or none
HEADS = {True: "trained", False: "frozen"}  # whose weight has no gradient


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

    @classmethod
    def of(cls, peer: Peer, batch: Batch, passes: str, trains_weight: bool = True) -> "Call":
        """Without autograd, or with the gradients of the rows and the weight."""
        overwrites = peer.overwrites_logits and passes == BOTH
        rows = batch.rows.clone() if overwrites else batch.rows.detach()
        inputs = [rows] if batch.weight is None else [rows, batch.weight.detach()]

        def forward() -> Result:
            with torch.no_grad():
                result = peer.fn(*inputs, batch.labels, batch.mask)
                return result[0] if peer.has_own_loss else result, ()

        if passes == FORWARD:
            return cls(peer, forward)
        leaves = inputs if trains_weight else inputs[:1]
        for leaf in leaves:
            leaf.requires_grad_()

        def forward_backward() -> Result:
            result = peer.fn(*inputs, batch.labels, batch.mask)
            if peer.has_own_loss:
                values, loss = result
                return values.detach(), torch.autograd.grad(loss, leaves)
            upstream = batch.upstream(result.detach())
            return result.detach(), torch.autograd.grad(result, leaves, upstream)  # no .grad

        def restore() -> None:
            with torch.no_grad():
                rows.copy_(batch.rows)

        return cls(peer, forward_backward, restore if overwrites else None)

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
        errors = map(relative_error, grads, truth[1:])
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
    passes: str = shown("pass")  # FORWARD, without autograd, or BOTH
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


class Effort(NamedTuple):
    rounds: int  # over all implementations, each time in another order
    min_run_s: float | None  # of an implementation in a round; None: one call, not warmed up
    num_checked: int | None = None  # sequences that are compared with float64; None: all


@dataclass(frozen=True)
class Setting:
    share: float  # of the rows scored
    passes: str
    effort: Effort
    trains_weight: bool = True
    is_headline: bool = False  # where the figures that are quoted come from
    threads: int = field(default_factory=torch.get_num_threads)
    neighbours: int = 0  # other processes that keep a core busy


class Plan(NamedTuple):
    """A batch that is not drawn yet, and all that is measured on it.

    Settings with the same share are neighbours; of all the same sequences are compared.
    """

    group: str  # of the table that its rows go to
    shape: Shape
    dtype: torch.dtype
    settings: list[Setting]
    upstream: Callable[[Tensor], Tensor] = increasing


class Case(NamedTuple):
    batch: Batch
    setting: Setting

    def __str__(self) -> str:
        batch, setting = self
        more = [] if setting.trains_weight else ["frozen"]
        more += [] if setting.effort.min_run_s is None else [f"{setting.threads} threads"]
        return ", ".join([str(batch), setting.passes, *more])

    def serves(self, peer: Peer) -> bool:
        """Whether the implementation has a place here."""
        batch, setting = self
        return peer.serves(Place(setting.is_headline, setting.passes == BOTH, batch.share == 1))

    def common(self, call: Call) -> dict[str, Any]:
        """The fields of `CaseRow`."""
        samples = list(itertools.chain(*call.rounds))
        p20, p80 = np.quantile(samples, [0.2, 0.8]).tolist()
        batch, seq_len = self.batch.labels.shape
        return dict(
            impl=call.peer.name, passes=self.setting.passes, dtype=self.batch.dtype,
            vocab_size=self.batch.vocab_size, batch=batch, seq_len=seq_len,
            scored_share=self.batch.share, ms=call.ms, ms_p20=p20, ms_p80=p80,
            samples=len(samples), peak_mib=call.peak_mib, value_error=call.value_error,
            value_rounding=self.batch.roundings[0],
        )  # fmt: skip


def measure_case(case: Case, peers: Sequence[Peer], run: Run) -> list[Call]:
    """Try the implementations out and time them; what happened to those that fail is the run's."""
    setting = case.setting
    with measure.setting(setting.threads, setting.neighbours):
        tried_out = (_tried_out(peer, case, run) for peer in peers if case.serves(peer))
        calls = [call for call in tried_out if call is not None]
        for call in measure.turns(calls, setting.effort.rounds):
            options = dict(min_run_s=setting.effort.min_run_s, restore=call.restore)
            call.rounds.append(measure.times_ms(call.fn, run.device, **options))
    return calls


def _tried_out(peer: Peer, case: Case, run: Run) -> Call | None:
    batch, setting = case
    try:
        call = Call.of(peer, batch, setting.passes, setting.trains_weight)
        call.try_out(batch.truth, run.device, warms_up=setting.effort.min_run_s is not None)
    except Exception as error:  # a peer may lack a compiler or memory; we may not
        if peer.ours:
            raise
        run.failures.setdefault(f"{peer.name}: {brief(error)}", []).append(str(case))
        return None
    return call


def measure_all(
    plans: Sequence[Plan],
    peers: Sequence[Peer],
    run: Run,
    rows_of: Callable[[Case, list[Call]], list[R]],
) -> list[R]:
    """Return the rows of all plans. A group's are printed when it is done."""
    from tqdm import tqdm

    generator = torch.Generator(run.device).manual_seed(run.args.seed)
    every: list[R] = []
    total = sum(len(plan.settings) for plan in plans)
    with tqdm(total=total, unit="case", leave=False) as progress:
        for group, of_group in itertools.groupby(plans, key=lambda plan: plan.group):
            found = []
            for case in itertools.chain.from_iterable(cases(plan, generator) for plan in of_group):
                progress.set_description(str(case))
                found.append(rows_of(case, measure_case(case, peers, run)))
                progress.update()
            tqdm.write(f"\n{group}\n{report.table(*found)}", file=sys.stdout)
            every += itertools.chain(*found)
    return every


def cases(plan: Plan, generator: torch.Generator) -> Iterator[Case]:
    torch.compiler.reset()  # it compiles for eight shapes and no more
    num_checked = plan.settings[0].effort.num_checked
    batch = plan.shape.draw(plan.dtype, generator, plan.upstream, num_checked)
    for share, settings in itertools.groupby(plan.settings, key=lambda setting: setting.share):
        scored = batch.scoring(share)
        for setting in settings:
            yield Case(scored, setting)
