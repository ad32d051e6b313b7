"""Batches of logits, and the rows of all implementations on one."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.common import measure
from benchmarks.common.accuracy import (
    CHECK_MASK,
    CHECK_VOCAB_SIZES,
    beyond,
    relative_rounding,
    rounding,
)
from benchmarks.common.cases import Call, Result, Session
from benchmarks.common.peers import Peer, brief
from benchmarks.common.report import BACKWARD, FORWARD
from benchmarks.vocab.peers import LOG_SOFTMAX
from benchmarks.vocab.rows import Row, least_bytes
from dpo_triton import reference

BATCH = 8  # sequences
# What the check allows: values in nats; gradients relative to their largest element, which bfloat16
# stores within 2 ** -9 of itself.
VALUE_BUDGET = 1e-5
GRAD_BUDGET = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@dataclass(frozen=True)
class Effort:
    """How much is measured at one vocabulary size."""

    num_logits: int  # of a batch, about
    rounds: int  # over all implementations, each time in another order
    min_run_s: float  # of an implementation in a round
    num_checked: int  # sequences that are compared with float64


@dataclass(frozen=True)
class Batch:
    logits: Tensor  # (B, T, V)
    labels: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) int64, 1 where scored
    grad_values: Tensor  # (B,) float32, upstream gradient of the values
    share: float  # of the rows scored, as it was asked for
    num_checked: int  # sequences that are compared with float64

    @property
    def dtype(self) -> str:
        return str(self.logits.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"V = {self.logits.shape[-1]}, {self.dtype}, {self.share:.0%} scored"

    @cached_property
    def truth(self) -> tuple[Tensor, Tensor]:
        """float64 values (C,) and gradient (C, T, V) of the first sequences, one at a time."""
        values, grads = [], []
        for b in range(self.num_checked):
            one = slice(b, b + 1)
            leaf = self.logits[one].double().requires_grad_()
            value = reference.seq_logprob(leaf, self.labels[one], self.mask[one])
            grads += torch.autograd.grad(value, leaf, self.grad_values[one].double())
            values.append(value.detach())
        return torch.cat(values), torch.cat(grads)


def make_batches(
    vocab_size: int,
    dtype: torch.dtype,
    shares: list[float],
    effort: Effort,
    generator: torch.Generator,
) -> Iterator[Batch]:
    """Yield a batch for each share of scored rows, of the same logits, normal with deviation 3."""
    device = generator.device
    seq_len = max(2, effort.num_logits // (BATCH * vocab_size))
    shape = (BATCH, seq_len)
    logits = torch.randn(*shape, vocab_size, generator=generator, device=device).mul_(3).to(dtype)
    labels = torch.randint(vocab_size, shape, generator=generator, device=device)
    grad_values = torch.linspace(0.5, 1.5, BATCH, device=device)
    for share in shares:
        num_masked = seq_len - max(1, round(share * seq_len))  # the prompt, of every sequence
        mask = torch.ones(shape, dtype=torch.int64, device=device)
        mask[:, :num_masked] = 0
        yield Batch(logits, labels, mask, grad_values, share, effort.num_checked)


def make_call(peer: Peer, batch: Batch, passes: str) -> Call:
    def forward() -> Result:
        with torch.no_grad():
            return peer.fn(batch.logits, batch.labels, batch.mask), ()

    if passes == FORWARD:
        return Call(peer, forward)
    leaf = batch.logits.clone() if peer.overwrites_logits else batch.logits.detach()
    leaf.requires_grad_()

    def forward_backward() -> Result:
        values = peer.fn(leaf, batch.labels, batch.mask)
        return values, torch.autograd.grad(values, leaf, batch.grad_values)  # leaves no .grad

    def restore() -> None:
        with torch.no_grad():
            leaf.copy_(batch.logits)

    return Call(peer, forward_backward, restore if peer.overwrites_logits else None)


def measure_case(
    session: Session,
    batch: Batch,
    passes: str,
    peers: list[Peer],
    effort: Effort,
    copy_gb_per_s: float,
) -> list[Row]:
    """Return a row for each peer that runs."""

    def sample(call: Call) -> list[float]:
        run_s = effort.min_run_s
        return measure.times_ms(call.fn, session.device, min_run_s=run_s, restore=call.restore)

    truth = batch.truth
    made = (make_call(peer, batch, passes) for peer in peers)
    calls = session.measure(made, f"{batch}, {passes}", truth, effort.rounds, sample)
    num_seqs, seq_len, vocab_size = batch.logits.shape
    num_logits, num_scored = batch.logits.numel(), int(batch.mask.sum()) * vocab_size
    traffic = least_bytes(num_logits, num_scored, batch.logits.element_size(), passes)
    log_softmax_ms = {call.peer.name: call.ms for call in calls}.get(LOG_SOFTMAX)
    return [
        Row(
            impl=call.peer.name,
            vocab_size=vocab_size,
            batch=num_seqs,
            seq_len=seq_len,
            dtype=batch.dtype,
            scored_share=batch.share,
            passes=passes,
            **call.times(),
            glogits_per_s=num_logits / call.ms / 1e6,
            copy_share=traffic / call.ms / 1e6 / copy_gb_per_s,
            peak_mib=call.peak_mib,
            value_error=call.value_error,
            value_rounding=rounding(truth[0], torch.float32),
            grad_error=next(iter(call.grad_errors), None),
            grad_rounding=relative_rounding(truth[1], batch.logits.dtype),
            speedup=None if log_softmax_ms is None else log_softmax_ms / call.ms,
        )
        for call in calls
    ]


def complaints(peers: list[Peer], dtypes: list[torch.dtype], device: torch.device) -> list[str]:
    """Compare small batches with float64, holes in the mask and an empty sequence among them.

    Return what is off, a line each.
    """
    found = []
    for vocab_size in CHECK_VOCAB_SIZES:
        for dtype in dtypes:
            generator = torch.Generator().manual_seed(vocab_size)
            logits = (torch.randn(3, 7, vocab_size, generator=generator) * 3).to(device, dtype)
            labels = torch.randint(vocab_size, (3, 7), generator=generator).to(device)
            mask = torch.tensor([*CHECK_MASK, (0,) * 7], device=device)
            grad_values = torch.tensor([1.0, -0.5, 2.0], device=device)
            share = float(mask.float().mean())
            batch = Batch(logits, labels, mask, grad_values, share, num_checked=3)
            for peer in peers:
                where = f"{peer.name}, V = {vocab_size}, {batch.dtype}"
                call = make_call(peer, batch, BACKWARD)
                try:
                    call.try_out(batch.truth, device)
                except Exception as error:
                    found.append(f"{where}: {brief(error)}")
                    continue
                _, (grad_logits,) = call.run()
                stray = float(grad_logits.detach()[mask == 0].abs().max())
                budgets = (
                    ("values", call.value_error, VALUE_BUDGET),
                    ("gradient", call.grad_errors[0], GRAD_BUDGET[dtype]),
                    ("gradient where nothing is scored", stray, 0.0),
                )
                found += beyond(where, budgets)
    return found
