"""What a user's script is inferred to have, and which of its mistakes a type checker finds."""

import re
import typing
from pathlib import Path

import pytest

import dpo_triton

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """\
import torch
import dpo_triton as d

x, y = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
reveal_type(d.fused_seq_logprob(x, y))
reveal_type(d.fused_seq_logprob(x, y, stats=("lengths",), shift=True))
reveal_type(d.fused_token_logprob(x, y, temperature=0.5))
reveal_type(d.fused_linear_seq_logprob(x, x[0], y, reduction="sum"))
reveal_type(d.fused_linear_token_logprob(x, x[0], y, stats=["entropy"]))
reveal_type(d.fused_dpo_loss(x, y, loss_type=["sigmoid", "sft"]))
d.fused_dpo_loss(x, y, loss_type="sigmod")
d.fused_seq_logprob(x, y, stats=("entropi",))
d.fused_token_logprob(x, y, stats=("lengths",))
d.fused_seq_logprob(x, y, reduction="average")
d.fused_seq_logprob(x, y, tempreature=2.0)
d.fused_linear_seq_logprob(x, x[0], y, backend="cuda")
"""
# Most of PyTorch, which its tensors do not need, takes mypy most of a minute.
UNREAD = (
    *("_dynamo", "_functorch", "_higher_order_ops", "_inductor", "_prims", "_refs", "_subclasses"),
    *("ao", "distributed", "export", "fx", "nn", "onnx", "testing", "utils"),
)
CONFIGURATION = f"""\
[mypy]
strict = true
[mypy-{",".join(f"torch.{name}.*" for name in UNREAD)},numpy.*,sympy.*]
follow_imports = skip
"""
VALUES = "torch._tensor.Tensor"
WITH_STATS = "tuple[torch._tensor.Tensor, dict[str, torch._tensor.Tensor]]"
INFERRED = [VALUES, WITH_STATS, VALUES, VALUES, WITH_STATS]


@pytest.mark.slow
def test_mypy(tmp_path, monkeypatch):
    api = pytest.importorskip("mypy.api")
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "mypy.ini").write_text(CONFIGURATION)
    monkeypatch.chdir(ROOT)
    where = ["--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", str(tmp_path / "cache")]
    script = str(tmp_path / "script.py")
    out, _, _ = api.run([*where, script, "--no-error-summary", "--no-pretty"])
    lines = [line for line in out.splitlines() if "script.py" in line]
    revealed = re.findall(r'Revealed type is "(.*?)"', "\n".join(lines))
    assert [text.replace("builtins.", "") for text in revealed[:5]] == INFERRED, out
    assert "DPOLossOutput" in revealed[5], out
    first_wrong = SCRIPT.splitlines().index('d.fused_dpo_loss(x, y, loss_type="sigmod")') + 1
    wrong = {int(n) for n in re.findall(r"script\.py:(\d+): error", out)}
    assert wrong == set(range(first_wrong, len(SCRIPT.splitlines()) + 1)), out


@pytest.mark.parametrize("name", [n for n in dpo_triton.__all__ if n.startswith("fused_")])
def test_hints_resolve(name):
    """Tools that read annotations at run time find every name in them."""
    assert "return" in typing.get_type_hints(getattr(dpo_triton, name))
