"""Times, peak memory, copy speed, and the name of the machine that they belong to."""

import contextlib
import ctypes
import gc
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def times_ms(
    fn: Callable[[], object],
    device: torch.device,
    *,
    min_run_s: float,
    restore: Callable[[], None] | None = None,
) -> list[float]:
    """Return samples of the time of fn, in ms, that add up to min_run_s or more.

    restore, which is not timed, undoes what fn does to its inputs before each sample.
    """
    if device.type == "cuda":
        return _times_ms_cuda(fn, min_run_s, restore)
    timer = Timer(
        "fn()",
        setup="restore()" if restore else "pass",
        globals=dict(fn=fn, restore=restore),
        num_threads=torch.get_num_threads(),
    )
    if restore is None:
        return [1e3 * t for t in timer.blocked_autorange(min_run_time=min_run_s).times]
    samples: list[float] = []
    while sum(samples) < 1e3 * min_run_s:
        samples.append(1e3 * timer.timeit(1).times[0])  # one setup, one fn
    return samples


def _times_ms_cuda(
    fn: Callable[[], object], min_run_s: float, restore: Callable[[], None] | None
) -> list[float]:
    from triton.testing import do_bench

    if restore is None:
        return list(do_bench(fn, rep=int(1e3 * min_run_s), return_mode="all"))
    samples: list[float] = []
    while sum(samples) < 1e3 * min_run_s:
        restore()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        stop.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(stop))
    return samples


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
    with _separate_buffers():
        if not _reset_peak_rss():
            return None
        before = _status_mib("VmRSS")
        result = fn()
        del result
        return _status_mib("VmHWM") - before


@contextlib.contextmanager
def _separate_buffers() -> Iterator[None]:
    """Let glibc map each buffer by itself: what is free in the heap would hide what fn asks for."""
    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, 2**20)
    libc.malloc_trim(0)
    try:
        yield
    finally:  # where glibc's own rule ends up in a process that frees buffers of this size
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(M_TRIM_THRESHOLD, 2**26)


def _reset_peak_rss() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status_mib("VmHWM") < _status_mib("VmRSS") + 1
    except OSError:
        return False


def _status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 2**10
    raise OSError(f"/proc/self/status has no {field}")


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
    return 2 * source.nbytes / sorted(samples)[len(samples) // 2] / 1e6


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free on device, or 8 GiB where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 2**10
    return 2**33


def machine_name(device: torch.device) -> str:
    """Return such as "AMD EPYC, 2 threads, 23 GiB"."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    parts = [name, f"{torch.get_num_threads()} threads"]
    with contextlib.suppress(AttributeError, ValueError, OSError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        parts.append(f"{memory / 2**30:.0f} GiB")
    return ", ".join(parts)
