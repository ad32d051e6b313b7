"""This package and its peers, each as (logits, labels, mask) -> mean log-probabilities.

logits are (B, T, V), labels (B, T) int64, mask (B, T) int64 of 0 and 1 with a 1 in each sequence;
the result is (B,), in nats, and differentiable.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import dpo_triton
from benchmarks.common import token_logps
from benchmarks.common.peers import OURS, TRL_KERNELS, Peer
from benchmarks.common.token_logps import TokenLogps, masked_mean

SeqLogprob = Callable[[Tensor, Tensor, Tensor], Tensor]

OURS_IN_PLACE = "dpo_triton in place"
LOG_SOFTMAX = "log_softmax"
LOGSUMEXP = "logsumexp"
COMPILED = "torch.compile"
TRL = "TRL"
TRL_KERNEL = "TRL kernel"
LIGER = "Liger"


def candidates(device: torch.device, backend: str) -> list[Peer]:
    def ours(**options: bool) -> SeqLogprob:
        def fn(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
            return dpo_triton.fused_seq_logprob(logits, labels, mask, backend=backend, **options)

        return fn

    on_gpu = device.type == "cuda"
    needs_gpu = None if on_gpu else "its kernel is Triton's: needs a GPU"
    return [
        Peer(OURS, "fused_seq_logprob(logits, labels, mask)", ours, ours=True),
        Peer(
            OURS_IN_PLACE,
            "the same with inplace_backward=True",
            partial(ours, inplace_backward=True),
            ours=True,
            overwrites_logits=True,
            serves=lambda place: place.is_headline and place.has_backward,
        ),
        Peer(
            LOG_SOFTMAX,
            "log_softmax(logits.float(), -1).gather(...), the formula this project began with",
            lambda: mean_of(token_logps.log_softmax),
        ),
        Peer(
            LOGSUMEXP,
            "gather minus logsumexp, of logits.float()",
            lambda: mean_of(token_logps.logsumexp),
        ),
        Peer(
            COMPILED,
            "torch.compile of log_softmax, for static shapes; compiling is not counted",
            compiled,
        ),
        Peer(
            TRL,
            "trl.trainer.utils.selective_log_softmax, TRL's way on a CPU",
            lambda: mean_of(token_logps.trl_eager()),
            token_logps.TRL_EAGER,
            obstacle=f"see {TRL_KERNEL}" if on_gpu else None,
        ),
        Peer(
            TRL_KERNEL,
            "trl.kernels.logprob_entropy, TRL's way on a GPU; it computes the entropy too",
            lambda: mean_of(token_logps.trl_kernel()),
            TRL_KERNELS,
            obstacle=needs_gpu,
        ),
        Peer(
            LIGER,
            "liger_kernel's cross entropy; its gradient overwrites the logits",
            lambda: mean_of(token_logps.liger()),
            token_logps.LIGER_KERNELS,
            obstacle=needs_gpu,
            overwrites_logits=True,
        ),
    ]


def compiled() -> SeqLogprob:
    # Without dynamic=False a second shape would be compiled for any shape; without fullgraph a
    # compiler that gives up would leave eager code under this name.
    return torch.compile(mean_of(token_logps.log_softmax), dynamic=False, fullgraph=True)


def mean_of(of_tokens: TokenLogps) -> SeqLogprob:
    def fn(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        return masked_mean(of_tokens(logits, labels, mask), mask)

    return fn
