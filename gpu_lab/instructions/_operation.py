"""The table of operations, and how one gets into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..ptx import Instruction

if TYPE_CHECKING:
    from ..machine import Machine

Active = np.ndarray | None
Operation = Callable[["Machine", Instruction, Active], None]
OPERATIONS: dict[str, Operation] = {}


def operation(names: str, modifiers: str = "") -> Callable[[Operation], Operation]:
    """Register an operation; an instruction with a modifier that is not listed is an error."""
    known = set(modifiers.split())

    def register(function: Operation) -> Operation:
        def checked(m: Machine, i: Instruction, active: Active) -> None:
            if unknown := set(i.parts[1:-1]) - known:
                raise NotImplementedError(f"unknown .{min(unknown)} in: {i.text}")
            function(m, i, active)

        OPERATIONS.update(dict.fromkeys(names.split(), checked))
        return function

    return register
