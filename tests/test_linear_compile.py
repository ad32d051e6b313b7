"""torch.compile sees two calls without a break, and they keep torch.library's contract."""

import pytest
import torch
import torch.nn.functional as F
from backends import BACKENDS
from batches import fused
from head_batches import ALL, FROZEN, make_head_batch, value_and_grads
from pairwise import pairwise

from dpo_triton._head import _operators


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


CASES = {
    "mean": {},
    "shift": dict(shift=True, reduction="sum"),
    "softcap": dict(softcap=9.0, temperature=1.5),
    "tiles": dict(tile_bytes=7 * 300 * 2),
}


@pairwise(case=list(CASES), trains=[ALL, FROZEN], backend=BACKENDS)
def test_fullgraph_keeps_bits(case, trains, backend, device):
    batch = make_head_batch((4, 6, 16), 300, torch.bfloat16, device)

    def loss(hidden, weight, labels, mask, bias):
        logps, stats = fused(backend, "fused_linear_seq_logprob")(
            hidden * 1.0, weight, labels, mask, bias=bias, stats=("lengths", "top1"), **CASES[case]
        )
        return -F.logsigmoid(logps[:2] - logps[2:]) + 0.0 * stats["top1"].sum()

    eager = value_and_grads(loss, batch, trains=trains)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for x, y in zip(eager, value_and_grads(compiled, batch, trains=trains), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("trains", [ALL, FROZEN])
def test_fullgraph_packed_and_tokens(trains, backend, device):
    batch = make_head_batch((9, 16), 300, device=device)
    cu_seqlens = torch.tensor([0, 4, 4, 9], device=device)

    def loss(hidden, weight, labels, mask, bias):
        options = dict(bias=bias, cu_seqlens=cu_seqlens, shift=True)
        inputs = (hidden, weight, labels, mask)
        tokens = fused(backend, "fused_linear_token_logprob")(*inputs, **options)
        values = fused(backend, "fused_linear_seq_logprob")(*inputs, **options)
        return values.sum() + tokens.square().sum()

    eager = value_and_grads(loss, batch, trains=trains)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for x, y in zip(eager, value_and_grads(compiled, batch, trains=trains), strict=True):
        assert torch.equal(x, y)


def test_fullgraph_autocast(device):
    batch = make_head_batch((4, 6, 16), 300, device=device)

    def loss(hidden, weight, labels, mask, bias):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return fused("auto", "fused_linear_seq_logprob")(hidden, weight, labels, mask)

    batch = batch._replace(bias=None)
    eager = value_and_grads(loss, batch)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for x, y in zip(eager, value_and_grads(compiled, batch), strict=True):
        assert torch.equal(x, y)


@pairwise(layout=["dense", "packed", "views"], make_grad=[False, True], backend=BACKENDS)
def test_opcheck(layout, make_grad, backend, device):
    """Every token is scored: what belongs to one that is not stays unwritten. A transposed weight
    and labels: the fakes know the strides of what comes back."""
    hidden, weight, bias, labels, _ = make_head_batch((2, 4, 16), 300, device=device)
    mask = torch.rand(2, 4, device=device) + 0.5
    cu_seqlens = None
    if layout == "packed":
        hidden, labels, mask = hidden.view(1, 8, 16), labels.view(1, 8), mask.view(1, 8)
        cu_seqlens = torch.tensor([0, 3, 8], device=device)
    if layout == "views":
        weight, labels = weight.t().contiguous().t(), labels.t().contiguous().t()
        hidden, mask = hidden.transpose(0, 1).contiguous().transpose(0, 1), None
    scaling, plan = (1.5, 1.0, None, None), (torch.float32, 20 * 300 * 4)
    inputs = (hidden, weight, bias, labels, mask, cu_seqlens, False, -100, *scaling, "mean")
    inputs += (["entropy", "top1"], *plan, list(FROZEN if make_grad else ALL), backend)
    torch.library.opcheck(_operators.linear_logprob.overload, inputs)
    found = _operators.linear_logprob(*inputs)
    _, _, logps, softmax, _, weights, kept, unit_grad = found
    assert (kept.numel() > 0) != make_grad
    assert (unit_grad.numel() > 0) == make_grad
    grad_logps = torch.randn(len(logps), 1, device=device).expand_as(logps)
    for needs in [] if make_grad else [ALL, (False, True, False), (True, False, True)]:
        saved = (labels, weights, False, softmax, kept)
        inputs = (grad_logps, hidden, weight, bias, *saved, *scaling, *plan, list(needs), backend)
        torch.library.opcheck(_operators.linear_logprob_grad.overload, inputs)


def test_dynamic_shapes_compile_once(device):
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    function = fused("auto", "fused_linear_seq_logprob")
    compiled = torch.compile(
        lambda *b: function(*b), fullgraph=True, dynamic=True, backend=counting
    )
    for shape, vocab_size in (((4, 6, 16), 300), ((3, 9, 24), 301), ((5, 4, 32), 512)):
        hidden, weight, _, labels, mask = make_head_batch(shape, vocab_size, device=device)
        inputs = (hidden, weight, labels, mask)
        assert torch.equal(compiled(*inputs), function(*inputs))
    assert len(graphs) == 1
