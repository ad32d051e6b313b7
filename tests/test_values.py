"""Values and gradients against float64: dtypes, vocabularies, options, layouts."""

import functools

import pytest
import torch
from batches import (
    Batch,
    assert_close,
    assert_within_budget,
    fused,
    make_batch,
    plain,
    truth,
    value_and_grad,
)
from pairwise import pairwise

from dpo_triton import fused_dpo_loss, fused_token_logprob, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# 1, 2: no other token, one other; 1023-1025, 6400: around a tile of the kernels and MiniMind's;
# 16383-16385: around one split; 50257: several splits with a ragged tail. More of them, compiled:
# tests/compiled/test_kernels.py.
VOCABULARIES = [1, 2, 1023, 1024, 1025, 6400, 16383, 16384, 16385, 50257]


def small_shape(vocab_size: int) -> tuple[int, int, int]:
    return (2, 3, vocab_size) if vocab_size > 10_000 else (3, 5, vocab_size)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_value_and_grad_within_budget(vocab_size, dtype, backend, device):
    batch = make_batch(small_shape(vocab_size), dtype, device)
    upstream = torch.randn(len(batch.logits), device=device)
    value, grad = value_and_grad(fused(backend), batch, upstream)
    exact_value, exact_grad = truth("seq_logprob", batch, upstream)
    plain_value, plain_grad = value_and_grad(lambda *b: plain(Batch(*b)), batch, upstream)
    assert value.dtype == torch.float32
    assert grad.dtype == dtype
    for ours, theirs, exact in (
        (value, plain_value, exact_value),
        (grad, plain_grad, exact_grad),
    ):
        assert_within_budget(ours, theirs, exact)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("vocab_size", [1, 1023, 16385, 50257])
def test_token_logps_relative_error(vocab_size, backend, device):
    batch = make_batch(small_shape(vocab_size), torch.float32, device, spread=6.0)
    logps = fused(backend, "fused_token_logprob")(*batch)
    exact = reference.token_logprob(batch.logits.cpu().double(), *(x.cpu() for x in batch[1:]))
    error = (logps.cpu().double() - exact).abs()
    assert (error <= 1e-6 * (1 + exact.abs())).all()
    assert logps.dtype == torch.float32
    assert (logps[batch.mask == 0] == 0).all()


OPTIONS = [
    dict(reduction="sum"),
    dict(shift=True),
    dict(temperature=0.7),
    dict(temperature=2.5, logit_scale=0.25),
    dict(softcap=30.0),
    dict(softcap=5.0, logit_scale=0.7, temperature=1.3, shift=True, reduction="sum"),
]


@pytest.mark.usefixtures("poisoned")
@pairwise(
    vocab_size=[3001, 16385],  # within one split; two splits
    dtype=[torch.float32, torch.bfloat16],
    options=OPTIONS,
)
def test_options(options, dtype, vocab_size, backend, device):
    batch = make_batch((2, 3, vocab_size), dtype, device, spread=8.0)
    upstream = torch.randn(2, device=device)
    for name in ("seq_logprob", "token_logprob"):
        if name == "token_logprob":
            options = {k: v for k, v in options.items() if k != "reduction"}
            upstream = torch.randn(2, 3, device=device)
        value, grad = value_and_grad(fused(backend, f"fused_{name}"), batch, upstream, **options)
        exact_value, exact_grad = truth(name, batch, upstream, **options)
        scale = float(exact_value.abs().max())
        assert_close(value, exact_value, 1e-6 * (1 + scale), name)
        assert_close(grad, exact_grad, 2e-6 * float(exact_grad.abs().max()), name)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shift", [False, True])
def test_packed_equals_each_sequence_alone(shift, index_dtype, backend, device):
    # A sequence of one token, an empty one in the middle and one at the end.
    lengths = [4, 1, 0, 6, 0]
    cu_seqlens = torch.tensor([0, 4, 5, 5, 11, 11], dtype=index_dtype, device=device)
    batch = make_batch((11, 1025), torch.float32, device)
    options = dict(shift=shift, cu_seqlens=cu_seqlens)
    upstream = torch.randn(5, device=device)
    values, grad = value_and_grad(fused(backend), batch, upstream, **options)
    exact = truth("seq_logprob", batch, upstream, **options)
    assert_close(values, exact[0], 1e-5)
    assert_close(grad, exact[1], 2e-7)
    first = 0
    for s, length in enumerate(lengths):
        alone = [x[None, first : first + length] for x in batch]
        value = fused(backend)(*alone, shift=shift)
        assert value[0] == values[s]  # the same bits
        first += length
    tokens = fused_token_logprob(*batch, backend=backend, **options)
    assert_close(tokens, truth("token_logprob", batch, **options)[0], 1e-5)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("label_dtype", [torch.int32, torch.int64], ids=str)
def test_mask_and_label_dtypes(mask_dtype, label_dtype, backend, device):
    batch = make_batch((2, 6, 130), torch.float32, device)
    mask = (batch.mask > 0.5).to(mask_dtype)
    labels = batch.labels.to(label_dtype)
    value = fused(backend)(batch.logits, labels, mask)
    assert_close(value, truth("seq_logprob", Batch(*batch[:2], mask))[0], 1e-6)


def test_no_mask_scores_every_label_but_ignore_index(backend, device):
    batch = make_batch((2, 6, 130), torch.float32, device)
    batch = batch._replace(labels=batch.labels.clamp(min=1))  # 0 is an ignore_index below
    labels = batch.labels.clone()
    labels[0, 1] = labels[1, 3:] = -100
    value = fused(backend)(batch.logits, labels)
    exact = reference.seq_logprob(
        batch.logits.cpu().double(), batch.labels.cpu(), (labels != -100).cpu()
    )
    assert_close(value, exact, 1e-6)
    labels[labels == -100] = 0
    assert_close(fused(backend)(batch.logits, labels, labels != 0, ignore_index=0), exact, 1e-6)


@pytest.mark.parametrize("turns", [1, -2, 2**31 - 1])
@pytest.mark.parametrize("label_dtype", [torch.int32, torch.int64], ids=str)
def test_an_ignore_index_beyond_int32_is_no_label(label_dtype, turns, backend, device):
    """In 32 bits it would wrap to a label that is scored."""
    logits, labels, _ = make_batch((2, 4, 50), torch.float32, device)
    labels[1, 2] = 7
    labels, options = labels.to(label_dtype), dict(ignore_index=7 + turns * 2**32)
    value = fused(backend)(logits, labels, **options)
    assert torch.equal(value, fused(backend)(logits, labels))
    on_cpu = logits.cpu(), labels.cpu()
    assert torch.equal(reference.seq_logprob(*on_cpu, **options), reference.seq_logprob(*on_cpu))
    loss = functools.partial(fused_dpo_loss, logits, labels, loss_type="simpo", backend=backend)
    assert torch.equal(loss(**options).loss, loss().loss)


def test_integer_masks_are_weights(backend, device):
    batch = make_batch((1, 3, 50), torch.float32, device)
    twice = fused(backend)(*batch[:2], torch.tensor([[1, 2, 0]], device=device), reduction="sum")
    tokens = reference.token_logprob(batch.logits.cpu().double(), batch.labels.cpu())[0]
    assert_close(twice, (tokens[0] + 2 * tokens[1])[None], 1e-5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", ["sliced", "padded head", "batch stride", "time first", "T = 1"])
def test_strided_logits(layout, backend, device):
    # Callers slice logits[:, :-1], cut the padding of a head, or transpose time and batch.
    wide = torch.randn(3, 7, 1100, device=device) * 3
    logits = {
        "sliced": wide[:, :-1],
        "padded head": wide[..., :1027],
        "batch stride": wide[::2],
        "time first": wide.transpose(0, 1),
        "T = 1": wide[:, 3:4],
    }[layout]
    labels = torch.randint(0, logits.shape[-1], logits.shape[:2], device=device)
    mask = torch.rand(logits.shape[:2], device=device) > 0.4
    batch = Batch(logits, labels.T.contiguous().T, mask)
    value, grad = value_and_grad(fused(backend), batch)
    exact = truth("seq_logprob", batch)
    assert_close(value, exact[0], 1e-5)
    assert_close(grad, exact[1], 2e-7)


@pytest.mark.usefixtures("poisoned")
def test_shift_is_the_slice(backend, device):
    """shift=True gives the bits of slicing outside, and a gradient for all of logits."""
    batch = make_batch((2, 7, 1030), torch.bfloat16, device)
    whole, whole_grad = value_and_grad(fused(backend), batch, shift=True)
    sliced = Batch(batch.logits[:, :-1], batch.labels[:, 1:], batch.mask[:, 1:])
    value, grad = value_and_grad(fused(backend), sliced)
    assert torch.equal(whole, value)
    assert torch.equal(whole_grad[:, :-1], grad)
    assert (whole_grad[:, -1] == 0).all()


def test_expanded_logits_and_upstream(backend, device):
    """Rows may share memory, and a sum's upstream gradient is one number expanded."""
    row = torch.randn(1, 1, 300, device=device, requires_grad=True)
    labels = torch.randint(0, 300, (2, 4), device=device)
    value = fused(backend)(row.expand(2, 4, 300), labels).sum()
    value.backward()
    exact_row = row.detach().cpu().double().requires_grad_()
    exact = reference.seq_logprob(exact_row.expand(2, 4, 300), labels.cpu()).sum()
    exact.backward()
    assert_close(value.detach(), exact.detach(), 1e-5)
    assert_close(row.grad, exact_row.grad, 1e-6)


@pytest.mark.parametrize("runs", ["long", "short", "lone"])
def test_many_rows_through_the_buffer(runs, device, monkeypatch):
    """More rows than a block holds, with runs that end inside, at and across its edges."""
    from dpo_triton._torch_stages import _rows

    monkeypatch.setattr(_rows, "BUFFER_NUMEL", 4 * 257)  # four rows a block
    batch = make_batch((3, 29, 257), torch.bfloat16, device)
    t = torch.arange(29, device=device)
    holes = {"long": t > 13, "short": t % 5 < 3, "lone": t % 2 == 0}[runs]
    batch = batch._replace(mask=holes.expand(3, 29))
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        cast = batch._replace(logits=batch.logits.to(dtype))
        value, grad = value_and_grad(fused("torch"), cast)
        exact = truth("seq_logprob", cast)
        assert_close(value, exact[0], 1e-5)
        assert_close(grad, exact[1], 2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_full_blocks(dtype):
    """A head of real width, and more rows than the PyTorch stages' buffer holds at a time."""
    batch = make_batch((2, 40, 50257), dtype)
    value, grad = value_and_grad(fused("torch"), batch)
    exact = truth("seq_logprob", batch)
    assert_close(value, exact[0], 1e-6)
    assert_close(grad, exact[1], 2e-7)


def test_int64_offsets(backend, device, tmp_path):
    """Rows that lie past 2 ** 31 elements, in a sparse file: only the pages that are read exist."""
    vocab_size, num_rows = 1 << 16, (1 << 15) + 3
    if device.type == "cuda":
        logits = torch.zeros(1, num_rows, vocab_size, dtype=torch.float16, device=device)
    else:
        path = tmp_path / "logits"
        with path.open("wb") as f:
            f.truncate(2 * num_rows * vocab_size)
        flat = torch.from_file(
            str(path), shared=True, size=num_rows * vocab_size, dtype=torch.float16
        )
        logits = flat.view(1, num_rows, vocab_size)
    assert logits.numel() > 1 << 31
    last = torch.randn(2, vocab_size, device=device).half()
    logits[0, -2:] = last
    # Rows at the far end, as strided views: their offsets need 64 bits.
    far = torch.as_strided(
        logits,
        (2, 1, vocab_size),
        (vocab_size, num_rows * vocab_size, 1),
        (num_rows - 2) * vocab_size,
    )
    both = torch.as_strided(
        logits, (2, 1, vocab_size), ((num_rows - 1) * vocab_size, 1 << 40, 1), 0
    )
    labels = torch.tensor([[5], [vocab_size - 1]], device=device)
    for view, rows in ((far, last), (both, torch.stack([logits[0, 0], last[1]]))):
        value = fused(backend)(view, labels)
        exact = reference.seq_logprob(rows.cpu().double()[:, None], labels.cpu())
        assert_close(value, exact, 1e-5)
