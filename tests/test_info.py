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

    def combine(*args, **options):
        values, *rest = stages.combine(*args, **options)
        return values * (1 + 5e-6), *rest

    return stages._replace(combine=combine)


def raise_in_partials(stages):
    def partials(*args, **options):
        raise RuntimeError("no kernel image is available")

    return stages._replace(partials=partials)


def nan_values(stages):
    def combine(*args, **options):
        values, *rest = stages.combine(*args, **options)
        return values * torch.nan, *rest

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
