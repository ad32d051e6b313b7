"""Times, peak memory, copy speed, and the name of the machine that they belong to."""

import contextlib
import ctypes
import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch.utils.benchmark import Timer

from benchmarks.common.report import BACKWARD, BOTH, FORWARD

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
PR_SET_THP_DISABLE = 41  # of Linux's prctl.h

# While a time is taken, smaller buffers may stay in the heap, as they do in any process: the one of
# dpo_triton, which does not grow with the batch, is among them.
HEAP_BYTES = 2**23
# A lone sample may have met a stall of the machine.
LEAST_SAMPLES = 3

T = TypeVar("T")


def turns(items: Sequence[T], rounds: int) -> Iterator[T]:
    """Yield all items in each round, each time in another order: threads of one implementation that
    spin for work slow the next one down."""
    for turn in range(rounds):
        first = turn % max(1, len(items))
        yield from (*items[first:], *items[:first])


@contextlib.contextmanager
def setting(threads: int, neighbours: int) -> Iterator[None]:
    """That many threads of PyTorch, beside that many processes which each keep a core busy."""
    before = torch.get_num_threads()
    # It ends with this process too, however that ends.
    loop = f"import os\nwhile os.getppid() == {os.getpid()}: pass"
    busy = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(neighbours)]
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        for process in busy:
            process.kill()
            process.wait()


def times_ms(
    fn: Callable[[], object],
    device: torch.device,
    *,
    min_run_s: float | None,
    restore: Callable[[], None] | None = None,
) -> list[float]:
    """Return samples of the time of fn, which has run before, in ms.

    Args:
        min_run_s: what they add up to, or more. None: one call, for those of a second, whose
            samples are taken in turns with those of others.
        restore: undoes what fn does to its inputs, before each sample, and is not timed.
    """

    def once() -> float:
        if device.type == "cuda":
            return _event_ms(fn)
        start = time.perf_counter()
        fn()
        return 1e3 * (time.perf_counter() - start)

    map_buffers(HEAP_BYTES)
    try:
        if min_run_s is None:
            return [once()]
        if restore is None:
            return _in_blocks_ms(fn, device, min_run_s)
        samples: list[float] = []
        while len(samples) < LEAST_SAMPLES or sum(samples) < 1e3 * min_run_s:
            restore()
            samples.append(once())
        return samples
    finally:
        map_buffers()


def _in_blocks_ms(fn: Callable[[], object], device: torch.device, min_run_s: float) -> list[float]:
    """Samples of as many calls each as the clock can tell."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return list(do_bench(fn, rep=int(1e3 * min_run_s), return_mode="all"))
    timer = Timer("fn()", globals=dict(fn=fn), num_threads=torch.get_num_threads())
    times = list(timer.blocked_autorange(min_run_time=min_run_s).times)
    while len(times) < LEAST_SAMPLES:
        times += timer.timeit(1).times
    return [1e3 * t for t in times]


def _event_ms(fn: Callable[[], object]) -> float:
    """One call's time between two events on the GPU, which is idle before."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    fn()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop))


def peak_mib(fn: Callable[[], object], device: torch.device) -> float | None:
    """Return the most that a call of fn, which has run before, holds above what is there, in MiB.

    Its result counts. On a CPU it is the resident size, so that pages that nobody touched do not
    count; None where the kernel keeps no such record, as outside of Linux.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = fn()
        torch.cuda.synchronize()
        del result
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with _no_huge_pages():
        if not _reset_peak_rss():
            return None
        before = _status_mib("VmRSS")
        result = fn()
        del result
        return _status_mib("VmHWM") - before


@contextlib.contextmanager
def _no_huge_pages() -> Iterator[None]:
    """Have the resident size follow what is touched: huge pages would round it up to 2 MiB."""
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.malloc_trim(0)
    libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0)


def map_buffers(num_bytes: int = 2**20) -> None:
    """Have glibc take buffers of num_bytes or more from the operating system each time.

    By itself it does so from 32 MiB on, which batches of everyday size are far beyond. Below that,
    or where its heap has a hole that happens to fit, it hands out pages used before: what allocates
    most then takes up to six times less, in one case and not in the next.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(M_MMAP_THRESHOLD, num_bytes)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * num_bytes)  # glibc's own ratio
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def _reset_peak_rss() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status_mib("VmHWM") < _status_mib("VmRSS") + 1
    except OSError:
        return False


def _status_mib(field: str) -> float:
    return int(_proc("self/status", field).split()[0]) / 2**10


def _proc(file: str, field: str) -> str:
    """What a file of /proc says of a field; OSError where it says nothing."""
    for line in Path("/proc", file).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    raise OSError(f"/proc/{file} has no {field}")


class OtherLoad:
    """What other processes use of the cores, since this was made."""

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Core seconds: of all processes, of this one and its children, and that there were."""
        try:
            ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        except OSError:
            return 0.0, 0.0, 0.0
        seconds = [tick / os.sysconf("SC_CLK_TCK") for tick in ticks]
        idle = seconds[3] + seconds[4]  # and waiting for a disk
        return sum(seconds) - idle, sum(os.times()[:4]), sum(seconds)

    def share(self) -> float:
        """Return the part of all cores that others used, 0 where nobody tells."""
        busy, own, total = (x - y for x, y in zip(self._now(), self.start, strict=True))
        return max(0.0, busy - own) / total if total > 0 else 0.0


def copy_gb_per_s(device: torch.device, *, numel: int, min_run_s: float) -> float:
    """Return the speed of copying numel float32 numbers: GB read plus GB written, per second."""
    source = torch.ones(numel, device=device)
    target = torch.ones_like(source)
    samples = times_ms(lambda: target.copy_(source), device, min_run_s=min_run_s)
    return 2 * source.nbytes / statistics.median(samples) / 1e6


def least_bytes(num_logits: float, num_scored: float, itemsize: int) -> dict[str, float]:
    """Bytes that have to move, by pass: each reads the scored logits once, and the gradient is
    written whole."""
    read, written = itemsize * num_scored, itemsize * num_logits
    return {FORWARD: read, BACKWARD: read + written, BOTH: 2 * read + written}


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free on device, or 8 GiB where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError):
        return int(_proc("meminfo", "MemAvailable").split()[0]) * 2**10
    return 2**33


def machine_name(device: torch.device) -> str:
    """Return such as "AMD EPYC, 2 threads, 23 GiB"."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        name = _proc("cpuinfo", "model name")
    parts = [name, f"{torch.get_num_threads()} threads"]
    with contextlib.suppress(AttributeError, ValueError, OSError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        parts.append(f"{memory / 2**30:.0f} GiB")
    return ", ".join(parts)
