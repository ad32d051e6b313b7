"""The backends that a test runs on: those that are not here are skipped."""

import importlib.util

import pytest
import torch

HAS_NUMBA = importlib.util.find_spec("numba") is not None
HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = [
    "torch",
    pytest.param(
        "cpu",
        marks=[
            pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed"),
            pytest.mark.skipif(torch.cuda.is_available(), reason="the tests' tensors are on a GPU"),
        ],
    ),
    pytest.param(
        "triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
    ),
]
