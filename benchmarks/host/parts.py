"""Where a call's host time goes, by the files and functions in which it is spent."""

import cProfile
import pstats
import time
from collections.abc import Callable

# Part -> what is in the path of a file, or in the name of a built-in function; the first that fits.
PARTS = {
    "launches": ("/triton/", "/gpu_lab/"),
    "checks": ("/dpo_triton/_checks",),
    "autograd": ("/torch/autograd/", "run_backward", "method apply of"),
    "operator wrappers": ("/torch/_ops", "/torch/_library/", "/torch/_compile", "/torch/_dynamo/"),
    "allocations": ("empty", "zeros"),
    "other Python": (".py",),
    "PyTorch's own": ("",),
}


def shares(fn: Callable[[], object], calls: int) -> dict[str, float]:
    """Return part -> share of the time of fn, by a profile of some calls.

    A profile makes Python functions slower than built-in ones: shares of it, not times, are told.
    On a GPU the backward pass runs in a thread of its own, which no profile sees.
    """
    profile = cProfile.Profile(time.process_time)
    profile.enable()
    for _ in range(calls):
        fn()
    profile.disable()
    seconds = dict.fromkeys(PARTS, 0.0)
    for (file, _, name), (_, _, own, *_) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        where = name if file == "~" else file
        part = next(part for part, texts in PARTS.items() if any(text in where for text in texts))
        seconds[part] += own
    total = sum(seconds.values())
    return {part: each / total for part, each in seconds.items()}
