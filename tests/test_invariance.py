"""A row's bits are its own: alone, in a batch, permuted, padded, for any thread count."""

import pytest
import torch
import torch.nn.functional as F
from batches import fused, make_batch, value_and_grad

# Ragged widths: the last elements of a row must not be computed by other instructions in a batch.
VOCABULARIES = [1, 37, 1000, 6400, 16385, 50257]


@pytest.fixture
def device(backend, device) -> torch.device:
    """The PyTorch backend keeps a row's bits on a CPU. On a GPU, where one has to ask for it, it is
    PyTorch's own sums, whose order depends on the size of the batch."""
    return torch.device("cpu") if backend == "torch" else device


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_alone_in_a_batch_and_permuted(vocab_size, dtype, backend, device):
    if backend == "triton" and device.type == "cpu" and vocab_size > 20000:
        pytest.skip("slow in the interpreter; a GPU runs it")
    rows = 3 if backend == "triton" else 5  # a program a row: the interpreter takes them one by one
    batch = make_batch((rows, 2, vocab_size), dtype, device)
    values, grads = value_and_grad(fused(backend), batch)
    order = torch.arange(rows, device=device).roll(2)
    permuted, permuted_grads = value_and_grad(fused(backend), batch._make(x[order] for x in batch))
    assert torch.equal(permuted, values[order])
    assert torch.equal(permuted_grads, grads[order])
    for b in range(rows):
        value, grad = value_and_grad(fused(backend), batch._make(x[b : b + 1] for x in batch))
        assert torch.equal(value, values[b : b + 1])
        assert torch.equal(grad, grads[b : b + 1])
    # One token of it, on its own.
    tokens = fused(backend, "fused_token_logprob")(*batch)
    one = fused(backend, "fused_token_logprob")(*(x[2:3, 1:2] for x in batch))
    assert torch.equal(one, tokens[2:3, 1:2])


@pytest.mark.parametrize("vocab_size", [37, 1000, 16385])
def test_softcap_too(vocab_size, backend, device):
    batch = make_batch((3, 2, vocab_size), torch.float32, device)
    options = dict(softcap=7.0, temperature=0.6)
    values, grads = value_and_grad(fused(backend), batch, **options)
    for b in range(3):
        alone = batch._make(x[b : b + 1] for x in batch)
        value, grad = value_and_grad(fused(backend), alone, **options)
        assert torch.equal(value, values[b : b + 1])
        assert torch.equal(grad, grads[b : b + 1])


@pytest.mark.parametrize("vocab_size", [6400, 70000])
def test_any_number_of_threads(vocab_size):
    batch = make_batch((2, 3, vocab_size), torch.bfloat16)
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            found.append(value_and_grad(fused("torch"), batch))
    finally:
        torch.set_num_threads(threads)
    for value, grad in found[1:]:
        assert torch.equal(value, found[0][0])
        assert torch.equal(grad, found[0][1])


def test_same_bits_run_after_run(backend, device):
    batch = make_batch((3, 4, 3000), torch.bfloat16, device)
    first = value_and_grad(fused(backend), batch)
    for _ in range(3):
        again = value_and_grad(fused(backend), batch)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


def test_padding_changes_nothing(backend, device):
    """Right padding, as batches of other lengths would add it."""
    batch = make_batch((2, 3, 500), torch.float32, device)
    values = fused(backend)(*batch)
    padded = [F.pad(batch.logits, (0, 0, 0, 4)), *(F.pad(x, (0, 4)) for x in batch[1:])]
    assert torch.equal(fused(backend)(*padded), values)


def test_policy_equal_to_reference_gives_ln_2(backend, device):
    """The first step of DPO, with the reference scored in another batch: exactly ln 2."""
    batch = make_batch((4, 5, 6400), torch.bfloat16, device)
    policy = fused(backend)(*batch, reduction="sum")
    reference = torch.cat([fused(backend)(*(x[b : b + 1] for x in batch), reduction="sum")
                           for b in range(4)])  # fmt: skip
    logratios = (policy - reference)[:2] - (policy - reference)[2:]
    assert (-F.logsigmoid(0.1 * logratios)).tolist() == [-float(F.logsigmoid(torch.zeros(())))] * 2
