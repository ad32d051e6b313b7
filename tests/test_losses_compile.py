"""Numbers that change from call to call are symbols to torch.compile: few graphs, and right."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_triton.losses import (
    LOSSES,
    SequenceLogps,
    exo_pair_loss,
    ld_dpo_mask,
    mixture_loss,
    sigmoid_loss,
)

# From a first value, which is compiled as a constant, to a last one, in twelve steps.
NUMBERS = dict(
    beta=(0.05, 0.9),
    label_smoothing=(0.01, 0.4),
    f_alpha_divergence_coef=(0.0, 1.1),  # passes 1.0, where the divergence is another function
    discopop_tau=(0.05, 1.0),
    delta=(-1.0, 1.0),
    simpo_gamma=(0.1, 1.5),
    cpo_alpha=(0.0, 2.0),
    alpha=(-0.5, 0.6),  # passes 0.0, likewise
    kl=(-0.5, 0.6),  # is held at 0
    desirable_weight=(0.5, 2.0),
    undesirable_weight=(0.5, 2.0),
)
STEPS = 12


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def values_of(*options: str) -> list[dict[str, float]]:
    """The options at each step; every number is another one than at the step before."""
    return [
        {
            name: round(first + (last - first) * step / (STEPS - 1), 12)
            for name, (first, last) in NUMBERS.items()
            if name in options
        }
        for step in range(STEPS)
    ]


def assert_few_graphs(
    function: Callable[..., Tensor],
    inputs: list[Tensor],
    steps: list[dict[str, float]],
    backend: str = "aot_eager",
) -> None:
    """At most three graphs, with eager's values and gradients at each step."""
    graphs = []

    def counted(graph: Any, example_inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        if backend == "eager":
            return graph.forward
        return torch._dynamo.lookup_backend(backend)(graph, example_inputs)

    compiled = torch.compile(function, fullgraph=True, backend=counted)
    for numbers in steps:
        results = []
        for call in (function, compiled):
            leaves = [x.clone().requires_grad_() for x in inputs]
            losses = call(*leaves, **numbers)
            results.append((losses.detach(), *torch.autograd.grad(losses.sum(), leaves)))
        torch.testing.assert_close(results[1], results[0])
    assert len(graphs) <= 3, f"{len(graphs)} graphs for {len(steps)} values"


FILES = sorted({loss.function.__module__ for loss in LOSSES.values()})


@pytest.mark.parametrize("file", FILES)
def test_all_numbers_of_all_losses(file):
    """Those of a file in one graph; a number that one of them made a constant would show."""
    losses = [x for x in LOSSES.values() if x.function.__module__ == file and x.takes != "tokens"]
    reference = [-torch.rand(4) for _ in range(2)]
    lengths = torch.tensor([3.0, 1.0, 0.0, 7.0])
    constants = dict(
        f_divergence_type="alpha_divergence", chosen_lengths=lengths, rejected_lengths=lengths
    )

    def total(chosen: Tensor, rejected: Tensor, **numbers: float) -> Tensor:
        every = constants | numbers
        terms = []
        for loss in losses:
            inputs = (chosen, rejected, *(reference if loss.needs_reference else ()))
            options = {name: every[name] for name in loss.options if name in every}
            terms.append(loss.function(*inputs, **options).losses)
        return torch.cat(terms)

    names = {name for loss in losses for name in loss.options}
    assert_few_graphs(total, [-torch.rand(4), -torch.rand(4)], values_of(*names))


def mixture(chosen: Tensor, rejected: Tensor, **numbers: float) -> Tensor:
    lengths = torch.tensor([3.0, 1.0, 0.0, 7.0])
    answers = [SequenceLogps(x, "sum", lengths) for x in (chosen, rejected, chosen, rejected)]
    answers[2:] = [x._replace(values=0.5 * x.values.detach()) for x in answers[2:]]
    weight, rpo_alpha = numbers.pop("cpo_alpha"), numbers.pop("delta")
    weights = {"sigmoid": 1.0, "ipo": weight, "exo_pair": 0.5, "discopop": -weight}
    return mixture_loss(weights, *answers, rpo_alpha=rpo_alpha, **numbers).losses


def test_a_mixture_and_its_weights():
    names = ("beta", "label_smoothing", "discopop_tau", "cpo_alpha", "delta")
    assert_few_graphs(mixture, [-torch.rand(4), -torch.rand(4)], values_of(*names), "eager")


def test_inductor():
    """The default compiler, once, of a loss with a logarithm: it needs a C++ compiler on a CPU."""
    logps = [-torch.rand(4) for _ in range(4)]

    def losses(chosen: Tensor, **numbers: float) -> Tensor:
        return exo_pair_loss(chosen, *logps[1:], **numbers).losses

    assert_few_graphs(losses, logps[:1], values_of("beta", "label_smoothing"), "inductor")


def test_weights_of_tokens():
    mask = (torch.rand(4, 5) < 0.7).float()

    def weighed(values: Tensor, *, label_smoothing: float) -> Tensor:
        return (values * ld_dpo_mask(mask, label_smoothing)).sum(1)

    assert_few_graphs(weighed, [torch.rand(4, 5)], values_of("label_smoothing"))


def test_integers_that_change():
    logps = [-torch.rand(4) for _ in range(4)]

    def losses(chosen: Tensor, beta: float) -> Tensor:
        return sigmoid_loss(chosen, *logps[1:], beta=beta).losses

    assert_few_graphs(losses, logps[:1], [dict(beta=beta) for beta in range(1, STEPS + 1)])


def test_a_wrong_number_is_refused_while_tracing():
    """Only the values that were checked take the graph: a later wrong one is checked anew."""
    logps = [-torch.rand(4) for _ in range(4)]
    compiled = torch.compile(
        lambda beta: sigmoid_loss(*logps, beta=beta).losses, fullgraph=True, backend="eager"
    )
    for beta in (0.1, 0.2):
        compiled(beta)
    for beta in (-0.1, float("inf"), float("nan"), True):
        with pytest.raises(Exception, match=r"check_(beta|number)"):
            compiled(beta)
