"""Draw numerics.svg: where three formulas for a token's log-probability lose their digits.

    python docs/plot_numerics.py

Logits are drawn in float32 and rounded to their dtype; truth is `dpo_triton.reference` in float64
on the rounded ones. What each formula computes in is the dtype of its logits.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_triton import fused_seq_logprob, reference

MARGINS = tuple(range(-100, 82, 2))  # nats by which the target leads everybody else together
MARGIN_VOCAB_SIZE = 32000
VOCAB_SIZES = tuple(2**k for k in range(10, 19))
DTYPES = (torch.float32, torch.bfloat16)
FLOOR = 1e-9  # an error of 0 has no place on a logarithmic axis

Formula = Callable[[Tensor, Tensor], Tensor]  # (N, V), (N,) -> (N,)


def gathered(x: Tensor, labels: Tensor) -> Tensor:
    return x.gather(-1, labels[:, None])[:, 0]


FORMULAS: dict[str, Formula] = {
    "log_softmax, gather": lambda z, y: gathered(z.log_softmax(-1), y),
    "gather - logsumexp": lambda z, y: gathered(z, y) - z.logsumexp(-1),
    "dpo_triton": lambda z, y: fused_seq_logprob(z[:, None], y[:, None]),
}


class Errors(NamedTuple):
    """Of a formula at one margin, or one size: the largest over the rows drawn there."""

    value: float  # relative, or in nats
    target_grad: float  # relative: of d logp / d z[y] = 1 - p


def leading_by(margins: Tensor, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits (N, V) whose targets lead by `margins` (N,), up to a rounding; and the labels."""
    logits = torch.randn(len(margins), vocab_size)
    labels = torch.randint(vocab_size, (len(margins),))
    rows = torch.arange(len(margins))
    others = logits.double().index_put((rows, labels), torch.tensor(-math.inf).double())
    logits[rows, labels] = (others.logsumexp(-1) + margins).float()
    return logits.to(dtype), labels


def with_grad(formula: Formula, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Values, and the gradient of each at its own target, (N,) float64."""
    logits = logits.clone().requires_grad_()
    values = formula(logits, labels)
    (grad,) = torch.autograd.grad(values.sum(), logits)
    return values.detach().double(), gathered(grad, labels).double()


def exact(z: Tensor, y: Tensor) -> Tensor:
    values = reference.seq_logprob(z[:, None], y[:, None])
    assert isinstance(values, Tensor)
    return values


def margin_errors(
    formula: Formula,
    dtype: torch.dtype,
    margins: Sequence[float] = MARGINS,
    vocab_size: int = MARGIN_VOCAB_SIZE,
    rows: int = 4,
) -> list[Errors]:
    """Relative errors at each margin."""
    repeated = torch.tensor(margins, dtype=torch.float64).repeat_interleave(rows)
    logits, labels = leading_by(repeated, vocab_size, dtype)
    found = with_grad(formula, logits, labels)
    truth = with_grad(exact, logits.double(), labels)
    largest = [
        ((x - t) / t).abs().view(-1, rows).amax(1) for x, t in zip(found, truth, strict=True)
    ]
    return [Errors(*pair) for pair in torch.stack(largest, 1).tolist()]


def size_error(formula: Formula, dtype: torch.dtype, vocab_size: int, rows: int = 16) -> float:
    """Largest error of a token's log-probability in nats, any token, logits of deviation 3."""
    logits = (3 * torch.randn(rows, vocab_size)).to(dtype)
    labels = torch.randint(vocab_size, (rows,))
    error = formula(logits, labels).double() - exact(logits.double(), labels)
    return float(error.abs().max())


def plot(
    path: Path, margins: Sequence[float] = MARGINS, vocab_sizes: Sequence[int] = VOCAB_SIZES
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = path.name  # the same file from the same numbers
    from matplotlib import pyplot as plt

    figure, (values, grads, sizes) = plt.subplots(1, 3, figsize=(14, 4.8), layout="constrained")
    for dtype, style in zip(DTYPES, ("-", "--"), strict=True):
        for color, (name, formula) in zip(("C1", "C2", "C0"), FORMULAS.items(), strict=True):
            torch.manual_seed(0)  # the same logits for each
            errors = margin_errors(formula, dtype, margins)
            of_sizes = [size_error(formula, dtype, size) for size in vocab_sizes]
            label = f"{name}, {str(dtype).removeprefix('torch.')}"
            for axis, x, y in (
                (values, margins, [error.value for error in errors]),
                (grads, margins, [error.target_grad for error in errors]),
                (sizes, vocab_sizes, of_sizes),
            ):
                axis.plot(x, [max(e, FLOOR) for e in y], style, color=color, label=label)
    for axis, what in ((values, "log p"), (grads, "d log p / d target's logit")):
        axis.axvline(17, color="0.6", linewidth=1)
        axis.set(xlabel="target's lead, nats", ylabel=f"relative error of {what}")
    sizes.set(xlabel="vocabulary size", ylabel="error of log p, nats", xscale="log")
    for axis in (values, grads, sizes):
        axis.set(yscale="log", ylim=(FLOOR / 2, 10))
        axis.grid(alpha=0.3)
    handles, names = values.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = Path(__file__).with_name("numerics.svg")
    parser.add_argument("--out", type=Path, default=default, help="file to write")
    plot(parser.parse_args().out)
