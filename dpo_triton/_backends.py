"""The three stages as one value, and the one place that asks which of them can run on a device."""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

BackendName = Literal["auto", "triton", "cpu", "torch"]


class Backend(NamedTuple):
    """Three stage functions with the arguments and results of the operators in `_ops`."""

    name: str
    partials: Callable[..., tuple[Tensor, Tensor, Tensor]]
    combine: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]
    grad: Callable[..., Tensor]
    num_splits: Callable[[int], int]  # columns -> entries of the partials for each token
    on_host: bool  # values can be read without waiting for a device

    @property
    def checks_values(self) -> bool:
        """Whether wrong labels and cu_seqlens raise: on a GPU only if it may be waited for."""
        return self.on_host or os.environ.get("DPO_TRITON_DEBUG") == "1"


def resolve_backend(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """Return the backend for tensors on `device`; "auto" is Triton on a GPU, compiled loops on a
    CPU if numba is installed, and PyTorch elsewhere.

    Raises:
        ModuleNotFoundError: what the backend that is asked for, or that "auto" means here, needs
        is not installed.
        RuntimeError: a backend is asked for that cannot run on tensors of `device`.
        TypeError: Triton and float64.
    """
    if name == "auto":
        of_device = {"cuda": "triton", "cpu": "cpu" if _is_installed("numba") else "torch"}
        name = of_device.get(device.type, "torch")
    if name == "torch":
        return _torch_backend()
    if name == "cpu":
        if not _is_installed("numba"):
            raise ModuleNotFoundError(
                'backend="cpu" needs numba, which is not installed; install it with '
                '`pip install numba`, or pass backend="torch"'
            )
        if device.type != "cpu":
            raise RuntimeError(
                f'backend="cpu" got tensors on {device}; move them to the CPU, or pass '
                'backend="auto"'
            )
        return _cpu_backend()
    if dtype == torch.float64:
        raise TypeError(
            "logits are float64, and the Triton backend computes in float32; pass float32, "
            'bfloat16 or float16 logits, or backend="torch"'
        )
    if importlib.util.find_spec("triton") is None:
        raise ModuleNotFoundError(
            f'backend="{name}" on a {device.type} device needs Triton, which is not installed; '
            "install it with `pip install triton` (on Windows `pip install triton-windows`), "
            'or pass backend="torch"'
        )
    if not _triton_serves(device.type, os.environ.get("TRITON_INTERPRET", "0")):
        raise RuntimeError(
            f'backend="triton" got tensors on {device}, which no active Triton driver serves; move '
            "them to a GPU, or set TRITON_INTERPRET=1 before the first import of triton to run in "
            'its interpreter, or pass backend="torch"'
        )
    return _triton_backend()


@functools.cache
def _torch_backend() -> Backend:
    from . import _torch_stages as stages

    return Backend("torch", stages.partials, stages.combine, stages.grad, stages.num_splits, True)


@functools.cache
def _cpu_backend() -> Backend:
    from . import _cpu_stages as stages

    return Backend("cpu", stages.partials, stages.combine, stages.grad, stages.num_splits, True)


@functools.cache
def _triton_backend() -> Backend:
    from . import kernels as stages

    return Backend("triton", stages.partials, stages.combine, stages.grad, stages.num_splits, False)


@functools.cache
def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _triton_serves(device_type: str, interpret: str) -> bool:
    if interpret.lower() in ("1", "true", "yes", "on"):
        return True
    import triton

    try:
        active = triton.runtime.driver.active.get_active_torch_device().type
    except RuntimeError:  # "0 active drivers": no GPU here
        return False
    return bool(active == device_type)
