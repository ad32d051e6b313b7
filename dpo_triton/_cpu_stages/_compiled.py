"""How functions are compiled, and where that is kept: by numba, at the first call for its types."""

import hashlib
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache

# numba's cache looks for changes in the file of a function alone, but it calls those of the others.
DIGEST = hashlib.sha256(
    b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
).hexdigest()

# What loops alone call: without the wrappers for Python, a third of the time to compile.
inner = partial(njit, no_cpython_wrapper=True, no_cfunc_wrapper=True)


class _Cache(FunctionCache):  # type: ignore[misc]
    def _index_key(self, *inputs: Any) -> Any:
        return *super()._index_key(*inputs), DIGEST


def compiled(function: Callable[..., Any]) -> Any:
    """A loop, to be called from Python: without the GIL, and kept on disk."""
    dispatcher = njit(function, nogil=True, error_model="numpy", no_cfunc_wrapper=True)
    try:
        dispatcher._cache = _Cache(function)
    except RuntimeError:
        warnings.warn(
            "dpo_triton: numba finds no folder to keep compiled code in, so every process compiles "
            "anew, for seconds; set NUMBA_CACHE_DIR to a folder that can be written to",
            stacklevel=2,
        )
    return dispatcher
