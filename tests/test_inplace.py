"""A gradient in place of the logits: where others have them too it is an error."""

import pytest
import torch
from batches import fused, make_batch
from torch.utils.checkpoint import checkpoint


def in_place(backend):
    function = fused(backend)
    return lambda *inputs: function(*inputs, inplace_backward=True)


@pytest.mark.parametrize("hooks", ["checkpoint", "on the cpu", "own"])
def test_saved_tensor_hooks_are_refused(hooks, backend, device):
    """They may hand the memory that is overwritten to others, whom no version counter warns."""
    batch = make_batch((2, 3, 50), torch.float32, device)
    leaf = batch.logits.clone().requires_grad_()

    def loss(leaf):
        logits = leaf * 1.0
        return logits.logsumexp(-1).square().mean() + in_place(backend)(logits, *batch[1:]).sum()

    def run():
        if hooks == "checkpoint":
            checkpoint(loss, leaf, use_reentrant=False)
            return
        own = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
        with torch.autograd.graph.save_on_cpu() if hooks == "on the cpu" else own:
            loss(leaf)

    with pytest.raises(RuntimeError, match="inplace_backward=True got logits under saved-tensor"):
        run()


def test_double_backward_says_so(backend, device):
    batch = make_batch((2, 3, 40), torch.float32, device)
    leaf = batch.logits.clone().requires_grad_()
    value = in_place(backend)(leaf * 1.0, *batch[1:]).square().sum()
    (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward.*dpo_triton\.reference"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("size", "strides"),
    [
        ((2, 3, 9), (9, 9, 1)),  # sequences that begin a row later
        ((2, 3, 9), (27, 8, 1)),  # rows that share a logit
        ((3, 2, 9), (9, 0, 1)),  # expanded
        ((4, 3, 9), (20, 9, 1)),  # the second sequence begins in the third row
    ],
)
def test_rows_that_overlap_are_refused(size, strides, device):
    logits = torch.randn(200, device=device).as_strided(size, strides).requires_grad_()
    labels = torch.zeros(size[:2], dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="inplace_backward=True needs rows that do not share"):
        in_place("auto")(logits, labels)


@pytest.mark.parametrize("strides", [(27, 9, 1), (9, 18, 1), (40, 12, 1)])
def test_rows_side_by_side_are_taken(strides, device):
    """Dense, with the batch inside, and with gaps."""
    flat = torch.randn(200, device=device)
    labels = torch.zeros(2, 3, dtype=torch.int64, device=device)
    source = flat.clone().requires_grad_()
    logits = (source * 1.0).as_strided((2, 3, 9), strides)
    in_place("auto")(logits, labels).sum().backward()
    other = flat.clone().requires_grad_()
    fused("auto")(other.as_strided((2, 3, 9), strides), labels).sum().backward()
    assert torch.equal(source.grad, other.grad)


def test_two_halves_of_one_tensor_name_the_option(backend, device):
    batch = make_batch((4, 3, 50), torch.float32, device)
    logits = batch.logits.clone().requires_grad_() * 1.0
    halves = [in_place(backend)(logits[h], batch.labels[h]) for h in (slice(2), slice(2, 4))]
    loss = (halves[0] - halves[1]).sum()
    with pytest.raises(RuntimeError, match=r"inplace_backward=True: the logits, or what they are"):
        loss.backward()
