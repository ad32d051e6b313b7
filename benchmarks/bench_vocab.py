"""Throughput, memory and accuracy over vocabulary and batch sizes;
`python benchmarks/bench_vocab.py --help`.

Results are compared with float64 first: where they are wrong nothing is timed, and it exits with 1.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch

if not __package__:  # a script: the checkout's packages, and none of benchmarks/ at the top level
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.common import command, measure, report
from benchmarks.common.batches import Shape
from benchmarks.common.cases import Effort, Plan, Setting, measure_all
from benchmarks.common.check import check_batches, complaints
from benchmarks.common.command import Run
from benchmarks.common.logits_peers import LOG_SOFTMAX, candidates
from benchmarks.common.report import BOTH, FORWARD
from benchmarks.vocab import first_call, rows
from benchmarks.vocab.judged import judge
from benchmarks.vocab.sentences import sentences

BATCH = 8  # sequences, over vocabulary sizes
HEADLINE = 128256
VOCAB_SIZES = [6400, 32000, 50257, HEADLINE, 151936, 262144]
QUICK_VOCAB_SIZES = [32000, HEADLINE]
# From that of a test to as much as memory has room for.
SHAPES = ["2x8x32", "8x16x64", "4x32x1000", "2x16x32000", "8x64x6400", "8x512x151936"]
QUICK_SHAPES = ["8x16x64", "8x64x6400"]
NEIGHBOURED = (8, 64, 6400)  # measured beside a busy process too
DTYPES = ["bfloat16", "float32"]
SHARES = [1.0, 0.5]

# At the headline, and elsewhere: logits of a batch, about, and what is done with them.
EFFORTS = {
    "cpu": ((2**25, Effort(3, 0.15, 4)), (2**23, Effort(2, 0.05, 2))),
    "cuda": ((2**29, Effort(3, 0.1, 4)), (2**28, Effort(2, 0.1, 2))),
}
QUICK_EFFORTS = {"cpu": (2**23, Effort(1, 0.02, 2)), "cuda": (2**27, Effort(1, 0.02, 2))}
SMALL_EFFORT, LARGE_EFFORT = Effort(8, 0.02, 2), Effort(1, None, 1)
LARGE = 2**26  # logits from which on a batch is measured once, with the first dtype
BYTES_PER_LOGIT = 64  # of memory: the hungriest implementation, its batch, and room to spare
COPY_NUMEL = {"cpu": 2**26, "cuda": 2**28}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    run = Run("bench_vocab", parse_args, argv, "tqdm")
    measure.map_buffers()
    args, device = run.args, run.device
    runnable = run.collect(candidates(device, args.backend))
    ours = [peer for peer in runnable if peer.ours]
    plain = next(peer for peer in runnable if peer.name == LOG_SOFTMAX)
    dtypes = [getattr(torch, name) for name in args.dtype]
    wrong = complaints(ours, plain, check_batches(dtypes, device), device)
    if wrong:
        return run.refuse(wrong)

    copy_numel = min(COPY_NUMEL[device.type], measure.free_bytes(device) // 32)
    copy = measure.copy_gb_per_s(device, numel=copy_numel, min_run_s=0.5)
    run.announce("torch", "triton", "numba", copy_gb_per_s=round(copy, 2))
    found: list[rows.Row] = []
    for part, plans in plans_of(args, device).items():
        rows_of = partial(rows.rows_of, copy_gb_per_s=copy, part=part)
        found += measure_all(plans, runnable, run, rows_of)
    first_calls = first_call.measure(args.device, args.backend) if args.first_calls else []
    if first_calls:
        print(f"\nthe first call of a process\n{report.table(first_calls)}")
    run.conclude(rows.NOTES)
    heading = f"V = {HEADLINE}, sizes and first calls (of the speeds: on a CPU)"
    run.judge(heading, judge(found, first_calls, HEADLINE), f"V = {HEADLINE} or sizes")
    parts = {row.part for row in found}
    plots = {s: draw for part, (s, draw) in rows.PLOTS.items() if part in parts}
    run.write(report.file_stem(run.machine), found, plots, {"-first": first_calls})
    print("", *sentences(found, HEADLINE), sep="\n")
    return 0


def plans_of(args: argparse.Namespace, device: torch.device) -> dict[str, list[Plan]]:
    """What is measured, by part: batches that memory has room for."""
    most = measure.free_bytes(device) // BYTES_PER_LOGIT
    threads = torch.get_num_threads()
    load = [(threads, 0)]
    vocabulary, sizes = [], []
    for vocab_size in args.vocab:
        is_headline = vocab_size == HEADLINE
        num_logits, effort = EFFORTS[device.type][not is_headline]
        if args.quick:
            num_logits, effort = QUICK_EFFORTS[device.type]
        shape = Shape(BATCH, num_logits // (BATCH * vocab_size), vocab_size).within(most)
        vocabulary += make_plans(shape, args.dtype, effort, args.share, load, is_headline)
    for size in args.sizes:
        shape = Shape(*size).within(most)
        if shape.num_logits > LARGE:
            sizes += make_plans(shape, args.dtype[:1], LARGE_EFFORT, [1.0], load)
            continue
        more = [(1, 0)] * (threads > 1) + [(threads, 1)] * (size == NEIGHBOURED)
        loads = load + more * (device.type == "cpu")
        sizes += make_plans(shape, args.dtype, SMALL_EFFORT, [1.0], loads)
    return {rows.VOCABULARY: vocabulary, rows.SIZES: sizes}


def make_plans(
    shape: Shape,
    dtypes: Sequence[str],
    effort: Effort,
    shares: Sequence[float],
    loads: Sequence[tuple[int, int]],
    is_headline: bool = False,
) -> list[Plan]:
    """A plan for each dtype.

    Args:
        loads: threads of PyTorch, and other processes that each keep a core busy.
    """
    every = product(shares, loads, (FORWARD, BOTH))
    settings = [
        Setting(share, passes, effort, True, is_headline, *load) for share, load, passes in every
    ]
    return [Plan(str(shape), shape, getattr(torch, dtype), settings) for dtype in dtypes]


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = command.parser(
        "Speed, memory and accuracy of log-probabilities over vocabulary and batch sizes.",
        device=True,
        share=True,
    )
    parser.add_argument("--quick", action="store_true", help="a tenth: few sizes, little repeated")
    parser.add_argument("--vocab", type=int, nargs="*", help=f"by default {VOCAB_SIZES}")
    parser.add_argument("--sizes", nargs="*", help=f"BxTxV; by default {' '.join(SHAPES)}")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--no-first-calls", action="store_false", dest="first_calls")
    parser.set_defaults(share=SHARES)
    args = parser.parse_args(argv)
    if args.vocab is None:
        args.vocab = QUICK_VOCAB_SIZES if args.quick else VOCAB_SIZES
    if args.sizes is None:
        args.sizes = QUICK_SHAPES if args.quick else SHAPES
    args.sizes = [tuple(map(int, shape.split("x"))) for shape in args.sizes]
    if any(len(shape) != 3 or min(shape) < 2 for shape in args.sizes):
        parser.error("--sizes must be BxTxV, each 2 or more, such as 8x64x6400")
    return command.check(args, parser, vocab=2)


if __name__ == "__main__":
    sys.exit(main())
