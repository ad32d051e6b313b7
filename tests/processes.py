"""Real processes over gloo: a function is run in each, and what it returns comes back by rank."""

import datetime
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from head_batches import TILE_V

TIMEOUT = datetime.timedelta(minutes=5)  # ranks that compile wait for each other


def run_processes(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Return [function(*args) in rank 0, in rank 1, ...], its tensors on the CPU; an exception in
    one is raised here.

    function is importable (a module's own), and may use torch.distributed at once. Ranks share the
    GPUs that there are: over gloo several may have one.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run, (function, world_size, folder, args), nprocs=world_size)
        return [
            torch.load(Path(folder) / f"{rank}.pt", map_location="cpu")
            for rank in range(world_size)
        ]


def with_narrow_tiles(set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """A GPU's tiles are so wide that a vocabulary of several would take the interpreter minutes."""
    from dpo_triton import _backends

    narrow = _backends._triton_backend()._replace(tile_width=TILE_V)
    set_attribute(_backends, "_triton_backend", lambda: narrow)


def _run(
    rank: int, function: Callable[..., Any], world_size: int, folder: str, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    gpu = rank % max(1, torch.cuda.device_count())
    if torch.cuda.is_available():
        torch.cuda.set_device(gpu)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(gpu))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
    )
    torch.save(function(*args), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
