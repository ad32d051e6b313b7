"""What tests of the benchmarks share."""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.common import measure


@pytest.fixture
def quiet_machine() -> Iterator[None]:
    """One thread, since busy cores make thousands of tiny operations wait; and glibc's own rule."""
    pytest.importorskip("tqdm")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    measure.map_buffers(2**25)  # where glibc's own rule ends


@pytest.fixture
def quick_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real measure of memory, which has a test of its own, collects garbage each time."""

    def peak_mib(fn: Callable[[], object], device: torch.device) -> float:
        fn()
        return 1.0

    monkeypatch.setattr(measure, "peak_mib", peak_mib)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
