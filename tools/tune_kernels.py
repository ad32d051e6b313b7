"""The search that chose the launch settings; `python tools/tune_kernels.py --help`.

Each kernel that walks the vocabulary is compiled with every tile and number of threads, and counted
as in bench_kernels; on a GPU it is timed as well. Nothing is tuned at run time: the settings that
win here are written into `launch_config` of kernels/partials.py and kernels/grad.py.
"""

import argparse
import contextlib
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"  # read when triton is imported: interpreted code has no PTX

import torch

if not __package__:  # a script: the checkout's packages, and none of benchmarks/ at the top level
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.common import command
from benchmarks.common.batches import Shape
from benchmarks.common.logits_peers import kernels, module
from benchmarks.common.peers import Peer
from benchmarks.common.report import BACKWARD, FORWARD, Figures, aligned
from benchmarks.kernel.cases import ALL, complaint, make_inputs
from benchmarks.kernel.counts import count
from benchmarks.kernel.figures import modelled
from benchmarks.kernel.tables import BINDING, TIME
from gpu_lab import model
from gpu_lab.devices import DEVICES
from gpu_lab.driver import emulate

KERNELS = "dpo_triton.kernels"
PASSES = {"partials": FORWARD, "grad": BACKWARD}
BLOCKS, THREADS = (512, 1024, 2048, 4096), (32, 64, 128, 256)
QUICK_BLOCKS, QUICK_THREADS = (1024, 2048), (64,)
BATCH, SEQ_LEN = 1, 2
GPU_ROWS = 4096
RESOURCES = ("memory", "issue slots", *model.RESOURCES.values())
NOTES = """
exp2, PTX: executed in the emulator, per logit. SASS: of the loop's shortest way round, per logit.
modelled: ms for 8192 rows, the resource that binds, and the share of that time of the next one."""


class Setting(NamedTuple):
    """Of one kernel."""

    block: int  # columns of a tile
    threads: int  # of a program


def main(argv: list[str] | None = None) -> int:
    """Print the table of each kernel on each target; return 1 if a setting gives wrong results."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    command.require("tqdm")
    from tqdm import tqdm

    blocks, threads = (QUICK_BLOCKS, QUICK_THREADS) if args.quick else (BLOCKS, THREADS)
    dtype = getattr(torch, args.dtype)
    wrong: list[str] = []
    for target in args.target:
        for kernel, passes in PASSES.items():
            with emulate(target):
                chosen, vec = chosen_setting(kernel, args.vocab, dtype)
            settings = sorted({Setting(b, t) for b in blocks for t in threads} | {chosen})
            settings = [s for s in settings if s.block % (s.threads * vec) == 0]
            devices = [d.name for d in DEVICES if d.target == target]
            lines = [headings(devices)]
            for setting in tqdm(settings, desc=f"{kernel}, {target}", leave=False):
                cells, error = try_setting(kernel, setting, args.vocab, dtype, target, devices)
                lines.append([*cells, "chosen" if setting == chosen else ""])
                if error is not None:
                    wrong.append(f"{kernel} {setting} {target}: {error}")
            print(f"\n{kernel}, {passes}; {target}, V = {args.vocab}, {args.dtype}\n")
            print(aligned(lines, 0))
    print(NOTES)
    if wrong:
        print("wrong results:", *wrong, sep="\n  ", file=sys.stderr)
    return bool(wrong)


def headings(devices: list[str]) -> list[str]:
    timed = ["measured ms"] if has_gpu() else []
    return [
        *("BLOCK_V", "THREADS", "warps", "logits/thread", "regs", "spills", "occ", "exp2", "PTX"),
        *("SASS", *(f"modelled ms, {name}" for name in devices), *timed, ""),
    ]


def try_setting(
    kernel: str, setting: Setting, vocab_size: int, dtype: torch.dtype, target: str,
    devices: list[str],
) -> tuple[list[str], str | None]:  # fmt: skip
    """Return the cells of its line, and what is wrong with its results, or None."""
    passes = PASSES[kernel]
    peer = kernels()[0]  # this package
    logits = torch.randn(BATCH, SEQ_LEN, vocab_size).mul_(3).to(dtype)
    inputs = make_inputs(logits, torch.randint(vocab_size, (BATCH, SEQ_LEN)), ALL)
    with launched_with(kernel, setting):
        counted = count(peer, inputs, target)
        loop = counted.loops()[passes]
        measured = [f"{measure_ms(peer, passes, vocab_size, dtype):.3f}"] if has_gpu() else []
    rows = modelled(peer.name, inputs, counted.work, {target: {passes: loop}})
    work, code = counted.work[passes], loop.codegen
    times = []
    for device in devices:
        key = dict(passes=passes, where=device)
        ms, (resource, next_ms) = rows.value(TIME, **key), next_resource(rows, **key)
        times.append(f"{ms:.3f} {rows.value(BINDING, **key)}, {resource} {next_ms / ms:.0%}")
    cells = [
        *(str(setting.block), str(setting.threads), str(code.num_warps)),
        *(str(setting.block // setting.threads), str(code.registers), str(code.spills)),
        f"{code.occupancy:.0%}",
        f"{work.exp2 / logits.numel():.3f}",
        f"{work.instructions / logits.numel():.2f}",
        f"{loop.instructions('shortest'):.2f}",
    ]
    return [*cells, *times, *measured], complaint(peer, inputs, counted.values, counted.grad)


def next_resource(rows: Figures, **where: str) -> tuple[str, float]:
    """Return what takes a kernel longest but for what binds it, and its modelled time in ms."""
    binding = rows.value(BINDING, **where)
    times = {name: rows.value(f"{TIME} of {name} in the kernel", **where) for name in RESOURCES}
    others = {name: ms for name, ms in times.items() if ms is not None and name != binding}
    longest = max(others, key=lambda name: float(others[name]))
    return longest, float(others[longest])


def chosen_setting(kernel: str, vocab_size: int, dtype: torch.dtype) -> tuple[Setting, int]:
    """What the launcher chooses, and the neighbouring logits of its accesses."""
    logits, tiles = torch.empty((1, 1, vocab_size), dtype=dtype), module(f"{KERNELS}._tiles")
    launcher = module(f"{KERNELS}.{kernel}")
    vec, target = tiles.vector_width(logits), tiles.gpu_target(logits)
    config = launcher.launch_config(vec, False, target)
    return Setting(config["BLOCK_V"], config["THREADS"]), config["VEC"]


@contextlib.contextmanager
def launched_with(kernel: str, setting: Setting) -> Iterator[None]:
    """Have the kernel's launcher use a setting."""
    launcher = module(f"{KERNELS}.{kernel}")
    choose, kept = launcher.launch_config, launcher._constants

    def launch_config(*args: Any, **kwargs: Any) -> dict[str, int]:
        config = choose(*args, **kwargs)
        threads_of_warp = config["THREADS"] // config["num_warps"]
        warps = max(1, setting.threads // threads_of_warp)
        return config | dict(BLOCK_V=setting.block, THREADS=setting.threads, num_warps=warps)

    launcher.launch_config = launch_config
    kept.cache_clear()  # they hold what was chosen
    try:
        yield
    finally:
        launcher.launch_config = choose
        kept.cache_clear()


def has_gpu() -> bool:
    return torch.cuda.is_available()


def measure_ms(peer: Peer, passes: str, vocab_size: int, dtype: torch.dtype) -> float:
    """Median time of one pass over GPU_ROWS rows."""
    from benchmarks.common.measure import times_ms
    from benchmarks.kernel import measure

    logits, labels = measure.random_batch(Shape(4, GPU_ROWS // 4, vocab_size), dtype)
    fn = measure.timed(peer, make_inputs(logits, labels, ALL), passes)
    assert fn is not None
    return statistics.median(times_ms(fn, measure.DEVICE, min_run_s=0.1))


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tiles and threads of the kernels, compared.")
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument(
        "--target", nargs="+", choices=["sm_80", "sm_90", "sm_100"], default=["sm_90", "sm_100"]
    )
    parser.add_argument("--quick", action="store_true", help="a few settings")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
