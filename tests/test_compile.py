"""torch.compile sees one call without a break, and the operators keep torch.library's contract."""

import pytest
import torch
import torch.nn.functional as F
from backends import BACKENDS
from batches import fused, make_batch, value_and_grad
from pairwise import pairwise

import dpo_triton
from dpo_triton import _ops


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


CASES = {
    "mean": {},
    "shift": dict(shift=True, reduction="sum"),
    "softcap": dict(softcap=9.0, temperature=1.5),
}


@pytest.mark.parametrize("case", CASES)
def test_fullgraph_keeps_bits(case, backend, device):
    batch = make_batch((4, 3, 1030), torch.bfloat16, device)

    def loss(logits, labels, mask):
        logps, stats = fused(backend)(
            logits * 1.0, labels, mask, stats=("lengths", "entropy"), **CASES[case]
        )
        return -F.logsigmoid(logps[:2] - logps[2:]) + 0.0 * stats["entropy"].sum()

    eager = value_and_grad(loss, batch)
    compiled = value_and_grad(torch.compile(loss, fullgraph=True, backend="aot_eager"), batch)
    assert torch.equal(eager[0], compiled[0])
    assert torch.equal(eager[1], compiled[1])


def test_inductor(device):
    """The default compiler, once: it needs a C++ compiler on a CPU."""
    batch = make_batch((4, 6, 500), torch.float32, device)

    def loss(logits, labels, mask):
        return dpo_triton.fused_seq_logprob(logits + 0.5, labels, mask, shift=True).square()

    eager = value_and_grad(loss, batch)
    compiled = value_and_grad(torch.compile(loss, fullgraph=True), batch)
    torch.testing.assert_close(compiled[0], eager[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(compiled[1], eager[1])


def test_fullgraph_packed_and_tokens(backend, device):
    batch = make_batch((9, 300), torch.float32, device)
    cu_seqlens = torch.tensor([0, 4, 4, 9], device=device)

    def loss(logits, labels, mask):
        options = dict(cu_seqlens=cu_seqlens, shift=True)
        tokens = fused(backend, "fused_token_logprob")(logits, labels, mask, **options)
        return fused(backend)(logits, labels, mask, **options).sum() + tokens.square().sum()

    eager = value_and_grad(loss, batch)
    compiled = value_and_grad(torch.compile(loss, fullgraph=True, backend="aot_eager"), batch)
    assert torch.equal(eager[0], compiled[0])
    assert torch.equal(eager[1], compiled[1])


def test_dynamic_shapes_compile_once(device):
    """A batch of another shape takes the same graph."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda *b: dpo_triton.fused_seq_logprob(*b), fullgraph=True, dynamic=True, backend=counting
    )
    for shape in ((4, 6, 300), (3, 9, 301), (5, 4, 512)):
        batch = make_batch(shape, torch.float32, device)
        assert torch.equal(compiled(*batch), dpo_triton.fused_seq_logprob(*batch))
    assert len(graphs) == 1


def test_inplace_backward_compiled(backend, device):
    """Whatever the compiler makes of the mutation, the gradient has the same bits."""
    batch = make_batch((4, 6, 300), torch.float32, device)

    def loss(logits, labels, mask):
        return fused(backend)(logits * 1.0, labels, mask, inplace_backward=True).square().sum()

    eager = value_and_grad(loss, batch)
    compiled = value_and_grad(torch.compile(loss, fullgraph=True, backend="aot_eager"), batch)
    assert torch.equal(eager[0], compiled[0])
    assert torch.equal(eager[1], compiled[1])


# A scaling by numbers, and one by a tensor of symbols.
@pairwise(
    packed=[False, True],
    scaling=[(1.5, 1.0, None, None), (1.0, 1.0, None, torch.tensor([1.5, 1.0, 9.0]))],
    reduction=["mean", "none"],
    backend=BACKENDS,
)
def test_opcheck(packed, scaling, reduction, backend, device):
    """Every token is scored: what belongs to one that is not stays unwritten."""
    logits, labels, _ = make_batch((2, 4, 130), torch.float32, device)
    mask = torch.rand(2, 4, device=device) + 0.5
    cu_seqlens = None
    if packed:
        logits, labels, mask = logits.view(1, 8, 130), labels.view(1, 8), mask.view(1, 8)
        cu_seqlens = torch.tensor([0, 3, 8], device=device)
    tokens = (labels, mask, cu_seqlens, False, -100)
    inputs = (logits, *tokens, *scaling, reduction, ["entropy", "top1"], backend)
    torch.library.opcheck(_ops.logprob.overload, inputs)
    _, _, logps, softmax, _, weights = _ops.logprob(*inputs)
    grad_logps = torch.randn(len(logps), 1, device=device).expand_as(logps)
    inputs = (labels, weights, False, softmax, *scaling, backend)
    torch.library.opcheck(_ops.logprob_grad.overload, (grad_logps, logits, *inputs))
    torch.library.opcheck(_ops.logprob_grad_.overload, (grad_logps, logits.clone(), *inputs))
