"""One case, a batch and a pass: every implementation is run on it, and each gives a row."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import accuracy
import measure
import numpy as np
import torch
from peers import LOG_SOFTMAX, Peer, brief, forget_kept_buffers
from report import FORWARD, Row, least_bytes
from torch import Tensor

BATCH = 8  # sequences


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
    truth: accuracy.Truth

    @property
    def dtype(self) -> str:
        return str(self.logits.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"V = {self.logits.shape[-1]}, {self.dtype}, {self.share:.0%} scored"


@dataclass
class Call:
    """An implementation on its way to a row."""

    peer: Peer
    fn: Callable[[], tuple[Tensor, Tensor | None]]  # -> values (B,), gradient (B, T, V) or None
    restore: Callable[[], None] | None  # undoes what fn does to the logits
    peak_mib: float | None = None
    value_error: float = 0.0
    grad_error: float | None = None
    samples: list[float] = field(default_factory=list)  # ms


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
        truth = accuracy.float64_truth(
            logits, labels, mask, grad_values, num_sequences=effort.num_checked
        )
        yield Batch(logits, labels, mask, grad_values, share, truth)


def measure_case(
    batch: Batch,
    passes: str,
    peers: list[Peer],
    effort: Effort,
    copy_gb_per_s: float,
    failures: dict[str, list[str]],
    progress: Callable[[], object],
) -> list[Row]:
    """Return a row for each peer that runs; add the rest to failures, what happened -> where.

    progress is called when a peer has been tried, and each time that it has been timed.
    """
    device = batch.logits.device
    calls = []
    for peer in peers:
        call = _make_call(peer, batch, passes)
        try:
            _try_out(call, batch.truth, device)
        except Exception as error:  # a peer may lack a compiler, a device or memory; we may not
            if peer.ours:
                raise
            failures.setdefault(f"{peer.name}: {brief(error)}", []).append(f"{batch}, {passes}")
        else:
            calls.append(call)
        progress()
    # Never in turns: threads of one implementation that spin for work would slow the next one down.
    for turn in range(effort.rounds):
        for call in calls[turn:] + calls[:turn]:
            call.samples += measure.times_ms(
                call.fn, device, min_run_s=effort.min_run_s, restore=call.restore
            )
            progress()
    return _to_rows(calls, batch, passes, copy_gb_per_s)


def _make_call(peer: Peer, batch: Batch, passes: str) -> Call:
    def forward() -> tuple[Tensor, None]:
        with torch.no_grad():
            return peer.fn(batch.logits, batch.labels, batch.mask), None

    if passes == FORWARD:
        return Call(peer, forward, None)

    leaf = batch.logits.clone() if peer.overwrites_logits else batch.logits.detach()
    leaf.requires_grad_()

    def forward_backward() -> tuple[Tensor, Tensor]:
        values = peer.fn(leaf, batch.labels, batch.mask)
        (grad_logits,) = torch.autograd.grad(values, leaf, batch.grad_values)  # leaves no .grad
        return values, grad_logits

    def restore() -> None:
        with torch.no_grad():
            leaf.copy_(batch.logits)

    return Call(peer, forward_backward, restore if peer.overwrites_logits else None)


def _try_out(call: Call, truth: accuracy.Truth, device: torch.device) -> None:
    """Run twice: to compile, to warm up and for the errors, and then for the memory."""
    values, grad_logits = call.fn()
    call.value_error = accuracy.value_error(values, truth)
    if grad_logits is not None:
        call.grad_error = accuracy.grad_error(grad_logits, truth)
    del values, grad_logits
    if call.restore is not None:
        call.restore()
    if call.peer.ours:
        forget_kept_buffers()
    call.peak_mib = measure.peak_mib(call.fn, device)


def _to_rows(calls: list[Call], batch: Batch, passes: str, copy_gb_per_s: float) -> list[Row]:
    num_seqs, seq_len, vocab_size = batch.logits.shape
    num_logits = batch.logits.numel()
    traffic = least_bytes(
        num_logits, int(batch.mask.sum()) * vocab_size, batch.logits.element_size(), passes
    )
    truth_grad = batch.truth.grad_logits
    largest_grad = float(truth_grad.abs().max())
    ms = {call.peer.name: float(np.median(call.samples)) for call in calls}
    rows = []
    for call in calls:
        name = call.peer.name
        p20, p80 = np.quantile(call.samples, [0.2, 0.8]).tolist()
        rows.append(
            Row(
                impl=name,
                vocab_size=vocab_size,
                batch=num_seqs,
                seq_len=seq_len,
                dtype=batch.dtype,
                scored_share=batch.share,
                passes=passes,
                ms=ms[name],
                ms_p20=p20,
                ms_p80=p80,
                samples=len(call.samples),
                glogits_per_s=num_logits / ms[name] / 1e6,
                copy_share=traffic / ms[name] / 1e6 / copy_gb_per_s,
                peak_mib=call.peak_mib,
                value_error=call.value_error,
                value_rounding=accuracy.rounding(batch.truth.values, torch.float32),
                grad_error=call.grad_error,
                grad_rounding=accuracy.rounding(truth_grad, batch.logits.dtype) / largest_grad,
                speedup=ms[LOG_SOFTMAX] / ms[name] if LOG_SOFTMAX in ms else None,
            )
        )
    return rows
