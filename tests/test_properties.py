"""Any shape, mask, stride and option against the reference."""

import torch
from batches import Batch, max_error, rounding, truth, value_and_grad
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dpo_triton


@st.composite
def calls(draw):
    """A batch as a view of a larger one, weights with holes, and options."""
    batch, seq_len = draw(st.integers(0, 3)), draw(st.integers(0, 6))
    vocab_size = draw(st.sampled_from([1, 2, 3, 31, 64, 100, 1023, 1025]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    pad_t, pad_v = draw(st.integers(0, 2)), draw(st.integers(0, 9))
    wide = torch.randn(batch, seq_len + pad_t, vocab_size + pad_v, generator=generator)
    wide = (wide * draw(st.sampled_from([0.1, 3.0, 30.0]))).to(dtype)
    if draw(st.booleans()):
        wide = wide.transpose(0, 1).contiguous().transpose(0, 1)
    logits = wide[:, pad_t:, pad_v:]
    labels = torch.randint(0, vocab_size, (batch, seq_len), generator=generator)
    share = draw(st.sampled_from([0.0, 0.3, 1.0]))
    mask = torch.rand(batch, seq_len, generator=generator) < share
    kind = draw(st.sampled_from(["bool", "float", "labels"]))
    if kind == "float":
        mask = mask * torch.rand(batch, seq_len, generator=generator)
    elif kind == "labels":
        labels, mask = labels.masked_fill(~mask, -100), torch.ones_like(mask)
    options = dict(
        reduction=draw(st.sampled_from(["mean", "sum"])),
        shift=draw(st.booleans()),
        temperature=draw(st.sampled_from([1.0, 0.5, 3.0])),
        softcap=draw(st.sampled_from([None, None, 20.0])),
    )
    if draw(st.booleans()) and batch > 0:  # the same tokens, packed
        logits, labels, mask = logits.reshape(-1, vocab_size), labels.view(-1), mask.reshape(-1)
        options["cu_seqlens"] = torch.arange(batch + 1) * seq_len
    return Batch(logits, labels, mask), options


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(call=calls())
def test_any_call(call, backend, device):
    batch, options = call
    batch = Batch(*(x.to(device) for x in batch))
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}

    def function(*inputs, **options):
        return dpo_triton.fused_seq_logprob(*inputs, backend=backend, **options)

    value, grad = value_and_grad(function, batch, **options)
    exact_value, exact_grad = truth("seq_logprob", batch, **options)
    num_tokens = max(1, batch.labels.numel())
    scale = 1 + float(exact_value.abs().max()) if exact_value.numel() else 1.0
    assert value.shape == exact_value.shape
    assert max_error(value, exact_value) <= 1e-6 * scale * num_tokens
    assert grad.dtype == batch.logits.dtype
    assert max_error(grad, exact_grad) <= 2e-6 * num_tokens + 2 * rounding(exact_grad, grad.dtype)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    shift=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_packed_is_padded(lengths, shift, seed, backend, device):
    """Packing sequences changes no bit of them."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    logits = torch.randn(total, 70, generator=generator).to(device)
    labels = torch.randint(0, 70, (total,), generator=generator).to(device)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0)
    packed = dpo_triton.fused_seq_logprob(
        logits, labels, cu_seqlens=cu_seqlens, shift=shift, backend=backend
    )
    longest = max(lengths)
    padded_logits = torch.zeros(len(lengths), longest, 70, device=device)
    padded_labels = torch.full((len(lengths), longest), -100, device=device)
    for s, length in enumerate(lengths):
        first = sum(lengths[:s])
        padded_logits[s, :length] = logits[first : first + length]
        padded_labels[s, :length] = labels[first : first + length]
    padded = dpo_triton.fused_seq_logprob(
        padded_logits, padded_labels, shift=shift, backend=backend
    )
    assert torch.equal(packed, padded)
