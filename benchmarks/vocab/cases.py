"""Batches of logits of many sizes, and the rows of all implementations on one."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.common.cases import DEVIATION, Batch, Call, Case
from benchmarks.common.check import CHECK_SHAPE
from benchmarks.common.logits_peers import LOG_SOFTMAX
from benchmarks.common.measure import least_bytes
from benchmarks.common.peers import Peer, Place
from benchmarks.common.report import BOTH, FORWARD
from benchmarks.vocab.rows import Row


class Effort(NamedTuple):
    """How much is measured of one size."""

    rounds: int  # over all implementations, each time in another order
    min_run_s: float | None  # of an implementation in a round; None: one call, not warmed up
    num_checked: int  # sequences that are compared with float64


class Size(NamedTuple):
    batch: int
    seq_len: int
    vocab_size: int
    effort: Effort
    dtypes: Sequence[str] = ("float32",)
    shares: Sequence[float] = (1.0,)  # of the rows scored
    # Threads of PyTorch, and other processes that each keep a core busy.
    settings: Sequence[tuple[int, int]] = ((1, 0),)
    is_headline: bool = False  # where the figures that are quoted come from

    def __str__(self) -> str:
        return f"{self.batch} x {self.seq_len} x {self.vocab_size}"

    @property
    def num_logits(self) -> int:
        return self.batch * self.seq_len * self.vocab_size

    @property
    def num_cases(self) -> int:
        return 2 * len(self.dtypes) * len(self.shares) * len(self.settings)

    def within(self, num_logits: int) -> "Size":
        """The same in shorter sequences, if there would be more logits than that."""
        most = max(2, num_logits // (self.batch * self.vocab_size))
        return self._replace(seq_len=min(self.seq_len, most))


def make_batch(size: Size, dtype: torch.dtype, generator: torch.Generator) -> Batch:
    device, shape = generator.device, (size.batch, size.seq_len)
    logits = torch.empty(*shape, size.vocab_size, dtype=dtype, device=device)
    for rows in logits:  # never all of them in float32
        rows.copy_(torch.randn(rows.shape, generator=generator, device=device).mul_(DEVIATION))
    labels = torch.randint(size.vocab_size, shape, generator=generator, device=device)
    upstream = torch.linspace(0.5, 1.5, size.batch, device=device)

    def first(values: Tensor) -> Tensor:
        return upstream[: len(values)]

    mask, checked = torch.ones_like(labels), min(size.batch, size.effort.num_checked)
    return Batch(f"V = {size.vocab_size}", logits, None, labels, mask, 1.0, first, checked)


def make_cases(size: Size, peers: Sequence[Peer], generator: torch.Generator) -> Iterator[Case]:
    """Yield a case for each dtype, share, setting and pass."""
    effort = size.effort
    for dtype in size.dtypes:
        torch.compiler.reset()  # it compiles for eight shapes and no more
        batch = make_batch(size, getattr(torch, dtype), generator)
        for share in size.shares:
            scored = batch.scoring(share)
            for threads, neighbours in size.settings:
                for passes in (FORWARD, BOTH):
                    place = Place(size.is_headline, passes == BOTH, share == 1)
                    yield Case(
                        group=str(size),
                        batch=scored,
                        passes=passes,
                        peers=[peer for peer in peers if peer.serves(place)],
                        rounds=effort.rounds,
                        min_run_s=effort.min_run_s,
                        threads=threads,
                        neighbours=neighbours,
                    )


def rows_of(case: Case, calls: list[Call], copy_gb_per_s: float, part: str) -> list[Row]:
    """Return a row for each implementation that ran."""
    logits = case.batch.rows
    num_scored = int(case.batch.mask.sum()) * case.batch.vocab_size
    traffic = least_bytes(logits.numel(), num_scored, logits.element_size())[case.passes]
    log_softmax = next((call for call in calls if call.peer.name == LOG_SOFTMAX), None)
    return [
        Row(
            **case.common(call),
            part=part,
            threads=case.threads,
            neighbours=case.neighbours,
            glogits_per_s=logits.numel() / call.ms / 1e6,
            copy_share=traffic / call.ms / 1e6 / copy_gb_per_s,
            grad_error=next(iter(call.grad_errors), None),
            grad_rounding=case.batch.roundings[1],
            speedup=call.speedup_over(log_softmax),
        )
        for call in calls
    ]


def check_batch(vocab_size: int, dtype: torch.dtype, generator: torch.Generator) -> Batch:
    return make_batch(Size(*CHECK_SHAPE, vocab_size, Effort(1, None, 2)), dtype, generator)
