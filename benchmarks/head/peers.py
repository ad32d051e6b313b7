"""This package's head and its peers', each as (hidden, weight, labels, mask) -> values.

hidden are (B, T, H) with B even, chosen sequences before rejected ones, weight (V, H), labels
(B, T) int64, mask (B, T) int64 of 0 and 1. The values are mean log-probabilities, (B,), in nats and
differentiable. Gradients are those of SimPO's loss of them (Meng et al. 2024, arXiv:2405.14734,
eq. 6): Liger's head gives that loss beside the values, and nothing else that has a gradient.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dpo_triton
from benchmarks.common.logits_peers import log_softmax, masked_mean, module
from benchmarks.common.peers import OURS, Peer

BETA, GAMMA = 2.0, 0.5  # of SimPO

Head = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# A head on rows: (hidden (N, H), weight, labels (N,), counted (N,) bool) -> logps (N,), where a row
# that does not count may have any.
Rows = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

FORMULA = "log_softmax"
FORMULA_SCORED = "log_softmax, scored rows"
TRL = "TRL"
TRL_MODULE = "trl.trainer.utils"


def candidates(backend: str) -> list[Peer]:
    linear = "linear_cross_entropy"
    return [
        Peer(
            OURS,
            "fused_linear_seq_logprob(hidden, weight, labels, mask)",
            lambda: partial(dpo_triton.fused_linear_seq_logprob, backend=backend),
            ours=True,
        ),
        Peer(
            FORMULA_SCORED,
            "the formula on the scored rows alone: the floor of the arithmetic",
            lambda: _on_scored_rows(_formula),
            serves=lambda place: not place.all_scored,
        ),
        Peer(
            FORMULA,
            "log_softmax((hidden @ weight.T).float(), -1).gather(...), the seed's formula",
            lambda: _on_all_rows(_formula),
        ),
        Peer(
            TRL,
            "trl.kernels.ChunkedLogProbFunction on all rows, as TRL calls it on a CPU; no entropy",
            lambda: _on_all_rows(_trl()),
            TRL_MODULE,
        ),
        Peer(
            "TRL, scored rows",
            "the same on the scored rows alone, as TRL calls it on a GPU",
            lambda: _on_scored_rows(_trl()),
            TRL_MODULE,
            serves=lambda place: not place.all_scored,
        ),
        Peer(
            linear,
            "torch.nn.functional.linear_cross_entropy, which makes all logits",
            lambda: _on_all_rows(_torch_head()),
        ),
        Peer(
            f"{linear}, chunked",
            "the same with options=LinearCrossEntropyOptions(), at the headline alone",
            lambda: _on_all_rows(_torch_head({})),
            serves=lambda place: place.is_headline,
        ),
        Peer(
            f"{linear}, 512 rows",
            "the same with batch_chunk_size=512, which suits these shapes better",
            lambda: _on_all_rows(_torch_head(dict(batch_chunk_size=512, chunking_method=None))),
        ),
        Peer(
            "Liger SimPO",
            "liger_kernel's LigerFusedLinearSimPOLoss, not compiled",
            _liger,
            "liger_kernel.chunked_loss.simpo_loss",
            has_own_loss=True,
        ),
        Peer(
            "Liger cross entropy",
            "",
            _liger,
            obstacle="its kernel is Triton's and gives one loss, not values per sequence",
        ),
    ]


def simpo(values: Tensor) -> Tensor:
    """The loss of values (B,), chosen before rejected."""
    chosen, rejected = values.chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected) - GAMMA).mean()


def upstream_of_simpo(values: Tensor) -> Tensor:
    leaf = values.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(simpo(leaf), leaf)[0]


def _on_all_rows(rows: Rows) -> Head:
    def fn(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        logps = rows(hidden.flatten(0, 1), weight, labels.flatten(), mask.flatten() != 0)
        return masked_mean(logps.view(labels.shape), mask)

    return fn


def _on_scored_rows(rows: Rows) -> Head:
    def fn(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        counted = mask.flatten().nonzero()[:, 0]
        picked = hidden.flatten(0, 1).index_select(0, counted)
        ones = torch.ones_like(counted, dtype=torch.bool)
        logps = rows(picked, weight, labels.flatten()[counted], ones)
        every = logps.new_zeros(labels.numel()).index_copy(0, counted, logps)
        return masked_mean(every.view(labels.shape), mask)

    return fn


def _formula(hidden: Tensor, weight: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
    return log_softmax(hidden @ weight.T, labels)


def _trl() -> Rows:
    apply = module("trl.kernels").ChunkedLogProbFunction.apply
    chunk_size = module(TRL_MODULE)._CHUNKED_LOGPROB_CHUNK_SIZE

    def fn(hidden: Tensor, weight: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        logps, *_ = apply(hidden, weight, None, labels, 1.0, chunk_size, None, 1.0, ())
        return logps

    return fn


def _torch_head(options: dict[str, Any] | None = None) -> Rows:
    head = F.linear_cross_entropy  # of torch 2.13 and later
    how = {} if options is None else dict(options=torch.nn.LinearCrossEntropyOptions(**options))

    def fn(hidden: Tensor, weight: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        targets = labels.masked_fill(~counted, -100)
        return -head(hidden, weight, targets, reduction="none", **how).float()

    return fn


def _liger() -> Callable[..., tuple[Tensor, Tensor]]:
    loss_type = module("liger_kernel.chunked_loss.simpo_loss").LigerFusedLinearSimPOLoss
    head = loss_type(beta=BETA, gamma=GAMMA, compute_nll_loss=False, compiled=False)

    def fn(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        loss, (chosen, rejected, *_) = head(weight, hidden, labels.masked_fill(mask == 0, -100))
        return torch.cat((chosen, rejected)), loss

    return fn
