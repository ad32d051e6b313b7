"""cu_seqlens that end before the tokens do: what comes after is padding, on every backend."""

import pytest
import torch
from batches import fused, make_batch, value_and_grad
from head_batches import make_head_batch

from dpo_triton import reference

STATS = ("token_logps", "entropy", "top1")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("bounds", [[0, 3, 8], [0, 0, 5], [0, 10], [0]], ids=str)
def test_padding_after_the_last_sequence(bounds, shift, backend, device):
    """Ends of two sequences, an empty one first, none left over, and no sequence at all."""
    batch = make_batch((10, 37), torch.float32, device)
    end = bounds[-1]
    batch.logits[end:] = torch.nan  # never read
    batch.labels[end:] = 2**31
    cu_seqlens = torch.tensor(bounds, device=device)
    options = dict(cu_seqlens=cu_seqlens, shift=shift)
    value, grad = value_and_grad(fused(backend), batch, **options)
    cut = batch._replace(**{name: getattr(batch, name)[:end] for name in batch._fields})
    assert len(value) == len(bounds) - 1
    assert (grad[end:] == 0).all()
    if end:
        expected, expected_grad = value_and_grad(fused(backend), cut, **options)
        assert torch.equal(value, expected)
        assert torch.equal(grad[:end], expected_grad)
    _, stats = fused(backend)(*batch, stats=STATS, **options)
    assert all((stats[name][end:] == 0).all() for name in STATS)


def test_the_reference_too():
    batch = make_batch((10, 37), torch.float64)
    cu_seqlens = torch.tensor([0, 3, 8])
    value = reference.seq_logprob(*batch, cu_seqlens=cu_seqlens)
    cut = [x[:8] for x in batch]
    assert torch.equal(value, reference.seq_logprob(*cut, cu_seqlens=cu_seqlens))


@pytest.mark.parametrize("trains", [True, False])
def test_of_a_head(trains, backend, device):
    hidden, weight, bias, labels, mask = make_head_batch((10, 16), 60, device=device)
    labels[8:] = -5
    hidden[8:] = torch.nan
    hidden.requires_grad_()
    weight.requires_grad_(trains)
    cu_seqlens = torch.tensor([0, 3, 8], device=device)
    function = fused(backend, "fused_linear_seq_logprob")
    value = function(hidden, weight, labels, mask, bias=bias, cu_seqlens=cu_seqlens, shift=True)
    value.sum().backward()
    assert value.isfinite().all()
    assert (hidden.grad[8:] == 0).all()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("bounds", [[0, 4, 11], [0, 7, 3, 10], [0, -1, 10], [2, 10]], ids=str)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_other_ends_are_errors_on_the_host(bounds, backend):
    if backend == "cpu":
        pytest.importorskip("numba")
    batch = make_batch((10, 37), torch.float32)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to at most"):
        fused(backend)(*batch, cu_seqlens=torch.tensor(bounds))
