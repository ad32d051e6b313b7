"""The parts of a step, told apart by hooks on the backbones."""

import time
from typing import Any

from torch import Tensor

from benchmarks.common.peers import Peer
from benchmarks.dpo_step.batch import Batch

Parts = dict[str, float]  # of one step, in ms, by the name of the row's field


class StepClock:
    """Takes a step and the times between: hooks say when a backbone starts and ends, and when its
    last hidden state has its gradient."""

    def __init__(self, policy: Any, reference_model: Any) -> None:
        self.backbones = self.entered = self.reached = 0.0
        for model in (policy, reference_model):
            model.base_model.register_forward_pre_hook(self._enter)
            model.base_model.register_forward_hook(self._leave)

    def _enter(self, *unused: Any) -> None:
        self.entered = time.perf_counter()

    def _leave(self, module: Any, args: Any, output: Any) -> None:
        self.backbones += time.perf_counter() - self.entered
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.register_hook(self._reach)

    def _reach(self, grad: Tensor) -> None:
        self.reached = time.perf_counter()

    def step(self, one: Peer, batch: Batch) -> None:
        """Forward and backward; the gradients are left to the policy."""
        self.backbones = 0.0
        self.start = time.perf_counter()
        loss = one.fn(batch)
        self.forward_done = time.perf_counter()
        loss.backward()
        self.done = time.perf_counter()
        self.loss = loss.item()

    def parts(self) -> Parts:
        """Of the last step."""
        seconds = dict(
            backbones_ms=self.backbones,
            head_ms=self.forward_done - self.start - self.backbones,
            head_backward_ms=self.reached - self.forward_done,
            backbone_backward_ms=self.done - self.reached,
        )
        return {name: 1e3 * each for name, each in seconds.items()}
