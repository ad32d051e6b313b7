"""A head whose vocabulary is sharded: real processes for errors and bytes, a model for GPUs.

`python benchmarks/bench_parallel.py --help`. Processes talk over gloo on this machine: what they
compute and send is measured and counted, their time says nothing of GPUs. Times, memory and bytes
over 1 to 64 GPUs are modelled.
"""

import argparse
import itertools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

if not __package__:  # a script: the checkout's packages, and none of benchmarks/ at the top level
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # their processes

from processes import run_processes

from benchmarks.common import command
from benchmarks.common.batches import Shape
from benchmarks.common.command import Run
from benchmarks.common.report import (
    BACKWARD,
    BOTH,
    FORWARD,
    Figure,
    Figures,
    Line,
    draw_lines,
    drawing,
    figures,
)
from benchmarks.parallel import ways
from benchmarks.parallel.model import GPUS_OF_A_MACHINE, Step, cost, seconds

GPUS = (1, 2, 4, 8, 16, 32, 64)
SENT_FORWARD, SENT_BACKWARD = (f"bytes that leave a GPU, {p}" for p in (FORWARD, BACKWARD))
# Nats: products rounded to bfloat16 put logits of spread 3 off by up to 0.03 each.
ALLOWED = 0.02


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    run = Run("bench_parallel", parse_args, argv)
    args = run.args
    shape = Shape(4, args.tokens, args.vocab, hidden_size=64)
    run.descriptions |= ways.DESCRIPTIONS
    run.announce(
        "torch",
        vocab_size=args.vocab,
        tokens=shape.batch * shape.seq_len,
        hidden_size=shape.hidden_size,
        modelled_step=Step(),
    )
    measured, wrong = Figures(), []
    for size in args.processes:
        ranks = run_processes(ways.measure, size, shape, args.seed)
        for name in ways.WAYS:
            of_ranks = [rank[name] for rank in ranks]
            measured += measured_rows(name, size, of_ranks)
            if not all(torch.equal(x["values"], of_ranks[0]["values"]) for x in of_ranks):
                wrong.append(f"{name}: ranks of {size} have other bits")
            if max(x["error"] for x in of_ranks) > ALLOWED:
                wrong.append(f"{name}, {size} processes: error {of_ranks[0]['error']:.2g}")
    if wrong:
        return run.refuse(wrong, "nothing is reported")
    modelled = modelled_rows()
    print(f"\n{table(measured, args.processes)}")
    print(f"\nmodelled, not measured: {Step()}\n\n{table(modelled, GPUS)}")
    run.conclude("measured and counted on this machine; a time there says nothing of GPUs")
    return run.write("parallel", [*measured, *modelled], {"": plot})


def measured_rows(name: str, size: int, of_ranks: list[dict[str, Any]]) -> Figures:
    keys = ("error", "calls", "num_scored", FORWARD, BACKWARD)
    largest = {key: float(max(rank[key] for rank in of_ranks)) for key in keys}
    measured = {"largest error of a value": ("nats", largest["error"])}
    counted = {
        f"bytes a scored token that leave a rank, {passes}": (
            "bytes",
            largest[passes] / largest["num_scored"],
        )
        for passes in (FORWARD, BACKWARD)
    }
    counted["collectives"] = ("", largest["calls"])
    place = (name, BOTH, str(size), "")
    return Figures([*figures(*place, "measured", measured), *figures(*place, "counted", counted)])


def modelled_rows() -> Figures:
    step, result = Step(), Figures()
    for name, gpus in itertools.product(ways.WAYS, GPUS):
        one = cost(name, step, gpus)
        times = seconds(one, gpus)
        values = {
            "time": ("ms", sum(times.values()) * 1e3),
            **{f"time of {part}": ("ms", each * 1e3) for part, each in times.items()},
            "peak memory": ("MiB", one.memory_bytes / 2**20),
            SENT_FORWARD: ("MiB", one.forward_bytes / 2**20),
            SENT_BACKWARD: ("MiB", one.backward_bytes / 2**20),
            "products": ("TFLOP", one.flops / 1e12),
        }
        result += figures(name, BOTH, str(gpus), "", "modelled", values)
    return result


def table(rows: Iterable[Figure], ranks: Sequence[int]) -> str:
    """A line an implementation and quantity, a column a number of ranks."""
    cells = {str(n): ("{:.3g}", dict(where=str(n))) for n in ranks}
    return Figures(rows).pivot({"quantity": "quantity", "way": "impl", "unit": "unit"}, cells)


def plot(path: Path, rows: Sequence[Figure], machine: str) -> None:
    """Draw modelled time, memory and sent bytes over the number of GPUs."""
    step, found = Step(), Figures(rows)
    title = (
        f"the head of a preference step, forward + backward: {step.num_scored} scored tokens, "
        f"H = {step.hidden_size}, V = {step.vocab_size}, bfloat16, H100: modelled, not measured\n"
        "white: NVLink in one machine; grey: InfiniBand between machines"
    )
    units = {
        "modelled ms": ["time"],
        "modelled peak memory of a GPU, MiB": ["peak memory"],
        "bytes that leave a GPU, MiB": [SENT_FORWARD, SENT_BACKWARD],
    }

    def line(name: str, quantities: Sequence[str]) -> Line:
        values = {n: [found.value(q, impl=name, where=str(n)) for q in quantities] for n in GPUS}
        return [(n, sum(some)) for n, some in values.items()]

    panels = {unit: {name: line(name, of) for name in ways.WAYS} for unit, of in units.items()}
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
