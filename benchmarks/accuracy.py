"""How far results are from float64 on the same inputs; the check that comes before any timing."""

import math
from dataclasses import dataclass

import torch
from peers import Peer, brief
from torch import Tensor

from dpo_triton import reference

# What the check allows: values in nats; gradients relative to their largest element, which bfloat16
# stores within 2 ** -9 of itself.
VALUE_BUDGET = 1e-5
GRAD_BUDGET = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
CHECK_VOCAB_SIZES = (257, 5003)


@dataclass(frozen=True)
class Truth:
    values: Tensor  # (C,) float64, of the first C sequences
    grad_logits: Tensor  # (C, T, V) float64


def float64_truth(
    logits: Tensor, labels: Tensor, mask: Tensor, grad_values: Tensor, *, num_sequences: int
) -> Truth:
    """Return values and gradients of the first sequences of a batch, computed one at a time."""
    values, grads = [], []
    for b in range(num_sequences):
        one = slice(b, b + 1)
        leaf = logits[one].double().requires_grad_()
        value = reference.seq_logprob(leaf, labels[one], mask[one])
        grads += torch.autograd.grad(value, leaf, grad_values[one].double())
        values.append(value.detach())
    return Truth(torch.cat(values), torch.cat(grads))


def value_error(values: Tensor, truth: Truth) -> float:
    """Largest absolute error of the values, in nats."""
    return float((values.detach()[: len(truth.values)] - truth.values).abs().max())


def grad_error(grad_logits: Tensor, truth: Truth) -> float:
    """Largest absolute error of the gradient, relative to its largest element."""
    grad_logits = grad_logits.detach()  # it may be the leaf itself
    errors = [(g - t).abs().max() for g, t in zip(grad_logits, truth.grad_logits, strict=False)]
    return float(torch.stack(errors).max() / truth.grad_logits.abs().max())


def rounding(x: Tensor, dtype: torch.dtype) -> float:
    """Half a unit in the last place of the largest element of x, stored as dtype."""
    _, exponent = math.frexp(float(x.abs().max()))  # largest = m * 2 ** exponent, 0.5 <= m < 1
    return math.ldexp(torch.finfo(dtype).eps / 2, exponent - 1)


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
            mask = torch.tensor([[0, 0, 1, 0, 1, 1, 0], [1] * 7, [0] * 7], device=device)
            grad_values = torch.tensor([1.0, -0.5, 2.0], device=device)
            truth = float64_truth(logits, labels, mask, grad_values, num_sequences=3)
            for peer in peers:
                where = f"{peer.name}, V = {vocab_size}, {str(dtype).removeprefix('torch.')}"
                try:
                    leaf = logits.clone().requires_grad_()
                    values = peer.fn(leaf, labels, mask)
                    (grad_logits,) = torch.autograd.grad(values, leaf, grad_values)
                except Exception as error:
                    found.append(f"{where}: {brief(error)}")
                    continue
                stray = float(grad_logits.detach()[mask == 0].abs().max())
                budgets = (
                    ("values", value_error(values, truth), VALUE_BUDGET),
                    ("gradient", grad_error(grad_logits, truth), GRAD_BUDGET[dtype]),
                    ("gradient where nothing is scored", stray, 0.0),
                )
                found += [
                    f"{where}: {what} off by {error:.1e}, at most {budget:.1e} is right"
                    for what, error, budget in budgets
                    if not error <= budget  # NaN is off too
                ]
    return found
