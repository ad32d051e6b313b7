"""Numbers that change in training are symbols to torch.compile: no new graph for each value."""

import io

import numpy as np
import pytest
import torch
from batches import fused, make_batch
from head_batches import make_head_batch
from torch._dynamo.testing import CompileCounterWithBackend

from dpo_triton import fused_dpo_loss, fused_linear_seq_logprob, fused_seq_logprob

MOST_GRAPHS = 3
VALUES = {
    "temperature": [1 - k / 20 for k in range(12)],
    "softcap": [9.0 + k for k in range(12)],
    "logit_scale": [0.5 + k / 10 for k in range(12)],
    "ignore_index": list(range(-100, -88)),
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", VALUES)
def test_of_logits(name, compiler, device):
    logits, labels, mask = make_batch((2, 3, 40), torch.float32, device)
    counter = CompileCounterWithBackend(compiler)

    def loss(logits, number):
        return fused_seq_logprob(logits, labels, mask, **{name: number}).sum()

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    logits.requires_grad_()
    for number in VALUES[name]:
        (grad,) = torch.autograd.grad(compiled(logits, number), logits)
        (exact,) = torch.autograd.grad(loss(logits, number), logits)
        assert torch.equal(grad, exact)
    assert counter.frame_count <= MOST_GRAPHS


def test_of_a_head(device):
    hidden, weight, _, labels, mask = make_head_batch((2, 3, 16), 40, device=device)
    counter = CompileCounterWithBackend("aot_eager")

    def values(number):
        return fused_linear_seq_logprob(hidden, weight, labels, mask, temperature=number)

    compiled = torch.compile(values, backend=counter, fullgraph=True)
    for number in VALUES["temperature"]:
        assert torch.equal(compiled(number), values(number))
    assert counter.frame_count <= MOST_GRAPHS


@pytest.mark.parametrize(
    ("name", "loss_type"),
    [("beta", "sigmoid"), ("label_smoothing", "sigmoid"), ("rpo_alpha", "sigmoid")],
)
def test_of_a_loss(name, loss_type, device):
    logits, labels, mask = make_batch((4, 3, 40), torch.float32, device)
    ref_logps = torch.zeros(4, device=device)
    counter = CompileCounterWithBackend("aot_eager")

    def loss(number):
        reference = dict(ref_logps=ref_logps, ref_reduction="sum")
        return fused_dpo_loss(logits, labels, mask, **reference, **{name: number}).loss

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for k in range(12):
        number = 0.05 + k / 50
        torch.testing.assert_close(compiled(number), loss(number), rtol=1e-6, atol=1e-7)
    assert counter.frame_count <= MOST_GRAPHS


def test_what_is_exported_can_be_loaded(device):
    logits, labels, _ = make_batch((2, 3, 40), torch.float32, device)

    class Score(torch.nn.Module):
        def forward(self, logits, labels):
            return fused_seq_logprob(logits, labels, shift=True)

    stream = io.BytesIO()
    torch.export.save(torch.export.export(Score(), (logits, labels)), stream)
    stream.seek(0)
    loaded = torch.export.load(stream).module()
    assert torch.equal(loaded(logits, labels), fused_seq_logprob(logits, labels, shift=True))


def test_numbers_of_numpy(backend, device):
    batch = make_batch((2, 3, 40), torch.float32, device)
    found = fused(backend)(
        *batch, temperature=np.float32(0.5), softcap=np.float64(9), ignore_index=np.int64(-7)
    )
    assert torch.equal(found, fused(backend)(*batch, temperature=0.5, softcap=9, ignore_index=-7))


def test_a_temperature_per_sequence_says_what_to_do(device):
    logits, labels, _ = make_batch((2, 3, 40), torch.float32, device)
    with pytest.raises(
        TypeError, match=r"shape \(2,\); .* divide the logits .*temperature\[:, None"
    ):
        fused_seq_logprob(logits, labels, temperature=torch.ones(2, device=device))


@pytest.mark.parametrize("number", [1e-16, 1e16, float("inf"), float("nan"), 0.0])
def test_numbers_beyond_float32s_reach_are_refused(number, device):
    logits, labels, _ = make_batch((2, 3, 40), torch.float32, device)
    with pytest.raises(ValueError, match="temperature must be positive and finite, from 1e-15"):
        fused_seq_logprob(logits, labels, temperature=number)
