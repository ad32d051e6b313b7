"""Launching a kernel that was launched before, without asking anew what has been answered.

`kernel[grid](...)` of Triton binds, specialises and looks up with Python code of its own at each
call: 25 us and more with a stage's arguments, as long as a small batch takes on the GPU. All that
its answer depends on here is in one key.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

_compiled: dict[tuple[Any, ...], CompiledKernel] = {}


def launch(
    kernel: Any,
    num_programs: int,
    tensors: Sequence[Tensor | None],
    sizes: Sequence[int],
    numbers: Sequence[float],
    constants: dict[str, Any],
) -> None:
    """Run `num_programs` of a kernel on the current device.

    Its parameters are, in this order, those of tensors, of sizes, none of which it specialises
    (`do_not_specialize`), of numbers, and of constants (`tl.constexpr`). After these constants may
    have Triton's own options, such as num_warps.
    """
    grid = (num_programs, 1, 1)
    arguments = (*tensors, *sizes, *numbers)
    if not isinstance(kernel, triton.JITFunction):  # interpreted
        kernel[grid](*arguments, **constants)
        return
    driver = triton.runtime.driver.active
    values = tuple(constants.values())
    key = (
        kernel.fn,  # a JITFunction's own hash is slow
        driver,
        driver.get_current_device(),
        *[None if x is None else (x.dtype, x.data_ptr() % 16 == 0) for x in tensors],
        *[-(1 << 31) <= size < 1 << 31 for size in sizes],  # else int64
        torch.version.hip and tuple(x is None or _is_within_2_gib(x) for x in tensors),
        values,
    )
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[grid](*arguments, *values[: len(kernel.arg_names) - len(arguments)])
        return
    # Fusing products into sums is Triton's default to 3.9. Rounding that matters is in _float32.
    compiled = kernel[grid](*arguments, **constants, enable_fp_fusion=True)
    if isinstance(compiled, CompiledKernel):  # not where a hook of Triton's took it, or a thread
        _compiled[key] = compiled


def _is_within_2_gib(tensor: Tensor) -> bool:
    """Which accesses AMD's backend can make depends on it."""
    return tensor.untyped_storage().size() < 2**31
