"""A kernel that was launched before is launched without Triton's binder, as what it was compiled
for."""

import pytest
import torch
from triton import knobs
from triton.runtime.jit import JITFunction

from dpo_triton import fused_seq_logprob, reference
from gpu_lab import driver
from gpu_lab.driver import emulate

BF16 = torch.bfloat16


@pytest.fixture
def bound(monkeypatch):
    """Names of the kernels that went through Triton's binder."""
    names = []
    run = JITFunction.run
    monkeypatch.setattr(
        JITFunction, "run", lambda self, *a, **k: names.append(self.__name__) or run(self, *a, **k)
    )
    return names


def batch_of(dtype=BF16, label_dtype=torch.int64, offset=0):
    """V = 160: rows of whole 16-byte accesses, unless the first logit is `offset` beside one."""
    flat = torch.randn(2 * 3 * 160 + offset).to(dtype)
    logits = flat[offset:].view(2, 3, 160)
    return logits, torch.randint(160, (2, 3)).to(label_dtype), torch.ones(2, 3)


# Each asks for code of its own: a type, an alignment, an option, an argument that is not there.
CASES = [
    ({}, {}, torch.float32),
    (dict(offset=1), {}, torch.float32),
    (dict(dtype=torch.float32), {}, torch.float32),
    (dict(label_dtype=torch.int32), {}, torch.float32),
    ({}, dict(shift=True), torch.float32),
    ({}, dict(softcap=3.0), torch.float32),
    ({}, dict(reduction="sum"), torch.float32),
    ({}, {}, torch.bool),
    ({}, {}, None),
]


def test_each_specialisation_is_bound_once_and_is_right(bound):
    with emulate("sm_90"):
        for _ in range(2):
            bound.clear()
            for made, options, mask_dtype in CASES:
                logits, labels, mask = batch_of(**made)
                mask = None if mask_dtype is None else mask.to(mask_dtype)
                value = fused_seq_logprob(logits, labels, mask, backend="triton", **options)
                exact = reference.seq_logprob(logits.double(), labels, mask, **options)
                torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
    assert bound == []  # in the second round


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_products_are_fused_into_sums_whatever_the_default(monkeypatch, target):
    """Triton's default is fusion, and from 3.10 on none: an instruction more for each logit."""
    monkeypatch.setattr(driver, "_drivers", {})  # as in a new process
    monkeypatch.setattr(knobs.language, "default_fp_fusion", False)
    logits, labels, mask = batch_of()
    with emulate(target, schedule=None) as lab:
        value = fused_seq_logprob(logits.requires_grad_(), labels, mask, backend="triton")
        value.sum().backward()
    assert [kernel.metadata.enable_fp_fusion for kernel in lab.kernels] == [True] * 4


def test_another_target_compiles_anew():
    logits, labels, mask = batch_of()
    values = []
    for target in ("sm_80", "sm_100", "sm_80"):
        with emulate(target) as lab:
            values.append(fused_seq_logprob(logits, labels, mask, backend="triton"))
        assert {launch.kernel.metadata.target.arch for launch in lab.records} == {int(target[3:])}
    assert torch.equal(values[0], values[2])


def test_sizes_of_64_bits_are_another_specialisation(bound):
    """Strides beyond 2 ** 31 are passed as int64. No such memory is there: nothing runs."""
    logits, labels, mask = batch_of()
    far = torch.empty(1, dtype=BF16, device="cpu").as_strided((1, 1, 1), (1 << 32, 1 << 32, 1))
    with emulate("sm_90", schedule=None) as lab:
        fused_seq_logprob(logits[:1, :1], labels[:1, :1], mask[:1, :1], backend="triton")
        bound.clear()
        fused_seq_logprob(far, labels[:1, :1] * 0, mask[:1, :1], backend="triton")
    assert "_partials_kernel" in bound
    assert lab.records[-3].arguments["stride_logits_b"] == 1 << 32
    assert lab.records[-3].kernel.signature["stride_logits_b"] == "i64"


def test_the_least_number_of_32_bits_is_no_64_bit_one():
    """-2 ** 31 is an int32 to Triton, and has as many bits as 2 ** 31."""
    logits, labels, mask = batch_of()
    with emulate("sm_90"):
        values = [
            fused_seq_logprob(logits, labels, mask, ignore_index=index, backend="triton")
            for index in (-(2**31), 2**40 + int(labels[0, 0]), -(2**40) + int(labels[0, 0]))
        ]
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])
