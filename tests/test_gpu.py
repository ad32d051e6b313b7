"""What only a GPU can show. The other tests run there as well, on the compiled kernels."""

import pytest
import torch
from batches import (
    Batch,
    assert_close,
    assert_within_budget,
    make_batch,
    truth,
    value_and_grad,
)

from dpo_triton import fused_linear_seq_logprob, fused_seq_logprob, reference

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def test_no_host_synchronisation():
    """Forward and backward, padded and packed, with every stat."""
    batch = make_batch((4, 64, 32000), torch.bfloat16, DEVICE)
    packed = [x.flatten(0, 1) for x in batch]
    cu_seqlens = torch.tensor([0, 100, 100, 256], device=DEVICE)
    stats = ("lengths", "entropy", "mean_logit", "top1", "log_sum_sq_probs")

    def run():
        for inputs, options in ((batch, {}), (packed, dict(cu_seqlens=cu_seqlens))):
            logits = inputs[0].detach().requires_grad_()
            value, _ = fused_seq_logprob(logits, *inputs[1:], shift=True, stats=stats, **options)
            value.sum().backward()

    run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph_replays():
    batch = make_batch((4, 32, 50257), torch.bfloat16, DEVICE)
    logits = batch.logits.clone().requires_grad_()

    def step():
        value = fused_seq_logprob(logits, *batch[1:], shift=True)
        (grad,) = torch.autograd.grad(value.sum(), logits)
        return value.detach(), grad

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, grad = step()
    with torch.no_grad():
        logits.copy_(torch.randn_like(logits))
    graph.replay()
    expected_value, expected_grad = value_and_grad(
        fused_seq_logprob, batch._replace(logits=logits.detach()), shift=True
    )
    assert torch.equal(value, expected_value)
    assert torch.equal(grad, expected_grad)


def test_a_graph_of_packed_sequences_follows_their_bounds():
    """Lengths are read on the device: a replay may have others."""
    batch = make_batch((48, 6400), torch.bfloat16, DEVICE)
    logits = batch.logits.clone().requires_grad_()
    bounds = [torch.tensor(x, device=DEVICE) for x in ([0, 10, 10, 48], [0, 1, 31, 40])]
    cu_seqlens = bounds[0].clone()

    def step():
        value = fused_seq_logprob(logits, *batch[1:], cu_seqlens=cu_seqlens, shift=True)
        (grad,) = torch.autograd.grad(value.sum(), logits)
        return value.detach(), grad

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, grad = step()
    for these in bounds:
        cu_seqlens.copy_(these)
        graph.replay()
        expected_value, expected_grad = value_and_grad(
            fused_seq_logprob, batch, cu_seqlens=these, shift=True
        )
        assert torch.equal(value, expected_value)
        assert torch.equal(grad, expected_grad)


def test_two_streams_at_once():
    """Nothing is shared between calls: many on two streams, and the bits of one after the other."""
    batches = [make_batch((4, 64, 32000), torch.bfloat16, DEVICE) for _ in range(2)]
    expected = [value_and_grad(fused_seq_logprob, batch) for batch in batches]
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    found = []
    for _ in range(10):
        for stream, batch in zip(streams, batches, strict=True):
            with torch.cuda.stream(stream):
                found.append(value_and_grad(fused_seq_logprob, batch))
    torch.cuda.synchronize()
    for i, (value, grad) in enumerate(found):
        assert torch.equal(value, expected[i % 2][0])
        assert torch.equal(grad, expected[i % 2][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab_size", [6400, 50257])  # aligned rows, and others
def test_every_dtype_and_layout(vocab_size, dtype):
    batch = make_batch((2, 5, vocab_size), dtype, DEVICE)
    for shift in (False, True):
        value, grad = value_and_grad(fused_seq_logprob, batch, shift=shift)
        exact = truth("seq_logprob", batch, shift=shift)
        rough = truth("seq_logprob", batch, dtype=torch.float32, shift=shift)
        assert_within_budget(value, rough[0], exact[0], "value")
        assert_within_budget(grad, rough[1], exact[1], "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_in_place_has_the_bits_of_a_buffer_of_its_own(dtype):
    batch = make_batch((3, 4, 6400), dtype, DEVICE)
    _, expected = value_and_grad(fused_seq_logprob, batch)
    leaf = batch.logits.detach().requires_grad_()
    logits = leaf * 1
    value = fused_seq_logprob(logits, *batch[1:], inplace_backward=True)
    (grad,) = torch.autograd.grad(value.sum(), logits)
    assert grad.data_ptr() == logits.data_ptr()
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_finite_logits(dtype):
    """Up to the largest of the dtype. Which products and sums a compiler fuses decides how well the
    exponents of such logits cancel."""
    largest = torch.finfo(dtype).max
    logits = torch.randn(1, 6, 5000, device=DEVICE)
    logits[0] *= torch.tensor([1e2, 1e3, 1e4, 1e9, 1e30, 0.0], device=DEVICE)[:, None]
    logits = logits.clamp(-largest, largest).to(dtype)
    logits[0, 5] = -largest  # all equal
    labels = torch.randint(0, 5000, (1, 6), device=DEVICE)
    labels[0, 0] = logits[0, 0].argmax()
    batch = Batch(logits, labels, torch.ones(1, 6, device=DEVICE))
    stats = {}

    def function(*args, **options):
        value, found = fused_seq_logprob(*args, stats=("token_logps",), **options)
        stats.update(found)
        return value

    _, grad = value_and_grad(function, batch)
    exact_logits = logits.cpu().double().requires_grad_()
    exact = exact_logits.log_softmax(-1).gather(-1, labels.cpu()[..., None])[..., 0]
    (exact_grad,) = torch.autograd.grad(exact.sum() / 6, exact_logits)
    found = stats["token_logps"].cpu().double()
    assert ((found - exact).abs() <= 1e-6 * (1 + exact.abs())).all()
    assert_close(grad, exact_grad, 2e-6)


def test_head_on_two_streams_and_in_blocks_of_rows():
    """Within a rounding: cuBLAS promises no bits to streams that run at once."""
    hidden = torch.randn(2, 40, 64, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(9000, 64, device=DEVICE, dtype=torch.bfloat16) * 0.4
    labels = torch.randint(0, 9000, (2, 40), device=DEVICE)

    def step():
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        value = fused_linear_seq_logprob(*leaves, labels, tile_bytes=30 * 4096 * 2)
        return value.detach(), *torch.autograd.grad(value.sum(), leaves)

    expected = step()
    torch.cuda.synchronize()
    found = []
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            found.append(step())
    torch.cuda.synchronize()
    for results in found:
        for ours, theirs in zip(results, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_more_programs_than_65535():
    batch = make_batch((1, 70000, 64), torch.bfloat16, DEVICE)
    value, grad = value_and_grad(fused_seq_logprob, batch)
    exact = truth("seq_logprob", batch)
    assert_close(value, exact[0], 1e-5)
    assert_close(grad, exact[1], 1e-8)


def test_offsets_past_2_to_the_31():
    """A batch of more than 2 ** 31 logits, its last row against float64."""
    vocab_size = 131072
    num_rows = (1 << 31) // vocab_size + 64
    if torch.cuda.mem_get_info()[0] < 5 * num_rows * vocab_size:
        pytest.skip("needs 5 bytes for each of 2 ** 31 logits")
    logits = torch.zeros(1, num_rows, vocab_size, dtype=torch.bfloat16, device=DEVICE)
    last = torch.randn(1, 1, vocab_size, device=DEVICE).bfloat16()
    logits[:, -1:] = last
    labels = torch.randint(0, vocab_size, (1, num_rows), device=DEVICE)
    mask = torch.zeros(1, num_rows, device=DEVICE)
    mask[0, -1] = 1
    value, grad = value_and_grad(fused_seq_logprob, Batch(logits, labels, mask))
    exact = reference.seq_logprob(last.cpu().double(), labels[:, -1:].cpu())
    assert_close(value, exact, 1e-5)
    assert grad[0, -1].any()
    assert not grad[0, -2].any()


def test_peak_memory():
    """Forward 8 MiB and 64 bytes a row; backward one gradient more, or none in place."""
    batch = make_batch((8, 128, 128256), torch.bfloat16, DEVICE)
    rows, gradient = 8 * 128, batch.logits.numel() * 2
    logits = batch.logits.requires_grad_()
    for inplace, bound in ((False, gradient), (True, 0)):
        source = logits * 1.0 if inplace else logits
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        value = fused_seq_logprob(source, *batch[1:], inplace_backward=inplace)
        assert torch.cuda.max_memory_allocated() - before <= (8 << 20) + 64 * rows
        torch.autograd.grad(value.sum(), source)
        extra = torch.cuda.max_memory_allocated() - before
        assert extra <= (8 << 20) + 64 * rows + bound


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_bounds_that_are_garbage_read_nothing_stray(dtype):
    """Nobody waits for the values of cu_seqlens. Where wrong ones point, compute-sanitizer sees; an
    access outside of all memory ends every test after this one, the last. A sequence in front of
    bounds past the end has its value."""
    batch = make_batch((40, 6400), torch.bfloat16, DEVICE)
    most = torch.iinfo(dtype).max
    first = Batch(*(x[None, :15] for x in batch))
    (expected,) = truth("seq_logprob", first, shift=True)[0]
    for bounds in ([0, 15, 50, most, most], [0, 15, most, -5, 30], [0, 15, -most, 20, -7]):
        cu_seqlens = torch.tensor(bounds, dtype=dtype, device=DEVICE)
        value, grad = value_and_grad(fused_seq_logprob, batch, cu_seqlens=cu_seqlens, shift=True)
        torch.cuda.synchronize()
        assert grad.shape == batch.logits.shape
        if bounds == sorted(bounds):
            assert_close(value[0], expected, 1e-5)
