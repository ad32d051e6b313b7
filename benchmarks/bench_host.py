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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # read when triton is imported: interpreted code has no launch

import torch

if not __package__:  # a script: the checkout's packages, and none of benchmarks/ at the top level
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.common import command, measure, report
from benchmarks.common.peers import OURS, Peer, collect
from benchmarks.common.report import BACKWARD, COLOURS, FORWARD, Columns
from benchmarks.host import counts
from benchmarks.host.parts import PARTS, shares
from benchmarks.vocab.peers import LIGER, LOG_SOFTMAX, TRL_KERNEL, candidates
from gpu_lab.driver import Lab, emulate

TARGET = "sm_90"
SHAPE = (4, 8, 128)  # B, T, V
NAMES = (OURS, TRL_KERNEL, LIGER, LOG_SOFTMAX)
PASSES = (FORWARD, BACKWARD)
PROFILED = 50  # calls
HEAD = dict(hidden_size=16, vocab_size=151936)
NOTES = """\
us: of the process's processor time, which other processes disturb little; median of samples, each
  the mean of {calls} calls; p20 - p80 of the samples. of TRL: the median of the ratios, sample by
  sample. The parts are shares of a profile of {profiled} calls, in us: launches are all of Triton's
  and the driver's Python. log_softmax is the formula this project began with."""


@dataclass(frozen=True)
class Row:
    impl: str
    passes: str
    us: float  # median
    us_p20: float
    us_p80: float
    samples: int
    of_trl: float | None  # median of the ratios to TRL's kernel with its masked mean
    launches: int  # of Triton kernels in a call
    launches_us: float
    checks_us: float
    autograd_us: float
    operator_wrappers_us: float
    allocations_us: float
    other_python_us: float
    pytorch_us: float


PART_FIELDS = dict(zip(PARTS, list(Row.__dataclass_fields__)[-len(PARTS) :], strict=True))
COLUMNS = Columns(
    2,
    {
        "implementation": lambda row: row.impl,
        "pass": lambda row: row.passes,
        "us": lambda row: f"{row.us:.1f}",
        "p20 - p80": lambda row: f"{row.us_p20:.1f} - {row.us_p80:.1f}",
        "of TRL": lambda row: report.optional("{:.2f}x", row.of_trl),
        "launched": lambda row: str(row.launches),
        **{
            part: lambda row, name=name: f"{getattr(row, name):.1f}"
            for part, name in PART_FIELDS.items()
        },
    },
)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    command.require_bench_extra(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = measure.machine_name(device)
    with driver(device) as lab:
        wanted = [p for p in candidates(torch.device("cuda"), "triton") if p.name in NAMES]
        runnable, not_run = collect(wanted)
        run = dict(
            machine=machine,
            driver="a GPU" if device.type == "cuda" else f"stand-in, {TARGET}, nothing executed",
            **command.versions("torch", "triton", "trl", "liger-kernel"),
            command=command.command_line("bench_host", argv),
        )
        command.announce(run, {peer.name: peer.description for peer in runnable})
        others = measure.OtherLoad()
        rows = measure_all(runnable, device, lab, args.samples, args.calls)
        # The head is counted, not timed, and on CPU tensors: where nothing is executed.
        no_head = args.no_head or device.type == "cuda"
        head_rows = [] if no_head else counts.count(lab, args.tokens, backend="triton", **HEAD)
    command.print_not_run(not_run)
    print("\n" + COLUMNS.table(rows, lambda row: row.passes))
    print("\n" + NOTES.format(calls=args.calls, profiled=PROFILED))
    print(f"other processes: {others.share():.0%} of the cores while this ran")
    stem = report.file_stem(machine)
    whole = command.is_whole(args, parse_args([]), "samples", "calls", "tokens", "no_head")
    csv, png = command.output_paths(args, f"host-{stem}", whole)
    report.write_csv(csv, rows, run)
    print(f"\nrows: {csv}")
    if head_rows:
        print(
            f"\nthe head: {args.tokens} tokens, {HEAD}; operators and launches that are started\n"
        )
        print(counts.COLUMNS.table(head_rows))
    if png is not None:
        plot(png, rows, machine)
        print(f"plot: {png}")
    return 0


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


def measure_all(
    peers: list[Peer], device: torch.device, lab: Lab, samples: int, calls: int
) -> list[Row]:
    """Time each pass of all peers in turns, then profile it."""
    logits = torch.zeros(SHAPE, dtype=torch.bfloat16, device=device)
    labels = torch.zeros(SHAPE[:2], dtype=torch.int64, device=device)
    mask = torch.ones_like(labels)

    def call(peer: Peer, passes: str) -> Callable[[], object]:
        if passes == FORWARD:
            return torch.no_grad()(lambda: peer.fn(logits, labels, mask))
        leaf = logits.clone().requires_grad_()
        ones = torch.ones(SHAPE[0], device=device)
        return lambda: torch.autograd.grad(peer.fn(leaf, labels, mask), leaf, ones)

    def sample(fn: Callable[[], object]) -> float:
        lab.records.clear()  # they hold tensors
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.process_time()
        for _ in range(calls):
            fn()
        return 1e6 * (time.process_time() - start) / calls

    rows = []
    for passes in PASSES:
        fns = {peer.name: call(peer, passes) for peer in peers}
        launches = {}
        for name, fn in fns.items():
            fn()  # compiles
            lab.records.clear()
            fn()
            launches[name] = len(lab.records)
        us: dict[str, list[float]] = {name: [] for name in fns}
        for turn in range(samples):
            names = list(fns)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                us[name].append(sample(fns[name]))
        for name, fn in fns.items():
            mine, theirs = us[name], us.get(TRL_KERNEL)
            ratios = [a / b for a, b in zip(mine, theirs, strict=True)] if theirs else []
            median = statistics.median(mine)
            parts = {PART_FIELDS[part]: s * median for part, s in shares(fn, PROFILED).items()}
            lab.records.clear()
            rows.append(
                Row(
                    impl=name,
                    passes=passes,
                    us=median,
                    us_p20=statistics.quantiles(mine, n=5)[0],
                    us_p80=statistics.quantiles(mine, n=5)[-1],
                    samples=samples,
                    of_trl=statistics.median(ratios) if ratios else None,
                    launches=launches[name],
                    **parts,
                )
            )
    return rows


def plot(path: Path, rows: list[Row], machine: str) -> None:
    """Draw a bar for each implementation and pass, of its parts."""
    names = [f"{row.impl}\n{row.passes}" for row in rows]
    left = [0.0] * len(rows)
    with report.drawing(path, f"host time of a call\n{machine}", figsize=(10, 5)) as (figure, axes):
        for i, (part, name) in enumerate(PART_FIELDS.items()):
            widths = [getattr(row, name) for row in rows]
            colour = COLOURS[i] if i < len(COLOURS) else f"C{i}"
            axes[0].barh(names, widths, left=left, label=part, color=colour)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes[0].invert_yaxis()
        axes[0].set_xlabel("us of a call, parts by a profile")
        figure.legend(loc="outside lower center", ncols=4, fontsize="small")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = command.parser("Microseconds that calls cost on the host, by part.", seed=0)
    parser.add_argument("--samples", type=int, default=40, help="of each implementation and pass")
    parser.add_argument("--calls", type=int, default=20, help="of a sample")
    parser.add_argument("--tokens", type=int, default=1024, help="of the head that is counted")
    parser.add_argument("--no-head", action="store_true", help="count no operators of the head")
    args = command.check(parser.parse_args(argv), parser)
    if min(args.samples, args.calls) < 2 or args.tokens < 2:
        parser.error("--samples, --calls and --tokens must be 2 or more")
    return args


if __name__ == "__main__":
    sys.exit(main())
