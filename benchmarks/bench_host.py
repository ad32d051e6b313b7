"""Microseconds that calls cost on the host, by part; `python benchmarks/bench_host.py --help`.

Without a GPU kernels are compiled and not executed: a stand-in for Triton's driver takes their
launches. With one they are launched; nobody waits for it. What is timed is the processor time of
the process. Implementations take turns, sample by sample. Tensors are tiny, so that PyTorch's own
operators cost no more than their start.
"""

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import truediv
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # read when triton is imported: interpreted code has no launch

import torch

if not __package__:  # a script: the checkout's packages, and none of benchmarks/ at the top level
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.common import command, measure, report
from benchmarks.common.command import Run
from benchmarks.common.logits_peers import LIGER, LOG_SOFTMAX, TRL_KERNEL, candidates
from benchmarks.common.peers import OURS, Peer
from benchmarks.common.report import BOTH, FORWARD, shown
from benchmarks.head.peers import TRL
from benchmarks.head.peers import candidates as head_candidates
from benchmarks.host import counts
from benchmarks.host.parts import PARTS, shares
from gpu_lab.driver import Lab, emulate

TARGET = "sm_90"
SHAPE = (4, 8, 128)  # B, T, V
NAMES = (OURS, TRL_KERNEL, LIGER, LOG_SOFTMAX)
PASSES = (FORWARD, BOTH)
PROFILED = 50  # calls
HEAD = dict(hidden_size=16, vocab_size=151936)
NOTES = """\
us: of the process's processor time, which other processes disturb little; median of samples, each
  the mean of {calls} calls; p20 - p80 of the samples. of TRL: the median of the ratios, sample by
  sample. The parts are shares of a profile of {profiled} calls, in us: launches are all of Triton's
  and the driver's Python. log_softmax is the formula this project began with.
operators: of aten, views too. On a CPU TRL's head launches nothing of Triton's."""


@dataclass(frozen=True, kw_only=True)
class Row:
    impl: str = shown("implementation")
    passes: str = shown("pass")
    us: float = shown("us", "{:.1f}")  # median
    us_p20: float = shown("p20", "{:.1f}")
    us_p80: float = shown("p80", "{:.1f}")
    samples: int
    of_trl: float | None = shown("of TRL", "{:.2f}x")  # median of the ratios to TRL's kernel's
    launches: int = shown("launched")  # Triton kernels in a call
    launches_us: float = shown("launches", "{:.1f}")
    checks_us: float = shown("checks", "{:.1f}")
    autograd_us: float = shown("autograd", "{:.1f}")
    operator_wrappers_us: float = shown("operator wrappers", "{:.1f}")
    allocations_us: float = shown("allocations", "{:.1f}")
    other_python_us: float = shown("other Python", "{:.1f}")
    pytorch_us: float = shown("PyTorch's own", "{:.1f}")


PART_FIELDS = dict(zip(PARTS, list(Row.__dataclass_fields__)[-len(PARTS) :], strict=True))


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = Run("bench_host", parse_args, argv, device=device)
    args = run.args
    with driver(device) as lab:
        wanted = candidates(torch.device("cuda"), "triton")
        runnable = run.collect(peer for peer in wanted if peer.name in NAMES)
        run.announce(
            *("torch", "triton", "trl", "liger-kernel"),
            driver="a GPU" if device.type == "cuda" else f"stand-in, {TARGET}, nothing executed",
        )
        cases = [
            measure_pass(passes, runnable, device, lab, args.samples, args.calls)
            for passes in PASSES
        ]
        head_rows: list[counts.Count] = []
        if not args.no_head and device.type == "cpu":  # counted on CPU tensors, not timed
            heads = run.collect(p for p in head_candidates("triton") if p.name in (OURS, TRL))
            head_rows = counts.count(lab, heads, args.tokens, **HEAD)
    print("\n" + report.table(*cases))
    run.conclude(NOTES.format(calls=args.calls, profiled=PROFILED))
    if head_rows:
        what = "operators and launches that are started"
        print(f"the head: {args.tokens} tokens, {HEAD}; {what}\n\n{report.table(head_rows)}\n")
        run.judge("the head", [*counts.judge(head_rows)], "a head")
    rows = [row for case in cases for row in case]
    name = f"host-{report.file_stem(run.machine)}"
    return run.write(name, rows, {"": plot}, {"-head": head_rows})


@contextlib.contextmanager
def driver(device: torch.device) -> Iterator[Lab]:
    """Triton's own driver where there is a GPU, and the stand-in elsewhere; both note launches."""
    if device.type == "cuda":
        import triton

        lab = Lab(lambda launch: False, follows_chains=False)
        triton.knobs.runtime.launch_enter_hook.add(lab.records.append)
        yield lab
    else:
        with emulate(TARGET, schedule=None) as lab:
            yield lab


def measure_pass(
    passes: str, peers: list[Peer], device: torch.device, lab: Lab, samples: int, calls: int
) -> list[Row]:
    """Time a pass of all peers in turns, then profile it."""
    logits = torch.zeros(SHAPE, dtype=torch.bfloat16, device=device)
    labels = torch.zeros(SHAPE[:2], dtype=torch.int64, device=device)
    mask, ones = torch.ones_like(labels), torch.ones(SHAPE[0], device=device)

    def call(peer: Peer) -> Callable[[], object]:
        if passes == FORWARD:
            return torch.no_grad()(lambda: peer.fn(logits, labels, mask))
        leaf = logits.clone().requires_grad_()
        return lambda: torch.autograd.grad(peer.fn(leaf, labels, mask), leaf, ones)

    def sample(fn: Callable[[], object]) -> float:
        lab.records.clear()  # they hold tensors
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.process_time()
        for _ in range(calls):
            fn()
        return 1e6 * (time.process_time() - start) / calls

    fns = {peer.name: call(peer) for peer in peers}
    launches = {}
    for name, fn in fns.items():
        fn()  # compiles
        lab.records.clear()
        fn()
        launches[name] = len(lab.records)
    us: dict[str, list[float]] = {name: [] for name in fns}
    for name in measure.turns(list(fns), samples):
        us[name].append(sample(fns[name]))
    theirs = us.get(TRL_KERNEL)
    rows = []
    for name, mine in us.items():
        median, fifths = statistics.median(mine), statistics.quantiles(mine, n=5)
        parts = shares(fns[name], PROFILED)
        lab.records.clear()
        rows.append(
            Row(
                impl=name,
                passes=passes,
                us=median,
                us_p20=fifths[0],
                us_p80=fifths[-1],
                samples=samples,
                of_trl=theirs and statistics.median(map(truediv, mine, theirs)),
                launches=launches[name],
                **{PART_FIELDS[part]: share * median for part, share in parts.items()},
            )
        )
    return rows


def plot(path: Path, rows: Sequence[Row], machine: str) -> None:
    """Draw a bar for each implementation and pass, of its parts."""
    names = [f"{row.impl}\n{row.passes}" for row in rows]
    parts = {part: [getattr(r, name) for r in rows] for part, name in PART_FIELDS.items()}
    title = f"host time of a call\n{machine}"
    report.draw_bars(path, title, names, parts, "us of a call, parts by a profile")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = command.parser("Microseconds that calls cost on the host, by part.", seed=0)
    parser.add_argument("--samples", type=int, default=40, help="of each implementation and pass")
    parser.add_argument("--calls", type=int, default=20, help="of a sample")
    parser.add_argument("--tokens", type=int, default=1024, help="of the head that is counted")
    parser.add_argument("--no-head", action="store_true", help="count no operators of the head")
    return command.check(parser.parse_args(argv), parser, samples=2, calls=2, tokens=2)


if __name__ == "__main__":
    sys.exit(main())
