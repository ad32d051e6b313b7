"""This package's head and its peers', each as (hidden, weight, labels, mask) -> (values, loss).

hidden are (B, T, H) with B even, chosen sequences before rejected ones, weight (V, H), labels
(B, T) int64, mask (B, T) int64 of 0 and 1. The values are mean log-probabilities, (B,), in nats;
the loss is SimPO's of them (Meng et al. 2024, arXiv:2405.14734, eq. 6), a differentiable scalar.
There is a loss because Liger's head gives nothing else that has a gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peers import brief, masked_mean, why_not
from torch import Tensor

import dpo_triton

BETA, GAMMA = 2.0, 0.5  # of SimPO

Values = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Head = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

OURS = "dpo_triton"
FORMULA = "log_softmax"
FORMULA_SCORED = "log_softmax, scored rows"
TRL = "TRL"
TRL_SCORED = "TRL, scored rows"
TORCH = "linear_cross_entropy"
TORCH_CHUNKED = "linear_cross_entropy, chunked"
TORCH_CHUNKS_OF_512 = "linear_cross_entropy, 512 rows"
LIGER = "Liger SimPO"
LIGER_KERNEL = "Liger cross entropy"

DESCRIPTIONS = {
    OURS: "fused_linear_seq_logprob(hidden, weight, labels, mask)",
    FORMULA: "log_softmax((hidden @ weight.T).float(), -1).gather(...), the seed's formula",
    FORMULA_SCORED: "the same on the scored rows alone: the floor of the arithmetic",
    TRL: "trl.kernels.ChunkedLogProbFunction on all rows, as TRL calls it on a CPU; no entropy",
    TRL_SCORED: "the same on the scored rows alone, as TRL calls it on a GPU",
    TORCH: "torch.nn.functional.linear_cross_entropy, which makes all logits",
    TORCH_CHUNKED: "the same with options=LinearCrossEntropyOptions(), at the headline alone",
    TORCH_CHUNKS_OF_512: "the same with batch_chunk_size=512, which suits these shapes better",
    LIGER: "liger_kernel's LigerFusedLinearSimPOLoss, not compiled",
}


@dataclass(frozen=True)
class LinearPeer:
    name: str
    fn: Head
    ours: bool = False
    only_some_scored: bool = False  # with all rows scored it is another peer
    only_headline: bool = False


def simpo(values: Tensor) -> Tensor:
    """The loss of values (B,), chosen before rejected."""
    chosen, rejected = values.chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected) - GAMMA).mean()


def collect(backend: str) -> tuple[list[LinearPeer], dict[str, str]]:
    """Return what can run, and the reason for each peer that cannot."""

    def ours(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        return dpo_triton.fused_linear_seq_logprob(hidden, weight, labels, mask, backend=backend)

    runnable = [
        LinearPeer(OURS, _with_loss(ours), ours=True),
        LinearPeer(FORMULA_SCORED, _with_loss(_scored_rows(_formula)), only_some_scored=True),
        LinearPeer(FORMULA, _with_loss(_all_rows(_formula))),
    ]
    not_run = {LIGER_KERNEL: "its kernel is Triton's and gives one loss, not values per sequence"}
    for name, make, module, is_scored_rows in (
        (TRL, _trl, "trl.trainer.utils", False),
        (TRL_SCORED, _trl, "trl.trainer.utils", True),
        (TORCH, _torch_head, "torch", False),
        (TORCH_CHUNKED, _torch_head_chunked, "torch", False),
        (TORCH_CHUNKS_OF_512, _torch_head_chunks_of_512, "torch", False),
    ):
        reason, rows = _made(make, module)
        if rows is None:
            not_run[name] = reason
        else:
            values = _scored_rows(rows) if is_scored_rows else _all_rows(rows)
            runnable.append(
                LinearPeer(
                    name,
                    _with_loss(values),
                    only_some_scored=is_scored_rows,
                    only_headline=name == TORCH_CHUNKED,
                )
            )
    reason, head = _made(_liger, "liger_kernel.chunked_loss.simpo_loss")
    if head is None:
        not_run[LIGER] = reason
    else:
        runnable.append(LinearPeer(LIGER, head))
    return runnable, not_run


def _made(make: Callable[[], Any], module: str) -> tuple[str, Any]:
    """The reason why make cannot run, or what it returns."""
    reason = why_not(module)
    if reason is not None:
        return reason, None
    try:
        return "", make()
    except (ImportError, AttributeError) as error:
        return brief(error), None


# A head on rows: (hidden (N, H), weight, labels (N,), counted (N,) bool) -> logps (N,), where a row
# that does not count may have any.
Rows = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _all_rows(rows: Rows) -> Values:
    def fn(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        logps = rows(hidden.flatten(0, 1), weight, labels.flatten(), mask.flatten() != 0)
        return masked_mean(logps.view(labels.shape), mask)

    return fn


def _scored_rows(rows: Rows) -> Values:
    def fn(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        counted = mask.flatten().nonzero()[:, 0]
        picked = hidden.flatten(0, 1).index_select(0, counted)
        ones = torch.ones_like(counted, dtype=torch.bool)
        logps = rows(picked, weight, labels.flatten()[counted], ones)
        every = logps.new_zeros(labels.numel()).index_copy(0, counted, logps)
        return masked_mean(every.view(labels.shape), mask)

    return fn


def _with_loss(values: Values) -> Head:
    def fn(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        result = values(*inputs)
        return result, simpo(result)

    return fn


def _formula(hidden: Tensor, weight: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
    logits = hidden @ weight.T
    return torch.log_softmax(logits.float(), -1).gather(-1, labels[:, None])[:, 0]


def _trl() -> Rows:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def fn(hidden: Tensor, weight: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        logps, *_ = ChunkedLogProbFunction.apply(
            hidden, weight, None, labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
        )
        return logps

    return fn


def _torch_head(**options: object) -> Rows:
    head = F.linear_cross_entropy  # of torch 2.13 and later

    def fn(hidden: Tensor, weight: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        targets = labels.masked_fill(~counted, -100)
        return -head(hidden, weight, targets, reduction="none", **options).float()

    return fn


def _torch_head_chunked() -> Rows:
    return _torch_head(options=torch.nn.LinearCrossEntropyOptions())


def _torch_head_chunks_of_512() -> Rows:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512, chunking_method=None)
    return _torch_head(options=options)


def _liger() -> Head:
    from liger_kernel.chunked_loss.simpo_loss import LigerFusedLinearSimPOLoss

    head = LigerFusedLinearSimPOLoss(beta=BETA, gamma=GAMMA, compute_nll_loss=False, compiled=False)

    def fn(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        loss, (chosen, rejected, *_) = head(weight, hidden, labels.masked_fill(mask == 0, -100))
        return torch.cat((chosen, rejected)), loss

    return fn
