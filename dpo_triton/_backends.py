"""Which backend runs on a device: asked once a call."""

import functools
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from ._records import Backend, Tokens

BackendName = Literal["auto", "triton", "cpu", "torch"]
BACKEND_NAMES = get_args(BackendName)


def resolve_backend(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """Return the backend for tensors on `device`; "auto" is Triton on a GPU, compiled loops on a
    CPU where numba is installed, and PyTorch elsewhere.

    Raises:
        ModuleNotFoundError: what the backend that is asked for, or that "auto" means here, needs
        is not installed.
        RuntimeError: a backend is asked for that cannot run on tensors of `device`.
        TypeError: Triton and float64.
    """
    return backend_named(_resolved(name, device.type, dtype == torch.float64))


@functools.cache  # what is installed does not change, and asking takes longer than a small call
def _resolved(name: str, device_type: str, is_float64: bool) -> str:
    if name == "auto":
        of_cpu = "cpu" if _is_installed("numba") else "torch"
        name = {"cuda": "triton", "cpu": of_cpu}.get(device_type, "torch")
    if name == "torch":
        return name
    if name == "cpu":
        if not _is_installed("numba"):
            raise ModuleNotFoundError(
                'backend="cpu" needs numba, which is not installed; install it with '
                '`pip install numba`, or pass backend="torch"'
            )
        if device_type != "cpu":
            raise RuntimeError(
                f'backend="cpu" got tensors on {device_type}; move them to the CPU, or pass '
                'backend="auto"'
            )
        return name
    if is_float64:
        raise TypeError(
            "logits are float64, and the Triton backend computes in float32; pass float32, "
            'bfloat16 or float16 logits, or backend="torch"'
        )
    if not _is_installed("triton"):
        raise ModuleNotFoundError(
            f'backend="triton" on a {device_type} device needs Triton, which is not installed; '
            "install it with `pip install triton` (on Windows `pip install triton-windows`), "
            'or pass backend="torch"'
        )
    if not _triton_serves(device_type):
        raise RuntimeError(
            f'backend="triton" got tensors on {device_type}, which no active Triton driver serves; '
            "move them to a GPU, or set TRITON_INTERPRET=1 before the first import of triton to "
            'run in its interpreter, or pass backend="torch"'
        )
    return name


def backend_named(name: str) -> Backend:
    """The backend of a name that `resolve_backend` found."""
    return {"triton": _triton_backend, "cpu": _cpu_backend, "torch": _torch_backend}[name]()


@functools.cache
def _torch_backend() -> Backend:
    from . import _torch_stages
    from ._checks import check_values

    return _backend("torch", _torch_stages, tile_width=4096, check=check_values)


@functools.cache
def _cpu_backend() -> Backend:
    from . import _cpu_stages

    return _backend("cpu", _cpu_stages, tile_width=4096, check=_cpu_stages.check)


@functools.cache
def _triton_backend() -> Backend:
    if importlib.util.find_spec(".kernels", __package__) is None:
        raise ModuleNotFoundError(
            f"{os.path.join(os.path.dirname(__file__), 'kernels')} is a link to the kernels, and "
            "this is a copy without symbolic links (a zip, or git on Windows); run `pip install .` "
            'in it, which needs no links, or pass backend="torch"'
        )
    from . import kernels

    # A GPU waits for the host where tiles are narrow.
    return _backend("triton", kernels, tile_width=32768, check=_check_if_debugging)


def _check_if_debugging(tokens: Tokens, weights: Tensor, vocab_size: int) -> None:
    """The GPU is waited for only if that was asked for."""
    if os.environ.get("DPO_TRITON_DEBUG") == "1":
        from ._checks import check_values

        check_values(tokens, weights, vocab_size)


def _backend(
    name: str, stages: ModuleType, tile_width: int, check: Callable[[Tokens, Tensor, int], None]
) -> Backend:
    functions = (stages.partials, stages.combine, stages.grad, stages.num_splits)
    return Backend(name, *functions, tile_width, check)


@functools.cache
def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _triton_serves(device_type: str) -> bool:
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on"):
        return True
    import triton

    try:
        active = triton.runtime.driver.active.get_active_torch_device().type
    except RuntimeError:  # "0 active drivers": no GPU here
        return False
    return bool(active == device_type)
