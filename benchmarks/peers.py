"""This package and its peers, each as (logits, labels, mask) -> mean log-probabilities.

logits are (B, T, V), labels (B, T) int64, mask (B, T) int64 of 0 and 1 with a 1 in each sequence;
the result is (B,), in nats, and differentiable.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import dpo_triton
from dpo_triton._torch_stages import _rows

SeqLogprob = Callable[[Tensor, Tensor, Tensor], Tensor]

OURS = "dpo_triton"
OURS_IN_PLACE = "dpo_triton in place"
LOG_SOFTMAX = "log_softmax"
LOGSUMEXP = "logsumexp"
COMPILED = "torch.compile"
TRL = "TRL"
TRL_KERNEL = "TRL kernel"
LIGER = "Liger"

DESCRIPTIONS = {
    OURS: "fused_seq_logprob(logits, labels, mask)",
    OURS_IN_PLACE: "the same with inplace_backward=True",
    LOG_SOFTMAX: "log_softmax(logits.float(), -1).gather(...), the formula this project began with",
    LOGSUMEXP: "gather minus logsumexp, of logits.float()",
    COMPILED: "torch.compile of log_softmax, for static shapes; compiling is not counted",
    TRL: "trl.trainer.utils.selective_log_softmax, TRL's way on a CPU",
    TRL_KERNEL: "trl.kernels.logprob_entropy, TRL's way on a GPU; it computes the entropy too",
    LIGER: "liger_kernel's cross entropy; its gradient overwrites the logits",
}


@dataclass(frozen=True)
class Peer:
    name: str
    fn: SeqLogprob
    ours: bool = False
    overwrites_logits: bool = False  # when it is differentiated
    only_headline_backward: bool = False


def collect(device: torch.device, backend: str) -> tuple[list[Peer], dict[str, str]]:
    """Return what can run on device, and the reason for each peer that cannot."""

    def ours(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        return dpo_triton.fused_seq_logprob(logits, labels, mask, backend=backend)

    def ours_in_place(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        return dpo_triton.fused_seq_logprob(
            logits, labels, mask, inplace_backward=True, backend=backend
        )

    # Without dynamic=False a second shape would be compiled for any shape; without fullgraph a
    # compiler that gives up would leave eager code under this name.
    compiled = torch.compile(log_softmax, dynamic=False, fullgraph=True)
    peers = [
        Peer(OURS, ours, ours=True),
        Peer(
            OURS_IN_PLACE,
            ours_in_place,
            ours=True,
            overwrites_logits=True,
            only_headline_backward=True,
        ),
        Peer(LOG_SOFTMAX, log_softmax),
        Peer(LOGSUMEXP, logsumexp),
        Peer(COMPILED, compiled),
    ]
    on_gpu = device.type == "cuda"
    not_run = {}
    for name, make, modules, served in (
        (TRL, trl_eager, ["trl.trainer.utils"], not on_gpu),
        (TRL_KERNEL, trl_kernel, ["trl.kernels.logprob_entropy"], on_gpu),
        (LIGER, liger, ["liger_kernel.ops.cross_entropy"], on_gpu),
    ):
        reason = why_not(modules[0]) if served else None
        if not served:
            not_run[name] = (
                "its kernel is Triton's: needs a GPU" if not on_gpu else f"see {TRL_KERNEL}"
            )
        elif reason is not None:
            not_run[name] = reason
        else:
            peers.append(Peer(name, make(), overwrites_logits=name == LIGER))
    return peers, not_run


def forget_kept_buffers() -> None:
    """Have the next call of this package allocate again what it keeps, so that it counts."""
    _rows._kept.buffers.clear()


def log_softmax(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    token_logps = torch.log_softmax(logits.float(), -1).gather(-1, labels[..., None])[..., 0]
    return masked_mean(token_logps, mask)


def logsumexp(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    z = logits.float()
    return masked_mean(z.gather(-1, labels[..., None])[..., 0] - z.logsumexp(-1), mask)


def trl_eager() -> SeqLogprob:
    from trl.trainer.utils import selective_log_softmax

    def fn(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        return masked_mean(selective_log_softmax(logits, labels, row_mask=mask), mask)

    return fn


def trl_kernel() -> SeqLogprob:
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    def fn(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        token_logps, _ = selective_log_softmax_and_entropy(logits, labels, row_mask=mask)
        return masked_mean(token_logps, mask)

    return fn


def liger() -> SeqLogprob:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    def fn(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        targets = labels.masked_fill(mask == 0, -100).flatten()
        loss, *_ = LigerCrossEntropyFunction.apply(
            logits.flatten(0, 1), targets, None, -100, 0.0, 0.0, "none"
        )
        return masked_mean(-loss.view_as(labels), mask)

    return fn


def masked_mean(token_logps: Tensor, mask: Tensor) -> Tensor:
    return (token_logps * mask).sum(1) / mask.sum(1)


def why_not(module: str) -> str | None:
    """The reason why a peer's module cannot be imported, or None."""
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    try:
        importlib.import_module(module)
    except ImportError as error:
        hint = "; needs trl >= 1.14" if module == "trl.kernels.logprob_entropy" else ""
        return f"{module}: {brief(error)}{hint}"
    return None


def brief(error: BaseException) -> str:
    """An exception as one short line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"
