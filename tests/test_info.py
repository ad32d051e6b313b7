"""`python -m dpo_triton.info`: what it prints, and both exit statuses."""

import importlib.util
import os
import subprocess
import sys
from importlib import metadata

import pytest
import torch

import dpo_triton
from dpo_triton import _backends, info


def cut_gradient(stages):
    """A gradient that is wrong in its last column only."""

    def grad(*args, **options):
        result = stages.grad(*args, **options)
        result[..., -1] = 0
        return result

    return stages._replace(grad=grad)


def bend_values(stages):
    """Values that are wrong by five units in the last place of float32."""

    def combine(*args):
        stages.combine(*args)
        args[-1].values.mul_(1 + 5e-6)

    return stages._replace(combine=combine)


def raise_in_partials(stages):
    def partials(*args, **options):
        raise RuntimeError("no kernel image is available")

    return stages._replace(partials=partials)


def nan_values(stages):
    def combine(*args):
        stages.combine(*args)
        args[-1].values.fill_(torch.nan)

    return stages._replace(combine=combine)


def test_the_command_reports_and_succeeds():
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "dpo_triton.info"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"dpo_triton {dpo_triton.__version__} from " in done.stdout
    for package in ("torch", "numpy"):
        assert f"\n{package} {metadata.version(package)}\n" in done.stdout
    for package in ("triton", "numba", "trl", "transformers", "peft", "accelerate"):
        assert f"\n{package} " in done.stdout
    assert "\nTRITON_INTERPRET=0\n" in done.stdout
    assert "\ncpu: " in done.stdout
    of_cpu = "torch, since this is no GPU"
    if importlib.util.find_spec("numba") is not None:
        of_cpu = "cpu, since numba is installed"
        assert "  cpu: self-check passed, 8 cases" in done.stdout
    assert f'  backend="auto" is {of_cpu}' in done.stdout
    assert "  torch: self-check passed, 8 cases" in done.stdout
    assert "nats; head passed, 2 cases\n" in done.stdout
    assert "  torch: torch.compile passed\n" in done.stdout
    assert "  triton: cannot run here: " in done.stdout
    assert done.stdout.endswith("self-check passed\n")


def test_every_case_on_every_backend(backend, device):
    results = list(info.self_check(backend, device))
    assert all(result.passed for result in results), results
    cases = {result.case for result in results}
    assert len(cases) == len(results) == 8
    assert {"padded, float32", "packed, shifted, bfloat16"} <= cases


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (cut_gradient, "torch: FAILED, padded, float32: error of a value"),
        (bend_values, "torch: FAILED, packed, shifted, bfloat16: error of a value"),
        (nan_values, "error of a value nan nats"),
        (raise_in_partials, "torch: FAILED: RuntimeError: no kernel image is available"),
    ],
)
def test_a_broken_stage_fails_the_command(breakage, message, monkeypatch, capsys):
    broken = breakage(_backends._torch_backend())
    monkeypatch.setattr(_backends, "_torch_backend", lambda: broken)
    monkeypatch.setattr(info, "BACKENDS", ("torch",))
    assert info.main() == 1
    output = capsys.readouterr().out
    assert message in output
    assert output.endswith("self-check FAILED\n")


def test_a_gpu_without_triton_fails_the_command(monkeypatch, capsys):
    """ "auto" would raise there: the check says so and does not count PyTorch's success instead."""

    def no_triton(name, device, dtype):
        if name == "torch":
            return _backends._torch_backend()
        raise ModuleNotFoundError("needs Triton, which is not installed")

    monkeypatch.setattr(info, "resolve_backend", no_triton)
    assert info.main() == 1
    output = capsys.readouterr().out
    assert 'backend="auto" FAILED: needs Triton' in output
    assert "torch: self-check passed" in output
    assert "triton: cannot run here: needs Triton" in output


def test_versions_of_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(info, "PACKAGES", ("torch", "no_such_package"))
    lines = list(info.versions())
    assert f"torch {metadata.version('torch')}" in lines
    assert "no_such_package not installed" in lines


def test_head_on_every_backend(backend, device):
    results = list(info.head_check(backend, device))
    assert all(result.passed for result in results), results
    assert [result.case for result in results] == ["head, hidden", "head, weight"]


def test_a_broken_head_fails_the_command(monkeypatch, capsys):
    def halved(*args, **options):
        return 0.5 * original(*args, **options)

    original = info.fused_linear_seq_logprob
    monkeypatch.setattr(info, "fused_linear_seq_logprob", halved)
    monkeypatch.setattr(info, "BACKENDS", ("torch",))
    assert info.main() == 1
    assert "torch: FAILED, head, hidden: error of a value" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("break_it", "message", "status"),
    [
        (lambda function: lambda *args: function(*args) + 1, "FAILED: other values", 1),
        (lambda function: 1 / 0, "torch.compile cannot run here: ZeroDivisionError", 0),
        (
            lambda function: function if function is torch.neg else 1 / 0,
            "torch.compile FAILED: ZeroDivisionError",
            1,
        ),
    ],
)
def test_a_broken_compiler(break_it, message, status, monkeypatch, capsys):
    """One that compiles nothing at all is not the package's fault."""
    monkeypatch.setattr(info, "_compiled", break_it)
    monkeypatch.setattr(info, "BACKENDS", ("torch",))
    assert info.main() == status
    assert message in capsys.readouterr().out


def raise_anything(*args):
    raise TypeError("only 0-dimensional arrays can be converted")


@pytest.mark.parametrize(
    ("triton", "numpy", "status"),
    [
        ("3.6.0", "2.4.1", 0),
        ("3.4.0", "2.10.0", 0),
        ("3.6.0", "2.3.9", 1),
        ("3.7.1", "2.5.0", 1),
        ("3.10.0", "2.5.0", 1),
    ],
)
def test_a_known_bad_numpy_is_named(triton, numpy, status, monkeypatch, capsys):
    """Triton's interpreter of some versions fails with newer NumPys; else it is our failure."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(info, "_version", dict(triton=triton, numpy=numpy).get)
    triton_backend = _backends._torch_backend()._replace(name="triton")
    monkeypatch.setattr(info, "resolve_backend", lambda name, device, dtype: triton_backend)
    monkeypatch.setattr(info, "self_check", raise_anything)
    monkeypatch.setattr(info, "BACKENDS", ("triton",))
    assert info.main() == status
    output = capsys.readouterr().out
    if status:
        assert "triton: FAILED: TypeError: only 0-dimensional" in output
    else:
        assert f"cannot run here: the interpreter of Triton {triton} fails with NumPy" in output
        assert f"here {numpy}; pip install 'numpy<2.4'" in output


def test_missing_kernels_are_no_traceback(monkeypatch, capsys):
    """A checkout without symbolic links has a file in the place of the folder."""

    def no_kernels():
        raise ImportError("cannot import name 'kernels' from 'dpo_triton'")

    monkeypatch.setattr(_backends, "_triton_backend", no_kernels)
    monkeypatch.setattr(_backends, "_triton_serves", lambda device_type, interpret: True)
    monkeypatch.setattr(info, "BACKENDS", ("torch", "triton"))
    assert info.main() == (1 if torch.cuda.is_available() else 0)
    output = capsys.readouterr().out
    assert "triton: cannot run here: " in output
    assert "kernels" in output


def test_the_report_survives_what_it_cannot_ask(monkeypatch, capsys):
    monkeypatch.setattr(info, "devices", raise_anything)
    assert info.main() == 1
    output = capsys.readouterr().out
    assert "the report ends here: TypeError: only 0-dimensional" in output
    assert output.endswith("self-check FAILED\n")


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device", "installed", "expected"),
    [
        (CPU, (), ["pip install numba"]),
        (CPU, ("numba",), []),
        (GPU, (), ["pip install triton"]),
        (GPU, ("triton",), []),
    ],
)
def test_commands_for_a_better_backend(device, installed, expected, monkeypatch):
    monkeypatch.setattr(info, "_is_installed", lambda package: package in installed)
    monkeypatch.setattr(info, "BACKENDS", ("triton", "cpu", "torch"))
    monkeypatch.setattr(info.shutil, "which", lambda command: None)
    monkeypatch.setattr(info.sys, "platform", "linux")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    commands = [advice.partition("  (")[0] for advice in info.advices(device)]
    assert commands == expected


def test_commands_for_a_gpu_that_is_not_used(monkeypatch):
    monkeypatch.setattr(info, "BACKENDS", ("triton", "torch"))
    monkeypatch.setattr(info.shutil, "which", lambda command: f"/usr/bin/{command}")
    monkeypatch.setattr(torch.version, "cuda", None)
    (advice,) = info.advices(CPU)
    assert advice.startswith("pip install --force-reinstall torch --index-url https://")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(info, "_is_installed", lambda package: True)
    (advice,) = info.advices(GPU)
    assert advice.startswith("unset TRITON_INTERPRET  (")


def test_why_a_device_gets_its_backend(monkeypatch):
    monkeypatch.setattr(info, "BACKENDS", ("triton", "cpu", "torch"))
    assert info.reason(GPU, "triton") == "this is a GPU"
    assert info.reason(CPU, "cpu") == "numba is installed"
    assert info.reason(CPU, "torch") == "this is no GPU, and numba is not installed"
    assert info.reason(torch.device("xpu"), "torch") == "no kernels serve xpu"
