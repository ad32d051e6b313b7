"""One case, a batch and a pass: every implementation runs on it in turns with the others."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import measure
from benchmarks.common.accuracy import relative_error
from benchmarks.common.peers import Peer, brief

Result = tuple[Tensor, tuple[Tensor, ...]]  # values (B,), and gradients, or none


@dataclass
class Call:
    """An implementation on its way to a row."""

    peer: Peer
    fn: Callable[[], Result]
    restore: Callable[[], None] | None = None  # undoes what fn does to its inputs
    peak_mib: float | None = None  # above the inputs, with the gradients; None: not known
    value_error: float = 0.0  # nats
    grad_errors: tuple[float, ...] = ()  # relative to the largest element
    samples: list[float] = field(default_factory=list)  # ms

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
        self.grad_errors = tuple(map(relative_error, grads, truth[1 : 1 + len(grads)]))

    @property
    def ms(self) -> float:
        return float(np.median(self.samples))

    def times(self) -> dict[str, Any]:
        """A row's columns of the time."""
        p20, p80 = np.quantile(self.samples, [0.2, 0.8]).tolist()
        return dict(ms=self.ms, ms_p20=p20, ms_p80=p80, samples=len(self.samples))


@dataclass
class Session:
    """What the cases of a run share."""

    device: torch.device
    progress: Callable[[], object]  # called when a peer has been tried, and each time it is timed
    warms_up: bool = True  # calls are run once before they count; long ones need not be
    failures: dict[str, list[str]] = field(default_factory=dict)  # what happened -> where

    def measure(
        self,
        calls: Iterable[Call],
        where: str,
        truth: Sequence[Tensor],
        rounds: int,
        sample: Callable[[Call], list[float]],
    ) -> list[Call]:
        """Try calls out and time them in `rounds` turns, each in another order.

        Return those that run; what happened to the others goes to failures.
        """
        runnable = []
        for call in calls:
            try:
                call.try_out(truth, self.device, warms_up=self.warms_up)
            except Exception as error:  # a peer may lack a compiler or memory; we may not
                if call.peer.ours:
                    raise
                self.failures.setdefault(f"{call.peer.name}: {brief(error)}", []).append(where)
            else:
                runnable.append(call)
            self.progress()
        # Never in one order: threads of one implementation that spin for work slow the next down.
        for turn in range(rounds):
            first = turn % len(runnable)
            for call in runnable[first:] + runnable[:first]:
                call.samples += sample(call)
                self.progress()
        return runnable
