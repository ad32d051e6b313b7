"""Complaints about hidden states and head: the argument, the rule, what came, and the cure."""

import pytest
import torch

from dpo_triton import fused_linear_seq_logprob, fused_linear_token_logprob

HIDDEN = torch.randn(2, 3, 4)
WEIGHT = torch.randn(7, 4)
LABELS = torch.zeros(2, 3, dtype=torch.int64)
PACKED = dict(hidden=torch.randn(6, 4), labels=torch.zeros(6, dtype=torch.int64))

CASES = {
    "hidden type": (dict(hidden=[[1.0]]), TypeError, "hidden must be a torch.Tensor, got list"),
    "weight type": (
        dict(weight=torch.nn.Linear(4, 7)),
        TypeError,
        "weight must be a torch.Tensor, got Linear",
    ),
    "hidden dtype": (
        dict(hidden=HIDDEN.long()),
        TypeError,
        "hidden must be float32, bfloat16, float16 or float64, got torch.int64",
    ),
    "bias dtype": (
        dict(bias=torch.zeros(7, dtype=torch.int8)),
        TypeError,
        "bias must be float32.*got torch.int8",
    ),
    "2-d hidden": (
        dict(hidden=HIDDEN[0], labels=LABELS[0]),
        ValueError,
        r"hidden must be \(B, T, H\), got \(3, 4\); .*cu_seqlens.*hidden\[None\]",
    ),
    "3-d packed": (
        dict(cu_seqlens=torch.tensor([0, 6])),
        ValueError,
        r"hidden must be \(N, H\) with cu_seqlens, got \(2, 3, 4\); .*flatten\(0, 1\)",
    ),
    "H": (
        dict(weight=torch.randn(7, 5)),
        ValueError,
        r"weight must be \(V, H\) = \(V, 4\) for hidden .*, got \(7, 5\); .*lm_head.weight",
    ),
    "transposed weight": (
        dict(weight=WEIGHT.t()),
        ValueError,
        r"weight must be \(V, H\) = \(V, 4\).*got \(4, 7\); pass weight.t\(\)",
    ),
    "1-d weight": (dict(weight=WEIGHT[0]), ValueError, r"weight must be \(V, H\).*got \(4,\)"),
    "no token": (dict(weight=WEIGHT[:0]), ValueError, r"at least one token.*\(0, 4\)"),
    "no feature": (
        dict(weight=WEIGHT[:, :0], hidden=HIDDEN[..., :0]),
        ValueError,
        r"one feature, got \(7, 0\)",
    ),
    "bias shape": (
        dict(bias=torch.zeros(4)),
        ValueError,
        r"bias must be \(V,\) = \(7,\) for weight \(7, 4\), got \(4,\)",
    ),
    "weight's dtype": (
        dict(weight=WEIGHT.bfloat16()),
        TypeError,
        "weight must have the dtype of hidden, torch.float32, got torch.bfloat16; "
        r"pass hidden.to\(weight.dtype\), or run under torch.autocast",
    ),
    "bias's dtype": (
        dict(bias=torch.zeros(7).double()),
        TypeError,
        "bias must have the dtype of hidden, torch.float32, got torch.float64",
    ),
    "weight's device": (
        dict(weight=WEIGHT.to("meta")),
        ValueError,
        r"weight must be on the device of hidden, cpu, got meta; pass weight.to\(hidden.device\)",
    ),
    "bias's device": (
        dict(bias=torch.zeros(7, device="meta")),
        ValueError,
        "bias must be on the device of hidden, cpu, got meta",
    ),
    "labels' device": (
        dict(labels=LABELS.to("meta")),
        ValueError,
        r"labels must be on the device of hidden, cpu, got meta.*labels.to\(hidden.device\)",
    ),
    "labels' shape": (
        dict(labels=LABELS[:, 1:]),
        ValueError,
        r"labels must have shape \(2, 3\) for hidden \(2, 3, 4\), got \(2, 2\).*hidden\[b, t\]",
    ),
    "mask's shape": (dict(mask=torch.ones(2, 2)), ValueError, "mask must have the shape of labels"),
    "tile_bytes type": (
        dict(tile_bytes=1e6),
        TypeError,
        "tile_bytes must be an int or None, got float",
    ),
    "tile_bytes bool": (dict(tile_bytes=True), TypeError, "tile_bytes must be an int.*got bool"),
    "tile_bytes": (dict(tile_bytes=0), ValueError, "tile_bytes must be positive, got 0; None"),
    "cu_seqlens end": (
        PACKED | dict(cu_seqlens=torch.tensor([0, 9])),
        ValueError,
        r"cu_seqlens must rise from 0 to at most the number of tokens, 6, got \[0, 9\]",
    ),
    "temperature": (dict(temperature=0.0), ValueError, "temperature must be positive.*got 0.0"),
    "reduction": (
        dict(reduction="none"),
        ValueError,
        'reduction must be "mean" or "sum", got \'none\'; .*fused_linear_token_logprob',
    ),
    "stats": (dict(stats=["margin"]), ValueError, "stats must be out of lengths.*got 'margin'"),
    "backend": (
        dict(backend="cuda"),
        ValueError,
        '"auto", "triton", "cpu" or "torch", got \'cuda\'',
    ),
    "float64 on Triton": (
        dict(hidden=HIDDEN.double(), weight=WEIGHT.double(), backend="triton"),
        TypeError,
        'float64.*backend="torch"',
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_message(case):
    arguments, error, message = CASES[case]
    arguments = dict(hidden=HIDDEN, weight=WEIGHT, labels=LABELS) | arguments
    with pytest.raises(error, match=f"(?s){message}"):
        fused_linear_seq_logprob(**arguments)


def test_lengths_are_of_sequences():
    with pytest.raises(ValueError, match=r"token_logps.*got 'lengths'"):
        fused_linear_token_logprob(HIDDEN, WEIGHT, LABELS, stats=["lengths"])


def test_cu_seqlens_values_on_triton_in_debug(monkeypatch, device):
    pytest.importorskip("triton")
    monkeypatch.setenv("DPO_TRITON_DEBUG", "1")
    inputs = {name: x.to(device) for name, x in PACKED.items()}
    bounds = torch.tensor([0, 9], device=device)
    with pytest.raises(ValueError, match="cu_seqlens must rise"):
        fused_linear_seq_logprob(
            **inputs, weight=WEIGHT.to(device), cu_seqlens=bounds, backend="triton"
        )
