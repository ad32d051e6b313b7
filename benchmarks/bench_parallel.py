"""A head whose vocabulary is sharded: real processes for errors and bytes, a model for GPUs.

`python benchmarks/bench_parallel.py --help`. Processes talk over gloo on this machine: what they
compute and send is measured and counted, their time says nothing of GPUs. Times, memory and bytes
over 1 to 64 GPUs are modelled.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

if not __package__:  # a script: the checkout's packages, and none of benchmarks/ at the top level
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # their processes

from processes import run_processes

from benchmarks.common import command
from benchmarks.common.command import Run
from benchmarks.common.report import BOTH, Figure, Figures, Line, draw_lines, drawing
from benchmarks.parallel import ways
from benchmarks.parallel.model import GPUS_OF_A_MACHINE, Step, cost, seconds

GPUS = (1, 2, 4, 8, 16, 32, 64)
NAMES = list(ways.WAYS)
# Nats: products rounded to bfloat16 put logits of spread 3 off by up to 0.03 each.
ALLOWED = 0.02


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    run = Run("bench_parallel", parse_args, argv)
    args = run.args
    batch = ways.Batch(4, args.tokens, 64, args.vocab, 0.5, args.seed)
    run.descriptions |= ways.DESCRIPTIONS
    run.announce(
        "torch",
        vocab_size=args.vocab,
        tokens=batch.batch * batch.seq_len,
        hidden_size=batch.hidden_size,
        modelled_step=Step(),
    )
    rows = Figures()
    wrong: list[str] = []
    for size in args.processes:
        ranks = run_processes(ways.measure, size, batch, NAMES)
        for name in NAMES:
            of_ranks = [rank[name] for rank in ranks]
            rows += measured_rows(name, size, of_ranks)
            if not all(torch.equal(x["values"], of_ranks[0]["values"]) for x in of_ranks):
                wrong.append(f"{name}: ranks of {size} have other bits")
            if max(x["error"] for x in of_ranks) > ALLOWED:
                wrong.append(f"{name}, {size} processes: error {of_ranks[0]['error']:.2g}")
    if wrong:
        return run.refuse(wrong, "nothing is reported")
    rows += modelled_rows()
    print(f"\n{table(rows, args.processes, MEASURED)}")
    print(f"\nmodelled, not measured: {Step()}\n\n{table(rows, GPUS, MODELLED)}")
    run.conclude("measured and counted on this machine; a time there says nothing of GPUs")
    return run.write("parallel", rows, {"": plot})


MEASURED = (
    "largest error of a value",
    "bytes a scored token that leave a rank, forward",
    "bytes a scored token that leave a rank, backward",
    "collectives",
)
MODELLED = (
    "time",
    "time of products",
    "time of memory",
    "time of communication",
    "peak memory",
    "bytes that leave a GPU, forward",
    "bytes that leave a GPU, backward",
    "products",
)


def figure(impl: str, ranks: int, quantity: str, unit: str, value: float, how: str) -> Figure:
    return Figure(impl, BOTH, str(ranks), "", quantity, unit, value, how)


def measured_rows(name: str, size: int, of_ranks: list[dict[str, float]]) -> Iterator[Figure]:
    def largest(key: str) -> float:
        return float(max(rank[key] for rank in of_ranks))

    num_scored = largest("num_scored")
    error, forward, backward, calls = MEASURED
    yield figure(name, size, error, "nats", largest("error"), "measured")
    yield figure(name, size, forward, "bytes", largest("forward") / num_scored, "counted")
    yield figure(name, size, backward, "bytes", largest("backward") / num_scored, "counted")
    yield figure(name, size, calls, "", largest("calls"), "counted")


def modelled_rows() -> Iterator[Figure]:
    step = Step()
    for name, gpus in itertools.product(NAMES, GPUS):
        one = cost(name, step, gpus)
        times = seconds(one, gpus)
        values = {
            "time": (sum(times.values()) * 1e3, "ms"),
            **{f"time of {part}": (each * 1e3, "ms") for part, each in times.items()},
            "peak memory": (one.memory_bytes / 2**20, "MiB"),
            "bytes that leave a GPU, forward": (one.forward_bytes / 2**20, "MiB"),
            "bytes that leave a GPU, backward": (one.backward_bytes / 2**20, "MiB"),
            "products": (one.flops / 1e12, "TFLOP"),
        }
        for quantity, (value, unit) in values.items():
            yield figure(name, gpus, quantity, unit, value, "modelled")


def table(rows: Figures, ranks: Sequence[int], quantities: Sequence[str]) -> str:
    """A line an implementation and quantity, a column a number of ranks."""
    cells = {str(n): ("{:.3g}", dict(where=str(n))) for n in ranks}
    some = Figures(row for row in rows if row.quantity in quantities)
    return some.pivot({"quantity": "quantity", "way": "impl", "unit": "unit"}, cells)


def plot(path: Path, rows: Figures, machine: str) -> None:
    """Draw modelled time, memory and sent bytes over the number of GPUs."""
    step = Step()
    title = (
        f"the head of a preference step, forward + backward: {step.num_scored} scored tokens, "
        f"H = {step.hidden_size}, V = {step.vocab_size}, bfloat16, H100: modelled, not measured\n"
        "white: NVLink in one machine; grey: InfiniBand between machines"
    )
    units = {
        "modelled ms": ["time"],
        "modelled peak memory of a GPU, MiB": ["peak memory"],
        "bytes that leave a GPU, MiB": [q for q in MODELLED if q.startswith("bytes that leave")],
    }

    def line(name: str, quantities: Sequence[str]) -> Line:
        values = {n: [rows.value(q, impl=name, where=str(n)) for q in quantities] for n in GPUS}
        return [(n, sum(some)) for n, some in values.items()]

    panels = {unit: {name: line(name, of) for name in NAMES} for unit, of in units.items()}
    with drawing(path, title, num_axes=3, figsize=(15, 5)) as axes:
        draw_lines(axes, panels, "GPUs that share the vocabulary", {n: str(n) for n in GPUS})
        for axis in axes:
            axis.axvspan(GPUS_OF_A_MACHINE * 1.4, GPUS[-1] * 1.2, color="#f2f2f2", zorder=0)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = command.parser("A sharded head: errors, bytes, modelled scaling.", seed=0)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--tokens", type=int, default=64, help="of each of four sequences")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    args = command.check(parser.parse_args(argv), parser, tokens=1)
    if args.vocab < max(args.processes):
        parser.error(f"--vocab must be at least the number of processes, got {args.vocab}")
    return args


if __name__ == "__main__":
    sys.exit(main())
