"""A stand-in for Triton's GPU driver: kernels compile for a GPU and run, emulated, on CPU tensors.

    with emulate("sm_90") as lab:
        my_kernel[grid](x, y, n, BLOCK=1024)   # CPU tensors
    lab.launches        # what each launch executed

`kernel[grid](...)` goes through Triton's own JIT: its specialisation, its compiler, its launch.
Only the driver is replaced. TRITON_INTERPRET must not be set when the kernels are imported.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from . import machine, ptx
from .machine import Counts, Schedule

_device_ids = itertools.count(1000)  # the JIT keeps compiled kernels by device
_drivers: dict[str, "EmulatedDriver"] = {}


class Kernel(NamedTuple):
    """A kernel that the JIT compiled: one for each specialisation."""

    name: str
    metadata: Any  # Triton's: num_warps, shared, target, ...
    asm: dict[str, Path]  # "ptx", "cubin", "amdgcn", ... -> file
    constants: dict[str, Any]  # tl.constexpr parameters, of the source and specialised
    signature: dict[str, str]  # parameter -> type, "constexpr" of a constant


class Launch(NamedTuple):
    """One launch, and what it executed where it ran."""

    kernel: Kernel
    grid: tuple[int, int, int]
    values: tuple[Any, ...]  # of all parameters
    counts: Counts | None  # None: it was not run

    @property
    def arguments(self) -> dict[str, Any]:
        """By the parameter's name, without tl.constexpr."""
        given = zip(self.kernel.signature.items(), self.values, strict=True)
        return {name: value for (name, kind), value in given if kind != "constexpr"}

    @property
    def largest(self) -> int:
        """Elements of the largest tensor that it was given."""
        return max((x.numel() for x in self.arguments.values() if hasattr(x, "numel")), default=0)


class Lab:
    """What a driver saw while it was active."""

    def __init__(self, runs: Callable[[Launch], bool], follows_chains: bool) -> None:
        self.runs, self.follows_chains = runs, follows_chains
        self.kernels: list[Kernel] = []  # loaded here for the first time
        self.records: list[Launch] = []

    @property
    def launches(self) -> list[Counts]:
        """What each launch that ran executed."""
        return [launch.counts for launch in self.records if launch.counts is not None]

    @property
    def launched(self) -> list[Kernel]:
        """The kernel of each launch, of AMD targets too."""
        return [launch.kernel for launch in self.records]


class _Launcher:
    """Runs one compiled kernel; Triton calls it with the grid and the kernel's arguments."""

    def __init__(self, driver: "EmulatedDriver", source: Any, metadata: Any) -> None:
        self.driver = driver
        names = source.fn.arg_names
        self.signature = {name: source.signature[name] for name in names}
        self.constants = {names[path[0]]: x for path, x in source.constants.items()}
        self.metadata = metadata
        self.program: ptx.Program | None = None  # None for an AMD GPU
        self.kernel: Kernel

    def __call__(self, grid_x: int, grid_y: int, grid_z: int, *rest: Any) -> None:
        # Little is done here of what nobody may ask for: this stands in for a launcher in C.
        lab, grid = self.driver.lab, (grid_x, grid_y, grid_z)
        launch = Launch(self.kernel, grid, rest[-len(self.signature) :], None)
        if self.program is not None and self.driver.schedule is not None and lab.runs(launch):
            values, shared = list(launch.arguments.values()), self.metadata.shared
            counts = machine.run(
                self.program, grid, values, shared, self.driver.schedule,
                follows_chains=lab.follows_chains,
            )  # fmt: skip
            launch = launch._replace(counts=counts)
        lab.records.append(launch)


class EmulatedDriver(DriverBase):
    """Answers what the JIT asks of a driver, for one target."""

    def __init__(self, target: str) -> None:
        self.target = _gpu_target(target)
        self.device = next(_device_ids)
        self.utils = self
        self.schedule: Schedule | None = "lockstep"
        self.lab: Lab
        self.launcher: _Launcher

    def launcher_cls(self, source: Any, metadata: Any) -> _Launcher:
        self.launcher = _Launcher(self, source, metadata)
        return self.launcher

    def take_files(self, module: Any, function: Any, name: str, files: Any, key: str) -> None:
        """Triton's hook between launcher_cls and load_binary, which tells where the PTX is."""
        asm = {Path(file).suffix[1:]: Path(file) for file in files.values()}
        launcher = self.launcher
        launcher.kernel = Kernel(
            name, launcher.metadata, asm, launcher.constants, launcher.signature
        )
        self.lab.kernels.append(launcher.kernel)
        if "ptx" in asm:
            launcher.program = ptx.parse(asm["ptx"].read_text())

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """Return module, function, registers, spills, and the most threads of a block."""
        return name, name, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return dict(max_shared_mem=227 << 10, multiprocessor_count=132, warpSize=32)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing can be timed here")


def _gpu_target(name: str) -> GPUTarget:
    """Triton's own name for "sm_90" or "gfx942"."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)


@contextlib.contextmanager
def emulate(
    target: str,
    schedule: Schedule | None = "lockstep",
    runs: Callable[[Launch], bool] = lambda launch: True,
    follows_chains: bool = False,
) -> Iterator[Lab]:
    """Make kernels compile for `target` and run on CPU tensors.

    With schedule None, and for an AMD target, they only compile: outputs stay unwritten. So do
    those of a launch that `runs` says no to, which may write them itself. With follows_chains the
    counts have the longest chain of dependent instructions.
    """
    driver = _drivers.setdefault(target, EmulatedDriver(target))
    driver.schedule, driver.lab = schedule, Lab(runs, follows_chains)
    hooks = triton.knobs.runtime.kernel_load_start_hook
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    hooks.add(driver.take_files)
    try:
        yield driver.lab
    finally:
        hooks.remove(driver.take_files)
        triton.runtime.driver._active = before
