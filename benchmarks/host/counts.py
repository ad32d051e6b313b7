"""How many operators and kernels the host starts in a pass of the head."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dpo_triton
from benchmarks.common.peers import OURS, why_not
from benchmarks.common.report import FORWARD, Columns
from benchmarks.common.token_logps import masked_mean, module
from benchmarks.kernel.counts import BACKWARD
from gpu_lab.driver import Lab

Head = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
TRL_MODULE = "trl.trainer.utils"


class Count(NamedTuple):
    impl: str
    head: str  # trained or frozen
    passes: str
    operators: int  # of aten, views too
    launches: int  # of Triton kernels


COLUMNS = Columns(
    3,
    {
        "implementation": lambda row: row.impl,
        "head": lambda row: row.head,
        "pass": lambda row: row.passes,
        "operators": lambda row: str(row.operators),
        "Triton launches": lambda row: str(row.launches),
    },
)


class Started(TorchDispatchMode):
    """Counts PyTorch's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func.namespace == "aten"
        return func(*args, **(kwargs or {}))


def heads(backend: str) -> dict[str, Head]:
    """Ours, and TRL's where it is installed; on the scored rows, as TRL calls it on a GPU."""

    def ours(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        value = dpo_triton.fused_linear_seq_logprob(hidden, weight, labels, mask, backend=backend)
        assert isinstance(value, Tensor)
        return value

    def trl(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        apply = module("trl.kernels").ChunkedLogProbFunction.apply
        size = module(TRL_MODULE)._CHUNKED_LOGPROB_CHUNK_SIZE
        rows, targets = hidden.flatten(0, 1), labels.flatten()
        logps, *_ = apply(rows, weight, None, targets, 1.0, size, None, 1.0, ())
        return masked_mean(logps.view(labels.shape), mask)

    return {OURS: ours} | ({} if why_not(TRL_MODULE) else {"TRL": trl})


def count(
    lab: Lab, num_tokens: int, hidden_size: int, vocab_size: int, backend: str
) -> list[Count]:
    """Count the passes of all heads, trained and frozen, on two sequences."""
    rows = []
    weight = torch.zeros(vocab_size, hidden_size, dtype=torch.bfloat16)
    hidden = torch.zeros(2, num_tokens // 2, hidden_size, dtype=torch.bfloat16)
    labels = torch.zeros(hidden.shape[:2], dtype=torch.int64)
    for impl, fn in heads(backend).items():
        for head in ("trained", "frozen"):
            leaves = [hidden.clone().requires_grad_()]
            leaves.append(weight.clone().requires_grad_(head == "trained"))
            lab.records.clear()
            with Started() as forward:
                value = fn(*leaves, labels, torch.ones_like(labels)).sum()
            launched = len(lab.records)
            with Started() as backward:
                torch.autograd.grad(value, [leaf for leaf in leaves if leaf.requires_grad])
            rows.append(Count(impl, head, FORWARD, forward.count, launched))
            launched = len(lab.records) - launched
            rows.append(Count(impl, head, BACKWARD, backward.count, launched))
    return rows
