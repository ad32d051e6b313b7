"""What only a GPU can show. The other tests run there as well, on the compiled kernels."""

import pytest
import torch
from batches import Batch, assert_close, make_batch, truth, value_and_grad

from dpo_triton import fused_seq_logprob, reference

pytestmark = pytest.mark.gpu


def test_no_host_synchronisation():
    """Forward and backward, padded and packed, with every stat."""
    batch = make_batch((4, 64, 32000), torch.bfloat16, "cuda")
    packed = [x.flatten(0, 1) for x in batch]
    cu_seqlens = torch.tensor([0, 100, 100, 256], device="cuda")
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
    batch = make_batch((4, 32, 50257), torch.bfloat16, "cuda")
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


def test_more_programs_than_65535():
    batch = make_batch((1, 70000, 64), torch.bfloat16, "cuda")
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
    logits = torch.zeros(1, num_rows, vocab_size, dtype=torch.bfloat16, device="cuda")
    last = torch.randn(1, 1, vocab_size, device="cuda").bfloat16()
    logits[:, -1:] = last
    labels = torch.randint(0, vocab_size, (1, num_rows), device="cuda")
    mask = torch.zeros(1, num_rows, device="cuda")
    mask[0, -1] = 1
    value, grad = value_and_grad(fused_seq_logprob, Batch(logits, labels, mask))
    exact = reference.seq_logprob(last.cpu().double(), labels[:, -1:].cpu())
    assert_close(value, exact, 1e-5)
    assert grad[0, -1].any()
    assert not grad[0, -2].any()


def test_peak_memory():
    """Forward 8 MiB and 64 bytes a row; backward one gradient more, or none in place."""
    batch = make_batch((8, 128, 128256), torch.bfloat16, "cuda")
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
