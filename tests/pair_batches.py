"""Pairs for the losses from logits, and each loss in float64."""

import math

import torch
from batches import make_batch

from dpo_triton import reference
from dpo_triton.losses import LOSSES, split_pairs

LN_2 = torch.tensor(math.log(2)).item()
OPTIONS = {"kto": dict(kl=0.3)}


def draw_pairs(
    pairs: int = 3, seq_len: int = 7, vocab_size: int = 60, dtype=torch.float32, device="cpu"
):
    """A policy's batch, with holes and weights in its mask, and the logits of a reference."""
    batch = make_batch((2 * pairs, seq_len, vocab_size), dtype, device)
    batch.mask[:, -1] += 0.5  # no empty answer
    noise = torch.randn(batch.logits.shape, device=device)
    return batch, (batch.logits.float() + 0.3 * noise).to(dtype)


def reference_of(name: str, ref_logits: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(ref_logits=ref_logits) if LOSSES[name].needs_reference else {}


def exact_loss(name, logits, ref_logits, labels, mask, layout="concat", options=None, **where):
    """The loss in float64, from the specification's log-probabilities and the loss's function."""
    loss = LOSSES[name]
    values = []
    for x in (logits, ref_logits) if loss.needs_reference else (logits,):
        reduction = "sum" if loss.takes == "tokens" else loss.takes
        logps, stats = reference.seq_logprob(
            x.cpu().double() if x is ref_logits else x,
            labels.cpu(),
            mask.cpu(),
            reduction=reduction,
            stats=["lengths"],
            **where,
        )
        values += split_pairs(logps, layout)
    chosen_lengths, _ = split_pairs(stats["lengths"], layout)
    if loss.takes == "tokens":
        return loss.function(values[0], chosen_lengths).losses
    if "cpo_alpha" in loss.options or name == "orpo":
        options = dict(chosen_lengths=chosen_lengths) | (options or {})
    return loss.function(*values, **(options or {})).losses
