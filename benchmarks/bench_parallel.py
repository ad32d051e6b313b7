"""A head whose vocabulary is sharded: real processes for errors and bytes, a model for GPUs.

`python benchmarks/bench_parallel.py --help`. Processes talk over gloo on this machine: what they
compute and send is measured and counted, their time says nothing of GPUs. Times, memory and bytes
over 1 to 64 GPUs are modelled.
"""

import argparse
import dataclasses
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

# The checkout's package, whether or not another one is installed, and the tests' processes.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import parallel_ways as ways
from bench_vocab import RESULTS, require_bench_extra, version
from parallel_model import GPUS_OF_A_MACHINE, Step, cost, seconds
from processes import run_processes
from report import write_csv

GPUS = (1, 2, 4, 8, 16, 32, 64)
NAMES = list(ways.WAYS)
COLOURS = ("#1b6ca8", "#d1495b", "#8d96a3")
# Nats: products rounded to bfloat16 put logits of spread 3 off by up to 0.03 each.
ALLOWED = 0.02


@dataclasses.dataclass(frozen=True)
class Row:
    impl: str
    ranks: int
    quantity: str
    unit: str
    value: float
    how: str  # "measured", "counted" or "modelled"


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    require_bench_extra([] if args.no_plot else ["matplotlib"])
    batch = ways.Batch(4, args.tokens, 64, args.vocab, 0.5, args.seed)
    run = dict(
        vocab_size=str(args.vocab),
        tokens=str(batch.batch * batch.seq_len),
        hidden_size=str(batch.hidden_size),
        modelled_step=str(Step()),
        seed=str(args.seed),
        torch=version("torch"),
        command=shlex.join(["python", "benchmarks/bench_parallel.py", *argv]),
    )
    print(*(f"{name}: {value}" for name, value in run.items()), sep="\n")
    print("", *(f"{name}: {text}" for name, text in ways.DESCRIPTIONS.items()), sep="\n")

    rows: list[Row] = []
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
        print("wrong results, so nothing is reported:", *wrong, sep="\n  ", file=sys.stderr)
        return 1
    rows += modelled_rows()
    print("\n" + table(rows, args.processes, MEASURED))
    print(f"\nmodelled, not measured: {Step()}\n\n" + table(rows, GPUS, MODELLED))

    partial = (args.vocab, args.tokens, args.processes) != (50257, 64, [2, 4])
    path = Path(args.output) / f"parallel{'.local' * partial}.csv"
    write_csv(path, rows, run)
    print(f"\nrows: {path}")
    if not args.no_plot:
        plot(path.with_suffix(".png"), rows)
        print(f"plot: {path.with_suffix('.png')}")
    return 0


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


def measured_rows(name: str, size: int, of_ranks: list[dict[str, float]]) -> Iterator[Row]:
    def largest(key: str) -> float:
        return float(max(rank[key] for rank in of_ranks))

    num_scored = largest("num_scored")
    error, forward, backward, calls = MEASURED
    yield Row(name, size, error, "nats", largest("error"), "measured")
    yield Row(name, size, forward, "bytes", largest("forward") / num_scored, "counted")
    yield Row(name, size, backward, "bytes", largest("backward") / num_scored, "counted")
    yield Row(name, size, calls, "", largest("calls"), "counted")


def modelled_rows() -> Iterator[Row]:
    step = Step()
    for name in NAMES:
        for gpus in GPUS:
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
                yield Row(name, gpus, quantity, unit, value, "modelled")


def table(rows: list[Row], ranks: tuple[int, ...] | list[int], quantities: tuple[str, ...]) -> str:
    """A line an implementation and quantity, a column a number of ranks."""
    lines = [("", "", "", *map(str, ranks))]
    for quantity in quantities:
        for name in NAMES:
            mine = {r.ranks: r for r in rows if (r.impl, r.quantity) == (name, quantity)}
            cells = [f"{mine[n].value:.3g}" for n in ranks]
            lines.append((quantity, name, mine[ranks[0]].unit, *cells))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def plot(path: Path, rows: list[Row]) -> None:
    """Draw modelled time, memory and sent bytes over the number of GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullLocator

    figure, axes = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")

    def line(name: str, *quantities: str) -> list[float]:
        return [
            sum(
                r.value for r in rows if (r.impl, r.ranks) == (name, n) and r.quantity in quantities
            )
            for n in GPUS
        ]

    for name, colour, marker in zip(NAMES, COLOURS, "osD", strict=True):
        style = dict(color=colour, marker=marker, label=name)
        axes[0].plot(GPUS, line(name, "time"), **style)
        axes[1].plot(GPUS, line(name, "peak memory"), **style)
        sent = line(name, *(q for q in MODELLED if q.startswith("bytes that leave")))
        axes[2].plot(GPUS[1:], sent[1:], **style)
    axes[0].set(ylabel="modelled ms")
    axes[1].set(ylabel="modelled peak memory of a GPU, MiB")
    axes[2].set(ylabel="bytes that leave a GPU, MiB")
    for axis in axes:
        axis.set(xscale="log", yscale="log", xlabel="GPUs that share the vocabulary")
        axis.axvspan(GPUS_OF_A_MACHINE * 1.4, GPUS[-1] * 1.2, color="#f2f2f2", zorder=0)
        axis.set_xticks(GPUS, [str(n) for n in GPUS])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3, which="both")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(NAMES))
    step = Step()
    figure.suptitle(
        f"the head of a preference step, forward + backward: {step.num_scored} scored tokens, "
        f"H = {step.hidden_size}, V = {step.vocab_size}, bfloat16, H100: modelled, not measured\n"
        "white: NVLink in one machine; grey: InfiniBand between machines"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(os.fspath(path), dpi=110)
    plt.close(figure)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A sharded head: errors, bytes, modelled scaling.")
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--tokens", type=int, default=64, help="of each of four sequences")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--no-plot", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--seed", type=int, default=0, help="of the batch")
    args = parser.parse_args(argv)
    if args.vocab < max(args.processes):
        parser.error(f"--vocab must be at least the number of processes, got {args.vocab}")
    return args


if __name__ == "__main__":
    sys.exit(main())
