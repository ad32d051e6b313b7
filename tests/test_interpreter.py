"""The interpreter stands in for a GPU: where it would not round like one, it is mended."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def _to_bfloat16_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16))


@triton.jit
def _fma_kernel(x_ptr, y_ptr, z_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.fma(tl.load(x_ptr + i), tl.load(y_ptr + i), tl.load(z_ptr + i)))


def test_fma_rounds_once(device):
    """The product less its own rounding: 0 where it is rounded first, its error where it is not."""
    x, y = torch.randn(2, 1024, device=device)
    out = torch.empty_like(x)
    _fma_kernel[(1,)](x, y, -(x * y), out, N=1024)
    exact = x.double() * y.double() - (x * y).double()
    assert torch.equal(out.double(), exact)
    assert (out != 0).any()


def test_bfloat16_is_rounded_to_nearest(device):
    """Any bits: subnormal, infinite, ties, and significands that carry into the exponent."""
    bits = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32).to(device)
    x[:4] = torch.tensor([1.99999, 3.4e38, torch.inf, 1.00390625])
    out = torch.empty(4096, dtype=torch.bfloat16, device=device)
    _to_bfloat16_kernel[(1,)](x, out, N=4096)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
