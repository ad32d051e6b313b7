"""When a value has the same bits, and by how little it moves where the matrix product moves it."""

import pytest
import torch
import torch.nn.functional as F
from batches import fused
from head_batches import ALL, FROZEN, TILE_V, make_head_batch, value_and_grads

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def seq(backend):
    return fused(backend, "fused_linear_seq_logprob")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_policy_equal_to_its_reference_gives_ln_2(dtype, backend, device):
    """The first step of DPO: one batch under no_grad, with a frozen head, and with one that trains;
    several blocks of rows."""
    batch = make_head_batch((4, 4, 16), TILE_V + 9, dtype, device)
    options = dict(reduction="sum", tile_bytes=5 * TILE_V * dtype.itemsize)
    hidden, weight, bias, labels, mask = batch
    with torch.no_grad():
        reference = seq(backend)(hidden, weight, labels, mask, bias=bias, **options)
    for trains in (ALL, FROZEN, (False, True, False), (False, False, True)):
        policy = value_and_grads(seq(backend), batch, trains=trains, **options)[0]
        assert torch.equal(policy, reference)
        logratios = (policy - reference)[:2] - (policy - reference)[2:]
        losses = -F.logsigmoid(0.1 * logratios)
        assert losses.tolist() == [-float(F.logsigmoid(torch.zeros(())))] * 2


@pytest.mark.parametrize("trains", [ALL, FROZEN])
def test_same_bits_run_after_run(trains, backend, device):
    batch = make_head_batch((2, 4, 16), TILE_V + 9, torch.bfloat16, device)
    first = value_and_grads(seq(backend), batch, trains=trains)
    again = value_and_grads(seq(backend), batch, trains=trains)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_prompts_and_padding_change_nothing(backend, device):
    """They are dropped before the product, which then is the same."""
    batch = make_head_batch((2, 3, 16), TILE_V + 9, device=device)
    values, grad, *_ = value_and_grads(seq(backend), batch)
    padded = batch._replace(
        hidden=F.pad(batch.hidden, (0, 0, 2, 4), value=torch.nan),
        labels=F.pad(batch.labels, (2, 4)),
        mask=F.pad(batch.mask, (2, 4)),
    )
    found, padded_grad, *_ = value_and_grads(seq(backend), padded)
    assert torch.equal(found, values)
    assert torch.equal(padded_grad[:, 2:-4], grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_rows_move_a_value_by_a_rounding(dtype, device):
    """A part of a batch, and smaller tiles, against the whole. Found on x86-64 with MKL: not a bit
    in 16-bit products, nor in float32 ones of 8 rows and more; else up to 3e-7 * (1 + |logp|)."""
    hidden, weight, bias, labels, _ = make_head_batch((1, 60, 128), TILE_V + 9, dtype, device)
    tokens = fused("torch", "fused_linear_token_logprob")
    whole = tokens(hidden, weight, labels, bias=bias)
    # 16-bit logits that move do so by a rounding of theirs, of which the largest are about 12.
    allowed = 1e-6 * (1 + whole.abs()) if dtype == torch.float32 else 16 * torch.finfo(dtype).eps
    for size in (1, 3, 7, 8, 33, 59):
        part = tokens(hidden[:, :size], weight, labels[:, :size], bias=bias)
        assert ((part - whole[:, :size]).abs() <= (allowed + 0 * whole)[:, :size]).all()
    for rows in (1, 7, 20):
        tiles = tokens(hidden, weight, labels, bias=bias, tile_bytes=rows * TILE_V * dtype.itemsize)
        assert ((tiles - whole).abs() <= allowed).all()
