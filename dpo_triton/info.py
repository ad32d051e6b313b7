"""What a bug report needs: `python -m dpo_triton.info`. Exits with 1 if the self-check fails.

The self-check compares values and gradients of `fused_seq_logprob` with `dpo_triton.reference` in
float64, on each device with each backend that can run there.
"""

import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from ._backends import BackendName, resolve_backend
from ._version import __version__
from .seq_logprob import fused_seq_logprob

PACKAGES = ("torch", "triton", "numpy", "numba", "trl", "transformers", "peft", "accelerate")
VARIABLES = ("TRITON_INTERPRET", "DPO_TRITON_DEBUG")
BACKENDS: tuple[BackendName, ...] = ("torch", "cpu", "triton")


def main() -> int:
    """Print the report and return the exit status: 0, or 1 if a self-check fails."""
    print(*versions(), sep="\n")
    passed = [check_device(device) for device in devices()]
    print("\nself-check", "passed" if all(passed) else "FAILED")
    return 0 if all(passed) else 1


def check_device(device: torch.device) -> bool:
    """Print what the device is and what runs there; whether all that runs is right."""
    print(f"\n{device}: {describe(device)}")
    passed = [check_backend(backend, device) for backend in BACKENDS]
    try:
        is_torch = _resolve("auto", device) == _resolve("torch", device)
    except (ModuleNotFoundError, RuntimeError) as error:
        print(f'  backend="auto" FAILED: {error}')
        return False
    fast = (
        "cpu, since numba is installed" if device.type == "cpu" else "triton, since this is a GPU"
    )
    why = "torch, since this is no GPU" if is_torch else fast
    print(f'  backend="auto" is {why}')
    return all(passed)


def check_backend(backend: BackendName, device: torch.device) -> bool:
    """Run the self-check and print its outcome; whether it passed or cannot run here."""
    try:
        _resolve(backend, device)
    except (ModuleNotFoundError, RuntimeError) as error:
        print(f"  {backend}: cannot run here: {error}")
        return True
    try:
        results = list(self_check(backend, device))
    except Exception as error:  # whatever a compiler or a driver raises belongs into the report
        print(f"  {backend}: FAILED: {type(error).__name__}: {error}")
        return False
    failed = [result for result in results if not result.passed]
    for result in failed:
        print(
            f"  {backend}: FAILED, {result.case}: error of a value {result.value_error:.2g} nats, "
            f"of a gradient {result.grad_error:.2g} of the largest"
        )
    if not failed:
        print(
            f"  {backend}: self-check passed, {len(results)} cases, largest error of a value "
            f"{max(result.value_error for result in results):.2g} nats"
        )
    return not failed


def versions() -> Iterator[str]:
    """Lines that say what is installed, and what the environment asks for."""
    yield f"dpo_triton {__version__} from {os.path.dirname(__file__)}"
    yield f"Python {platform.python_version()} on {platform.platform()}"
    yield from (f"{package} {_version(package)}" for package in PACKAGES)
    for variable in VARIABLES:
        yield f"{variable}={os.environ.get(variable, '')}"


def devices() -> list[torch.device]:
    """The CPU and each accelerator that has float64."""
    found = [torch.device("cpu")]
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None and accelerator.type != "mps":
            count = torch.accelerator.device_count()
            found += [torch.device(accelerator.type, index) for index in range(count)]
    return found


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        return (
            f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, "
            f"{gpu.total_memory / 2**30:.0f} GiB, {runtime}"
        )
    if device.type == "cpu":
        return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return device.type


class CheckResult(NamedTuple):
    """One case of the self-check: largest errors, and whether both are within bounds."""

    case: str
    value_error: float  # nats, a length-normalised value
    grad_error: float  # over the largest element
    passed: bool


def self_check(backend: BackendName, device: torch.device) -> Iterator[CheckResult]:
    """Compare values and gradients with the reference: padded and packed, shifted and not.

    Raises:
        Exception: whatever the backend raises.
    """
    vocab_size = 16387  # two splits of the vocabulary, the second with a ragged end
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 4, vocab_size, generator=generator)
    labels = torch.randint(0, vocab_size, (2, 4), generator=generator)
    mask = torch.tensor([[1.0, 0.0, 2.0, 1.0], [0.5, 1.0, 1.0, 0.0]])  # weights, with holes
    packed = [x.flatten(0, 1) for x in (logits, labels, mask)]
    cu_seqlens = torch.tensor([0, 3, 3, 8])  # the second sequence is empty
    layouts: dict[str, tuple[list[Tensor], dict[str, Any]]] = {
        "padded": ([logits, labels, mask], {}),
        "packed": (packed, dict(cu_seqlens=cu_seqlens)),
    }
    for dtype in (torch.float32, torch.bfloat16):
        for layout, (tensors, options) in layouts.items():
            for shift in (False, True):
                rounded = tensors[0].to(dtype)
                moved = [x.to(device) for x in (rounded, *tensors[1:])]
                moved_options = {name: x.to(device) for name, x in options.items()}
                value, grad = _value_and_grad(
                    fused_seq_logprob, *moved, shift=shift, backend=backend, **moved_options
                )
                exact, exact_grad = _value_and_grad(
                    reference.seq_logprob,
                    rounded.double(),
                    *tensors[1:],
                    shift=shift,
                    **options,
                )
                value_error = (value - exact).abs()
                grad_error = float((grad - exact_grad).abs().max() / exact_grad.abs().max())
                # A NaN compares false, and so fails.
                passed = bool((value_error <= 1e-6 * (1 + exact.abs())).all())
                passed = passed and grad_error <= 2e-6 + torch.finfo(dtype).eps
                case = f"{layout}{', shifted' if shift else ''}, {str(dtype).rpartition('.')[2]}"
                yield CheckResult(case, float(value_error.max()), grad_error, passed)


def _value_and_grad(function: Any, logits: Tensor, *args: Tensor, **options: Any) -> list[Tensor]:
    """Both in float64 on the CPU; the sequences' upstream gradients differ."""
    leaf = logits.detach().clone().requires_grad_()
    value = function(leaf, *args, **options)
    upstream = torch.arange(1, len(value) + 1, dtype=value.dtype, device=value.device)
    (grad,) = torch.autograd.grad(value, leaf, upstream)
    return [x.detach().cpu().double() for x in (value, grad)]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # triton-windows is another distribution, for one
        is_there = importlib.util.find_spec(package) is not None
        return "of unknown version" if is_there else "not installed"


def _resolve(backend: BackendName, device: torch.device) -> Any:
    return resolve_backend(backend, device, torch.float32)


if __name__ == "__main__":
    sys.exit(main())
