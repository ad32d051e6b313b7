"""Four ways from a model and a batch to DPO's loss."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dpo_triton.integrations.trl as adapter
from benchmarks.common.logits_peers import log_softmax
from benchmarks.common.peers import OURS, Peer
from benchmarks.dpo_step.batch import NUM_PAIRS, Batch
from dpo_triton import fused_linear_seq_logprob, reference

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

LOGITS, TRL, TRL_WITH_OURS = "logits", "TRL", f"TRL with {OURS}"
BETA = 0.1

Sums = Callable[[Any, Batch], Tensor]  # (model, batch) -> (2 * pairs,) log-probabilities, nats


@dataclasses.dataclass(frozen=True)
class StepPeer(Peer):
    """Its fn is the loss of a batch."""

    sums: Sums = lambda model, batch: torch.empty(0)


def candidates(policy: Any, reference_model: Any, tokenizer: Any, folder: str) -> list[StepPeer]:
    def of_sums(sums: Sums) -> Callable[[Batch], Tensor]:
        def loss(batch: Batch) -> Tensor:
            with torch.no_grad():
                ref_logps = sums(reference_model, batch)
            chosen, rejected = (sums(policy, batch) - ref_logps).chunk(2)
            return -F.logsigmoid(BETA * (chosen - rejected)).mean()

        return loss

    @functools.cache
    def trainer() -> Any:
        return make_trainer(policy, reference_model, tokenizer, folder)

    def trl(head: Callable[[], Any]) -> Callable[[Batch], Tensor]:
        trained = trainer()

        def loss(batch: Batch) -> Tensor:
            with head():
                return trained.compute_loss(policy, dataclasses.asdict(batch))

        return loss

    return [
        StepPeer(
            LOGITS,
            "log_softmax(model(...).logits[:, :-1], -1).gather(...)",
            lambda: of_sums(sums_of_logits),
            sums=sums_of_logits,
        ),
        StepPeer(
            OURS,
            "fused_linear_seq_logprob on the backbone's hidden states",
            lambda: of_sums(sums_of_ours),
            ours=True,
            sums=sums_of_ours,
        ),
        StepPeer(
            TRL,
            "DPOTrainer.compute_loss, unpatched: its chunked head, its metrics",
            lambda: trl(contextlib.nullcontext),
            "trl.trainer.dpo_trainer",
            sums=sums_of_trl,
        ),
        StepPeer(
            TRL_WITH_OURS,
            "the same with dpo_triton.integrations.trl.fused()",
            lambda: trl(adapter.fused),
            "trl.trainer.dpo_trainer",
            sums=sums_of_trl_with_ours,
        ),
    ]


def make_trainer(policy: Any, reference_model: Any, tokenizer: Any, folder: str) -> Any:
    """A DPOTrainer; its data are not used. It gives both models a chunked head."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir=folder,
        beta=BETA,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        per_device_train_batch_size=NUM_PAIRS,
    )
    data = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
    return DPOTrainer(
        model=policy,
        ref_model=reference_model,
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
    )


def sums_of_logits(model: Any, batch: Batch) -> Tensor:
    logits = model(**batch.inputs).logits[:, :-1]
    return (log_softmax(logits, batch.input_ids[:, 1:]) * batch.scored).sum(1)


def sums_of_ours(model: Any, batch: Batch) -> Tensor:
    head, tokens = model.get_output_embeddings(), (batch.input_ids, batch.completion_mask)
    inputs = (hidden_states(model, batch), head.weight, *tokens)
    return fused_linear_seq_logprob(*inputs, bias=head.bias, reduction="sum", shift=True)


def sums_of_trl(model: Any, batch: Batch) -> Tensor:
    labels = batch.input_ids.masked_fill(batch.completion_mask == 0, -100)
    return model(**batch.inputs, labels=labels, fused_lm_head=True).log_probs.sum(1)


def sums_of_trl_with_ours(model: Any, batch: Batch) -> Tensor:
    with adapter.fused():
        return sums_of_trl(model, batch)


def hidden_states(model: Any, batch: Batch) -> Tensor:
    return model.base_model(**batch.inputs).last_hidden_state


@torch.no_grad()
def exact_sums(model: Any, batch: Batch) -> Tensor:
    """Sums of log-probabilities in float64 from the same hidden states, one sequence at a time."""
    weight = model.get_output_embeddings().weight.double()
    rows = zip(hidden_states(model, batch), batch.input_ids, batch.completion_mask, strict=True)
    sums = []
    for x, ids, mask in rows:
        inputs = ((x.double() @ weight.T)[None], ids[None], mask[None])
        sums.append(reference.seq_logprob(*inputs, reduction="sum", shift=True))
    return torch.cat(sums)
