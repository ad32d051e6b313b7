"""The three stages as one value, and the one place that asks which of them can run on a device."""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

BackendName = Literal["auto", "triton", "torch"]


class Backend(NamedTuple):
    """Three stage functions with the arguments and results of the operators in `_ops`."""

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
    """Return the backend for tensors on `device`; "auto" is Triton on a GPU and PyTorch elsewhere.

    Raises:
        ModuleNotFoundError: Triton is asked for, or is what "auto" means here, and is not
        installed.
        RuntimeError: Triton is asked for and nothing can run its kernels on tensors of `device`.
        TypeError: Triton and float64.
    """
    if name == "auto":
        name = "triton" if device.type == "cuda" else "torch"
    if name == "torch":
        return _torch_backend()
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

    return Backend(stages.partials, stages.combine, stages.grad, stages.num_splits, True)


@functools.cache
def _triton_backend() -> Backend:
    if importlib.util.find_spec(".kernels", __package__) is None:
        raise ModuleNotFoundError(
            f"{os.path.join(os.path.dirname(__file__), 'kernels')} is a link to the kernels, and "
            "this is a copy without symbolic links (a zip, or git on Windows); run `pip install .` "
            'in it, which needs no links, or pass backend="torch"'
        )
    from . import kernels as stages

    return Backend(stages.partials, stages.combine, stages.grad, stages.num_splits, False)


def _triton_serves(device_type: str, interpret: str) -> bool:
    if interpret.lower() in ("1", "true", "yes", "on"):
        return True
    import triton

    try:
        active = triton.runtime.driver.active.get_active_torch_device().type
    except RuntimeError:  # "0 active drivers": no GPU here
        return False
    return bool(active == device_type)
