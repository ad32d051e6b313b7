"""Everybody's figures without a GPU: all cases on the first target, one on the others, and the
machine code of all devices."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.common.peers import Peer
from benchmarks.common.report import Figures
from benchmarks.kernel import figures, whole
from benchmarks.kernel.cases import ALL, HALF_SHIFT, Case, Inputs, WholeCall, complaint
from benchmarks.kernel.counts import Work, count, per_token_instructions
from gpu_lab.devices import Device
from gpu_lab.estimate import Streaming

MODELLED_CASES = (ALL, HALF_SHIFT)


@dataclass
class Counting:
    batches: Mapping[Case, Inputs]
    targets: Sequence[str]  # that are run; those of other devices are compiled
    devices: Sequence[Device]
    whole_calls: Sequence[WholeCall]
    figures: Figures = field(default_factory=Figures)
    wrong: list[str] = field(default_factory=list)

    @property
    def all_targets(self) -> list[str]:
        return list(dict.fromkeys([*self.targets, *(device.target for device in self.devices)]))

    @property
    def num_steps(self) -> int:
        """Of an implementation."""
        return len(self.batches) - 1 + len(self.all_targets) + len(self.whole_calls)

    def steps(self, peer: Peer) -> Iterator[str]:
        """Say what comes next, and do it; figures of an implementation that fails are not kept."""
        new = Figures()
        loops: dict[str, dict[str, Streaming]] = {}
        works: dict[Case, dict[str, Work]] = {}
        for target in self.all_targets:
            for case in self.batches if target == self.targets[0] else [ALL]:
                yield f"{target}, scored: {case}"
                inputs, runs = self.batches[case], target in self.targets
                counted = count(peer, inputs, target, runs)
                if case == ALL:
                    loops[target] = counted.loops()
                    for passes, loop in loops[target].items():
                        new += figures.of_loop(peer.name, target, passes, str(case), loop)
                if not runs:
                    continue
                error = complaint(peer, inputs, counted.values, counted.grad)
                if error is not None:
                    self.wrong.append(f"{peer.name}, {target}, scored: {case}: {error}")
                per_token = per_token_instructions(peer, target, inputs.logits.shape[-1])
                works.setdefault(case, counted.work)
                new += figures.of_work(peer.name, target, inputs, counted.work, per_token)
        for case in MODELLED_CASES:
            new += figures.modelled(peer.name, self.batches[case], works[case], loops)
        for one in self.whole_calls:
            yield str(one)
            of_case = self.batches[one.case], self.targets[0], works[one.case]
            new += whole.whole_figures(peer, one, *of_case, loops, self.devices)
        self.figures += new
