"""Batches of logits or hidden states, and float64's word on the first of their sequences."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_triton import reference

DEVIATION = 3.0  # of logits, which are normal
CHUNK = 2**24  # numbers that are drawn at a time


@dataclass(frozen=True)
class Batch:
    name: str  # of its shape
    rows: Tensor  # (B, T, V) logits, or (B, T, H) hidden states
    weight: Tensor | None  # (V, H), the head that hidden states go to
    labels: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) int64, 1 where scored
    share: float  # of the rows scored, as it was asked for
    upstream: Callable[[Tensor], Tensor]  # values (B,) -> what the loss says of them
    num_checked: int  # sequences that are compared with float64, the first ones

    @property
    def vocab_size(self) -> int:
        return self.rows.shape[-1] if self.weight is None else self.weight.shape[0]

    @property
    def dtype(self) -> str:
        return str(self.rows.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.name}, {self.dtype}, {self.share:.0%} scored"

    def scoring(self, share: float) -> "Batch":
        """The same with a mask: the first part of each sequence, the prompt, is not scored."""
        return dataclasses.replace(self, mask=mask_of(self.labels, share), share=share)

    @cached_property
    def truth(self) -> tuple[Tensor, ...]:
        """float64 values (C,) and the loss's gradients of the rows and the weight, of the first
        sequences, one at a time."""
        weight = None if self.weight is None else self.weight.double().requires_grad_()

        def value(b: int, rows: Tensor) -> Tensor:
            scored = self.mask[b] != 0
            logits = rows[None, scored]
            logits = logits if weight is None else logits @ weight.T
            return reference.seq_logprob(logits, self.labels[b : b + 1, scored])[0]

        every = range(self.num_checked)
        with torch.no_grad():
            values = torch.stack([value(b, self.rows[b].double()) for b in every])
        upstream = self.upstream(values).tolist()
        grads, sums = [], [] if weight is None else [torch.zeros_like(weight, requires_grad=False)]
        for b in every:
            leaf = self.rows[b].double().requires_grad_()
            inputs = [leaf] if weight is None else [leaf, weight]
            of_rows, *of_weight = torch.autograd.grad(value(b, leaf) * upstream[b], inputs)
            grads.append(of_rows)
            for total, part in zip(sums, of_weight, strict=True):
                total += part
        return values, torch.stack(grads), *sums

    @cached_property
    def roundings(self) -> tuple[float, ...]:
        """Half a unit in the last place of the largest value, in float32 and nats, and of the
        largest gradients, in their dtype and relative to them."""
        values, *grads = self.truth
        of_grads = (relative_rounding(grad, self.rows.dtype) for grad in grads)
        return rounding(values, torch.float32), *of_grads


def mask_of(labels: Tensor, share: float) -> Tensor:
    """(B, T) of 0 and 1: the last part of each sequence is scored, a token at the least."""
    seq_len = labels.shape[1]
    mask = torch.ones_like(labels)
    mask[:, : seq_len - max(1, round(share * seq_len))] = 0
    return mask


def increasing(values: Tensor) -> Tensor:
    """An upstream gradient that tells sequences apart."""
    return 1 + torch.arange(len(values), device=values.device) / 8


class Shape(NamedTuple):
    batch: int  # sequences
    seq_len: int
    vocab_size: int
    hidden_size: int | None = None  # of what goes to a head; None: logits
    name: str = ""

    def __str__(self) -> str:
        return f"{self.batch} x {self.seq_len} x {self.vocab_size}"

    @property
    def num_logits(self) -> int:
        return self.batch * self.seq_len * self.vocab_size

    def within(self, num_logits: int) -> "Shape":
        """The same in shorter sequences, if there would be more logits than that."""
        most = max(2, num_logits // (self.batch * self.vocab_size))
        return self._replace(seq_len=min(self.seq_len, most))

    def draw(
        self,
        dtype: torch.dtype,
        generator: torch.Generator,
        upstream: Callable[[Tensor], Tensor] = increasing,
        num_checked: int | None = None,
    ) -> Batch:
        """A batch of which all is scored; num_checked: by default all of its sequences."""
        device, tokens = generator.device, (self.batch, self.seq_len)

        def normal(*size: int, deviation: float = 1.0) -> Tensor:
            result = torch.empty(size, dtype=dtype, device=device)
            for some in result.split(max(1, CHUNK // result[0].numel())):  # never all in float32
                x = torch.randn(some.shape, generator=generator, device=device)
                some.copy_(x.mul_(deviation))
            return result

        if self.hidden_size is None:
            rows, weight = normal(*tokens, self.vocab_size, deviation=DEVIATION), None
        else:
            rows, deviation = normal(*tokens, self.hidden_size), DEVIATION / self.hidden_size**0.5
            weight = normal(self.vocab_size, self.hidden_size, deviation=deviation)
        labels = torch.randint(self.vocab_size, tokens, generator=generator, device=device)
        checked = self.batch if num_checked is None else min(self.batch, num_checked)
        every = torch.ones_like(labels)
        name = self.name or f"V = {self.vocab_size}"
        return Batch(name, rows, weight, labels, every, 1.0, upstream, checked)


def relative_error(grad: Tensor, truth: Tensor) -> float:
    """Largest absolute error of a gradient's first elements, relative to the largest element."""
    grad = grad.detach()[: len(truth)]  # it may be the leaf itself
    errors = [(g - t).abs().max() for g, t in zip(grad.split(4096), truth.split(4096), strict=True)]
    return float(torch.stack(errors).max() / truth.abs().max())


def rounding(x: Tensor, dtype: torch.dtype) -> float:
    """Half a unit in the last place of the largest element of x, stored as dtype."""
    _, exponent = math.frexp(float(x.abs().max()))  # largest = m * 2 ** exponent, 0.5 <= m < 1
    return math.ldexp(torch.finfo(dtype).eps / 2, exponent - 1)


def relative_rounding(x: Tensor, dtype: torch.dtype) -> float:
    """The same, relative to that element."""
    return rounding(x, dtype) / float(x.abs().max())
