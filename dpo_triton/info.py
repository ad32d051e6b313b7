"""What a bug report needs: `python -m dpo_triton.info`. Exits with 1 if the self-check fails.

For each device: which backend it gets and why, what would give it a better one, and the self-check
of each backend that can run there. It compares values and gradients of `fused_seq_logprob` and
`fused_linear_seq_logprob` with `dpo_triton.reference` in float64, and a compiled call with the same
call in eager mode.
"""

import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from ._backends import BACKEND_NAMES, BackendName, resolve_backend
from ._records import Backend
from ._version import __version__
from .linear import fused_linear_seq_logprob
from .seq_logprob import fused_seq_logprob

PACKAGES = ("torch", "triton", "numpy", "numba", "trl", "transformers", "peft", "accelerate")
VARIABLES = ("TRITON_INTERPRET", "DPO_TRITON_DEBUG")
BACKENDS: tuple[BackendName, ...] = tuple(name for name in BACKEND_NAMES if name != "auto")


def main() -> int:
    """Print the report and return the exit status: 0, or 1 if a self-check fails."""
    try:
        print(*versions(), sep="\n")
        passed = [check_device(device) for device in devices()]
    except Exception as error:  # a report of what is broken must not break on it
        print(f"\nthe report ends here: {type(error).__name__}: {error}")
        passed = [False]
    print("\nself-check", "passed" if all(passed) else "FAILED")
    return 0 if all(passed) else 1


def check_device(device: torch.device) -> bool:
    """Print what the device is and what runs there; whether all that runs is right."""
    print(f"\n{device}: {describe(device)}")
    chosen, error = chosen_backend(device)
    if chosen is None:
        print(f'  backend="auto" FAILED: {error}')
    else:
        print(f'  backend="auto" is {chosen}, since {reason(device, chosen)}')
    for advice in advices(device):
        print(f"  better: {advice}")
    passed = [check_backend(backend, device) for backend in BACKENDS]
    return all(passed) and chosen is not None


def chosen_backend(device: torch.device) -> tuple[str | None, str]:
    """What "auto" is on the device, or None and why there is nothing."""
    chosen, error = _resolve("auto", device)
    return (None, error) if chosen is None else (chosen.name, "")


def reason(device: torch.device, chosen: str) -> str:
    if chosen == "triton":
        return "this is a GPU"
    if chosen == "cpu":
        return "numba is installed"
    if device.type == "cpu" and "cpu" in BACKENDS:
        return "this is no GPU, and numba is not installed"
    return "this is no GPU" if device.type == "cpu" else f"no kernels serve {device.type}"


def advices(device: torch.device) -> Iterator[str]:
    """Commands that would give the device a faster backend, each with what it gives."""
    if device.type == "cuda" and not _is_installed("triton"):
        package = "triton-windows" if sys.platform == "win32" else "triton"
        yield f"pip install {package}  (the kernels for a GPU)"
    if device.type == "cuda" and _is_interpreted():
        unset = "set TRITON_INTERPRET=" if sys.platform == "win32" else "unset TRITON_INTERPRET"
        yield f"{unset}  (compiled kernels instead of Triton's interpreter)"
    if device.type == "cpu" and "cpu" in BACKENDS and not _is_installed("numba"):
        yield "pip install numba  (compiled loops instead of PyTorch's operators)"
    has_unused_gpu = shutil.which("nvidia-smi") is not None and torch.version.cuda is None
    if device.type == "cpu" and has_unused_gpu and torch.version.hip is None:
        index = "--index-url https://download.pytorch.org/whl/cu126"
        yield f"pip install --force-reinstall torch {index}  (this torch cannot use the GPU)"


def check_backend(backend: BackendName, device: torch.device) -> bool:
    """Run the self-check and print its outcome; whether it passed or cannot run here."""
    resolved, why_not = _resolve(backend, device)
    if resolved is None:
        print(f"  {backend}: cannot run here: {why_not}")
        return True
    try:
        results = list(self_check(backend, device))
        of_head = list(head_check(backend, device))
    except Exception as error:  # whatever a compiler or a driver raises belongs into the report
        fault = known_fault(backend)
        if fault is not None:
            print(f"  {backend}: cannot run here: {fault}")
            return True
        print(f"  {backend}: FAILED: {type(error).__name__}: {error}")
        return False
    failed = [result for result in results + of_head if not result.passed]
    for result in failed:
        print(
            f"  {backend}: FAILED, {result.case}: error of a value {result.value_error:.2g} nats, "
            f"of a gradient {result.grad_error:.2g} of the largest"
        )
    if not failed:
        print(
            f"  {backend}: self-check passed, {len(results)} cases, largest error of a value "
            f"{max(result.value_error for result in results):.2g} nats; head passed, "
            f"{len(of_head)} cases"
        )
    return check_compile(backend, device) and not failed


def check_compile(backend: BackendName, device: torch.device) -> bool:
    """Compare a compiled call with the same in eager mode, and print what came out."""
    logits, labels = torch.randn(2, 4, 130, device=device), torch.zeros(2, 4, device=device).long()

    def call(logits: Tensor) -> Any:
        return fused_seq_logprob(logits, labels, shift=True, backend=backend)

    try:
        _compiled(torch.neg)(logits)
    except Exception as error:
        print(f"  {backend}: torch.compile cannot run here: {type(error).__name__}: {error}")
        return True
    try:
        is_same = torch.equal(_compiled(call)(logits), call(logits))
    except Exception as error:
        print(f"  {backend}: torch.compile FAILED: {type(error).__name__}: {error}")
        return False
    print(f"  {backend}: torch.compile {'passed' if is_same else 'FAILED: other values'}")
    return is_same


def known_fault(backend: BackendName) -> str | None:
    """What other packages' versions do to a backend, and the cure."""
    if backend == "triton" and _is_interpreted():
        triton, numpy = _version("triton"), _version("numpy")
        if (3, 4) <= _release(triton) < (3, 7) and _release(numpy) >= (2, 4):
            return (
                f"the interpreter of Triton {triton} fails with NumPy 2.4 and newer, here {numpy}; "
                "pip install 'numpy<2.4', or unset TRITON_INTERPRET"
            )
    return None


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
                rounded, *beside = tensors[0].to(dtype), *tensors[1:]
                moved, *moved_beside = (x.to(device) for x in (rounded, *beside))
                moved_options = {name: x.to(device) for name, x in options.items()}
                call = partial(fused_seq_logprob, shift=shift, backend=backend, **moved_options)
                value, grad = _value_and_grads(call, [moved], *moved_beside)
                exact_call = partial(reference.seq_logprob, shift=shift, **options)
                exact, exact_grad = _value_and_grads(exact_call, [rounded.double()], *beside)
                value_error = (value - exact).abs()
                grad_error = float((grad - exact_grad).abs().max() / exact_grad.abs().max())
                # A NaN compares false, and so fails.
                passed = bool((value_error <= 1e-6 * (1 + exact.abs())).all())
                passed = passed and grad_error <= 2e-6 + torch.finfo(dtype).eps
                case = f"{layout}{', shifted' if shift else ''}, {str(dtype).rpartition('.')[2]}"
                yield CheckResult(case, float(value_error.max()), grad_error, passed)


def head_check(backend: BackendName, device: torch.device) -> Iterator[CheckResult]:
    """Compare a head's values and its gradients with the reference of its logits in float64.

    Raises:
        Exception: whatever the backend raises.
    """
    vocab_size = 4099  # two tiles of the head, the second with a ragged end
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 4, 16, generator=generator)
    weight = torch.randn(vocab_size, 16, generator=generator)
    labels = torch.randint(0, vocab_size, (2, 4), generator=generator)

    def of_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Any:
        return reference.seq_logprob(hidden @ weight.t(), labels, shift=True)

    def of_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Any:
        return fused_linear_seq_logprob(hidden, weight, labels, shift=True, backend=backend)

    inputs = [x.to(device) for x in (hidden, weight, labels)]
    value, *grads = _value_and_grads(of_head, inputs[:2], inputs[2])
    exact, *exact_grads = _value_and_grads(of_logits, [hidden.double(), weight.double()], labels)
    value_error = (value - exact).abs()
    # a product in TensorFloat-32, if it is allowed, keeps ten bits
    tolerance = 1e-2 if torch.backends.cuda.matmul.allow_tf32 else 1e-5
    is_right = bool((value_error <= tolerance * (1 + exact.abs())).all())
    for name, grad, exact_grad in zip(("hidden", "weight"), grads, exact_grads, strict=True):
        grad_error = float((grad - exact_grad).abs().max() / exact_grad.abs().max())
        passed = is_right and grad_error <= tolerance
        yield CheckResult(f"head, {name}", float(value_error.max()), grad_error, passed)


def _value_and_grads(function: Any, inputs: list[Tensor], *args: Tensor) -> list[Tensor]:
    """In float64 on the CPU: the value, then each input's gradient; upstream gradients differ."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*leaves, *args)
    upstream = torch.arange(1, len(value) + 1, dtype=value.dtype, device=value.device)
    grads = torch.autograd.grad(value, leaves, upstream)
    return [x.detach().cpu().double() for x in (value, *grads)]


def _compiled(function: Any) -> Any:
    """By the part of the compiler that needs no other one."""
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # triton-windows is another distribution, for one
        return "of unknown version" if _is_installed(package) else "not installed"


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"\d+", version)[:2])


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def _resolve(backend: BackendName, device: torch.device) -> tuple[Backend | None, str]:
    """The backend, or None and why it cannot run here."""
    try:
        return resolve_backend(backend, device, torch.float32), ""
    except (ImportError, RuntimeError) as error:  # kernels that are not there are an ImportError
        return None, str(error)


if __name__ == "__main__":
    sys.exit(main())
