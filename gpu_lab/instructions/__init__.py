"""What each PTX instruction does (PTX ISA 9.1, chapter 9), for those that Triton's kernels need.

An operation gets the machine, the instruction and the active threads (None: all of them).
"""

from . import accesses, arithmetic, logic, moves, warps
from ._operation import OPERATIONS

__all__ = ["OPERATIONS", "accesses", "arithmetic", "logic", "moves", "warps"]
