"""The modules: their functions with options kept, and nothing else."""

import copy
import inspect
import pickle
from typing import Any, get_type_hints

import pytest
import torch

from dpo_triton import fused_dpo_loss, fused_linear_dpo_loss, nn
from dpo_triton.losses import LossOptions

LABELS = torch.randint(0, 11, (4, 6))
MASK = torch.rand(4, 6)


def inputs_of(module: type) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Positional arguments and the reference's tensors."""
    if module is nn.DPOLoss:
        return [torch.randn(4, 6, 11, requires_grad=True)], dict(ref_logits=torch.randn(4, 6, 11))
    head = [torch.randn(4, 6, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)]
    return head, dict(ref_hidden=torch.randn(4, 6, 5), ref_weight=torch.randn(11, 5))


CASES = [
    (nn.DPOLoss, fused_dpo_loss, dict(inplace_backward=False)),
    (nn.LinearDPOLoss, fused_linear_dpo_loss, dict(tile_bytes=1000)),
]


@pytest.mark.parametrize(("module", "function", "own"), CASES)
def test_computes_what_the_function_does(module, function, own):
    leaves, reference = inputs_of(module)
    options: dict[str, Any] = dict(
        loss_type=["ipo", "sft"], beta=0.3, shift=True, stats=("entropy",), ld_alpha=0.5, **own
    )
    expected = function(*leaves, LABELS, MASK, **reference, **options)
    gradients = torch.autograd.grad(expected.loss, leaves)
    original = module(**options)
    for loss in (original, copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        result = loss(*leaves, LABELS, MASK, **reference)
        assert torch.equal(result.loss, expected.loss)
        assert torch.equal(
            result.metrics.stats["chosen_entropy"], expected.metrics.stats["chosen_entropy"]
        )
        for ours, theirs in zip(torch.autograd.grad(result.loss, leaves), gradients, strict=True):
            assert torch.equal(ours, theirs)
        assert not list(loss.parameters())
        assert not loss.state_dict()


@pytest.mark.parametrize(("module", "function", "own"), CASES)
def test_the_call_has_the_last_word(module, function, own):
    leaves, reference = inputs_of(module)
    loss = module(loss_type="kto", beta=0.3, **own)
    result = loss(*leaves, LABELS, MASK, **reference, kl=0.25, beta=0.7)
    expected = function(*leaves, LABELS, MASK, **reference, loss_type="kto", beta=0.7, kl=0.25)
    assert torch.equal(result.loss, expected.loss)
    assert loss.options["beta"] == 0.3
    logps = torch.randn(4)
    of_logps = module(ref_reduction="sum")(*leaves, LABELS, ref_logps=logps).loss
    plain = function(*leaves, LABELS, ref_logps=logps, ref_reduction="sum").loss
    assert torch.equal(of_logps, plain)


def test_shows_its_options():
    assert repr(nn.DPOLoss()) == "DPOLoss()"
    shown = repr(nn.LinearDPOLoss(loss_type="simpo", simpo_gamma=0.5, tile_bytes=1 << 20))
    assert shown == "LinearDPOLoss(loss_type='simpo', simpo_gamma=0.5, tile_bytes=1048576)"


@pytest.mark.parametrize(("module", "function", "own"), CASES)
def test_options_are_the_function_s(module, function, own):
    """Each keyword argument once, in the constructor unless it is a tensor, and in the call."""
    keywords = {
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    } | set(LossOptions.__annotations__)
    of_constructor, of_call = (
        set(get_type_hints(getattr(nn, module.__name__ + kind))) for kind in ("Options", "Inputs")
    )
    assert of_call == keywords
    tensors = {"ref_logps", "ref_logits", "ref_hidden", "ref_weight", "ref_bias", "bias"}
    assert of_constructor == keywords - tensors - {"cu_seqlens"}


@pytest.mark.parametrize("module", [nn.DPOLoss, nn.LinearDPOLoss])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(beta=-1.0), ValueError, "beta must be positive, got -1.0"),
        (dict(gamma=1.0), TypeError, "'gamma' is no option of any loss"),
        (dict(loss_type="dpo"), ValueError, "a loss must be out of"),
        (dict(loss_type="simpo", label_smoothing=0.7), ValueError, "label_smoothing must be in"),
        (dict(simpo_gamma=0.5), ValueError, "simpo_gamma is an option of simpo"),
        (dict(backend="cuda"), ValueError, "backend must be .*got 'cuda'"),
        (dict(temperature=0.0), ValueError, "temperature must be positive"),
        (dict(layout="pairs"), ValueError, "layout must be"),
        (dict(stats=("lengths",)), ValueError, "stats must be out of"),
        (dict(ref_reduction="max"), ValueError, "ref_reduction must be"),
        (dict(ld_alpha=2.0), ValueError, r"ld_alpha must be in \[0, 1\]"),
    ],
)
def test_wrong_options_are_refused_in_the_constructor(options, error, message, module):
    with pytest.raises(error, match=message):
        module(**options)


def test_built_anywhere():
    """No default device or dtype reaches the check of the options."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            nn.DPOLoss(loss_type="kto", backend="triton")
            nn.LinearDPOLoss(loss_type="sft")
    finally:
        torch.set_default_dtype(before)


def test_compiles_without_a_graph_break():
    leaves, reference = inputs_of(nn.DPOLoss)
    loss = nn.DPOLoss(loss_type="ipo", shift=True)
    expected = loss(*leaves, LABELS, MASK, **reference).loss
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    result = compiled(*leaves, LABELS, MASK, **reference).loss
    assert torch.equal(result, expected)
    assert torch.equal(*(torch.autograd.grad(x, leaves)[0] for x in (result, expected)))
