"""Nothing of vocabulary size beside a bounded buffer, and no work for rows that are not scored."""

import pytest
import torch
from batches import fused, make_batch
from stage_calls import PLAIN, run_combine, run_partials, tokens_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo_triton._backends import backend_named
from dpo_triton._records import Columns, Scored


class Allocations(TorchDispatchMode):
    """Bytes of the largest storage that each operation returned, and of all that it made live."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {
            x.untyped_storage().data_ptr()
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in before:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_forward_allocates_no_more_than_the_buffer(share, dtype):
    """128 rows of 50257: 12 MiB of bf16, and never a temporary of more than 7 MiB."""
    logits, labels, _ = make_batch((4, 32, 50257), dtype)
    mask = torch.rand(4, 32) < share
    with Allocations() as allocations:
        run_partials("torch", logits, tokens_of(labels, mask))
    assert allocations.largest <= 7 << 20


def test_backward_allocates_one_gradient():
    logits, labels, mask = make_batch((4, 32, 50257), torch.bfloat16)
    partials = run_partials("torch", logits, tokens_of(labels, mask))
    softmax = run_combine("torch", partials, "sum", 50257).softmax
    scored, ones = Scored(labels, partials.weights, False), torch.ones_like(partials.weights)
    inputs = (ones, logits, scored, softmax, Columns.all_of(50257), PLAIN)
    for out in (None, logits):
        with Allocations() as allocations:
            backend_named("torch").grad(*inputs, out)
        assert allocations.largest <= (7 << 20)  # the gradient comes from NumPy


def test_rows_not_scored_are_not_touched(tmp_path, backend, device):
    """A sparse file of logits: pages of prompt rows stay holes, forward and backward."""
    if device.type == "cuda":
        pytest.skip("reads through the page cache of a CPU")
    vocab_size, num_rows = 4096, 64
    path = tmp_path / "logits"
    with path.open("wb") as f:
        f.truncate(4 * vocab_size * num_rows)
    flat = torch.from_file(str(path), shared=True, size=vocab_size * num_rows)
    logits = flat.view(1, num_rows, vocab_size)
    mask = torch.zeros(1, num_rows)
    mask[0, -2:] = 1
    logits[0, -2:] = torch.randn(2, vocab_size)
    labels = torch.zeros(1, num_rows, dtype=torch.int64)
    value = fused(backend)(logits.requires_grad_(), labels, mask)
    value.sum().backward()
    # Writing to a hole of a shared mapping allocates a block: the logits were not written.
    assert path.stat().st_blocks * 512 <= 4 * vocab_size * 4
    assert (logits.grad[0, :-2] == 0).all()
