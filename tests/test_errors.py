"""Every complaint names the argument, the rule, what came, and the cure."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpo_triton import fused_seq_logprob, fused_token_logprob

LOGITS = torch.randn(2, 3, 5)
LABELS = torch.zeros(2, 3, dtype=torch.int64)
PACKED = dict(logits=torch.randn(6, 5), labels=torch.zeros(6, dtype=torch.int64))

CASES = {
    "logits type": (dict(logits=[[1.0]]), TypeError, "logits must be a torch.Tensor, got list"),
    "logits dtype": (dict(logits=LOGITS.long()), TypeError, "logits must be float32.*torch.int64"),
    "2-d logits": (
        dict(logits=LOGITS[0], labels=LABELS[0]),
        ValueError,
        r"logits must be \(B, T, V\), got \(3, 5\); .*cu_seqlens.*logits\[None\]",
    ),
    "3-d packed": (
        dict(cu_seqlens=torch.tensor([0, 6])),
        ValueError,
        r"logits must be \(N, V\) with cu_seqlens.*view\(-1, V\)",
    ),
    "no vocabulary": (dict(logits=LOGITS[..., :0]), ValueError, r"vocabulary.*\(2, 3, 0\)"),
    "transposed": (
        dict(logits=torch.randn(2, 5, 3).mT),
        ValueError,
        r"contiguous in their last dimension.*\(15, 1, 3\).*contiguous\(\)",
    ),
    "expanded in place": (
        dict(logits=torch.randn(1, 1, 5).expand(2, 3, 5), inplace_backward=True),
        ValueError,
        "inplace_backward=True.*expand",
    ),
    "labels type": (dict(labels=[[0]]), TypeError, "labels must be a torch.Tensor, got list"),
    "labels shape": (
        dict(labels=LABELS[:, 1:]),
        ValueError,
        r"labels must have shape \(2, 3\) for logits \(2, 3, 5\), got \(2, 2\).*shift=True",
    ),
    "labels dtype": (dict(labels=LABELS.float()), TypeError, r"labels must be int64.*long\(\)"),
    "labels device": (
        dict(labels=LABELS.to("meta")),
        ValueError,
        r"labels must be on the device of logits, cpu, got meta.*labels.to\(logits.device\)",
    ),
    "mask type": (dict(mask=[1]), TypeError, "mask must be a torch.Tensor or None, got list"),
    "mask shape": (
        dict(mask=torch.ones(2, 2)),
        ValueError,
        r"mask must have the shape of labels, \(2, 3\), got \(2, 2\).*slice neither",
    ),
    "mask dtype": (dict(mask=torch.ones(2, 3) * 1j), TypeError, "mask must be bool.*complex64"),
    "mask gradient": (
        dict(mask=torch.ones(2, 3, requires_grad=True)),
        ValueError,
        r"mask must not require a gradient.*mask.detach\(\)",
    ),
    "cu_seqlens dtype": (
        PACKED | dict(cu_seqlens=torch.tensor([0.0, 6.0])),
        TypeError,
        "cu_seqlens must be an int32 or int64 tensor, got torch.float32",
    ),
    "cu_seqlens list": (
        PACKED | dict(cu_seqlens=[0, 6]),
        TypeError,
        "cu_seqlens must be an int32 or int64 tensor, got list",
    ),
    "cu_seqlens shape": (
        PACKED | dict(cu_seqlens=torch.tensor([[0, 6]])),
        ValueError,
        r"cu_seqlens must have shape \(S \+ 1,\), got \(1, 2\)",
    ),
    "cu_seqlens end": (
        PACKED | dict(cu_seqlens=torch.tensor([0, 9])),
        ValueError,
        r"cu_seqlens must rise from 0 to at most the number of tokens, 6, got \[0, 9\]",
    ),
    "cu_seqlens order": (
        PACKED | dict(cu_seqlens=torch.tensor([0, 4, 2, 6])),
        ValueError,
        r"cu_seqlens must rise",
    ),
    "temperature": (dict(temperature=0.0), ValueError, "temperature must be positive.*got 0.0"),
    "temperature nan": (dict(temperature=float("nan")), ValueError, "temperature must be positive"),
    "temperature tensor": (
        dict(temperature=torch.ones(())),
        TypeError,
        r"temperature must be a number, got Tensor.*item\(\)",
    ),
    "logit_scale": (dict(logit_scale=-1), ValueError, "logit_scale must be positive.*got -1"),
    "softcap": (dict(softcap=0), ValueError, "softcap must be positive.*None for no cap"),
    "reduction": (
        dict(reduction="none"),
        ValueError,
        'reduction must be "mean" or "sum", got \'none\'; .*fused_token_logprob',
    ),
    "stats": (dict(stats=["margin"]), ValueError, "stats must be out of lengths.*got 'margin'"),
    "stats string": (dict(stats="entropy"), TypeError, r"sequence of names.*\(\"entropy\",\)"),
    "ignore_index": (dict(ignore_index=None), TypeError, "ignore_index must be an int"),
    "ignore_index beyond int64": (
        dict(ignore_index=-(2**63) - 1),
        ValueError,
        r"ignore_index must be in int64, from -2\*\*63 to .*got -9223372036854775809; .*such as -1",
    ),
    "backend": (
        dict(backend="cuda"),
        ValueError,
        '"auto", "triton", "cpu" or "torch", got \'cuda\'',
    ),
    "float64 on Triton": (
        dict(logits=LOGITS.double(), backend="triton"),
        TypeError,
        'logits are float64.*backend="torch"',
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_message(case):
    arguments, error, message = CASES[case]
    arguments = dict(logits=LOGITS, labels=LABELS) | arguments
    with pytest.raises(error, match=f"(?s){message}"):
        fused_seq_logprob(**arguments)


@pytest.mark.parametrize("case", ["mask type", "mask shape", "mask dtype", "mask gradient"])
def test_message_of_tokens(case):
    """A mask is checked as it came, before it only says what is scored."""
    arguments, error, message = CASES[case]
    with pytest.raises(error, match=f"(?s){message}"):
        fused_token_logprob(**(dict(logits=LOGITS, labels=LABELS) | arguments))


def test_lengths_are_of_sequences():
    with pytest.raises(ValueError, match=r"token_logps.*got 'lengths'"):
        fused_token_logprob(LOGITS, LABELS, stats=["lengths"])


def test_cu_seqlens_values_on_triton_in_debug(monkeypatch, device):
    pytest.importorskip("triton")
    monkeypatch.setenv("DPO_TRITON_DEBUG", "1")
    inputs = {name: x.to(device) for name, x in PACKED.items()}
    with pytest.raises(ValueError, match="cu_seqlens must rise"):
        fused_seq_logprob(
            **inputs, cu_seqlens=torch.tensor([0, 9], device=device), backend="triton"
        )


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter at the checkout's root."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")}
    root = Path(__file__).resolve().parents[1]
    return subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=variables, capture_output=True, text=True
    )


ALONE = """
import sys
import torch
before = set(sys.modules)
import dpo_triton
print(*(name for name in sys.modules if name not in before))

missing = ("triton", "numba")
for name in missing:
    sys.modules[name] = None  # as where it is not installed
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in missing else find(name, *rest)
logits, labels = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
print(dpo_triton.fused_seq_logprob(logits, labels).shape)
for backend in ("triton", "cpu"):
    try:
        dpo_triton.fused_seq_logprob(logits, labels, backend=backend)
    except ModuleNotFoundError as error:
        print(error)
"""


def test_torch_alone_suffices():
    """Importing takes none of the others; asking for one that is missing says what to install."""
    done = run_python(ALONE)
    new, shape, *errors = done.stdout.splitlines()
    assert "dpo_triton" in new.split()
    assert "dpo_triton.kernels" not in new.split()
    heavy = {"triton", "numba", "transformers", "matplotlib"}
    assert not heavy & {name.partition(".")[0] for name in new.split()}
    assert "torch.distributed.tensor" not in new.split()  # unless torch imports it itself
    assert shape == "torch.Size([2])"
    assert len(errors) == 2
    assert "pip install triton" in errors[0]
    assert "pip install numba" in errors[1]


NO_GPU = """
import torch, dpo_triton
logits, labels = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
print(dpo_triton.fused_seq_logprob(logits, labels).shape)
dpo_triton.fused_seq_logprob(logits, labels, backend="triton")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_triton_without_gpu():
    """The cure that it names is what this suite runs with."""
    pytest.importorskip("triton")
    done = run_python(NO_GPU)
    assert "torch.Size([2])" in done.stdout
    assert "RuntimeError" in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr
