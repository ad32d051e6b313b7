"""The compiled kernels beside the peers' on any CPU; `python benchmarks/bench_kernels.py --help`.

Kernels are compiled for GPUs and run in an emulator that counts instructions and bytes; times are
modelled. On a machine with a GPU the same command measures instead. Results are compared with
float64 first: where they are wrong nothing is reported, and it exits with 1.
"""

import argparse
import os
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # read when triton is imported: interpreted code has no PTX

import torch

if not __package__:  # a script: the checkout's packages, and none of benchmarks/ at the top level
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.common import command
from benchmarks.common.batches import Shape
from benchmarks.common.command import Run
from benchmarks.common.logits_peers import kernels
from benchmarks.common.measure import copy_gb_per_s
from benchmarks.common.peers import Peer, forgiven
from benchmarks.common.report import Figures, aligned, file_stem
from benchmarks.kernel import measure, tables
from benchmarks.kernel.cases import ALL, CASES, WHOLE_CALLS, make_inputs
from benchmarks.kernel.counting import Counting
from benchmarks.kernel.figures import ROWS
from gpu_lab import published
from gpu_lab.devices import DEVICES
from gpu_lab.driver import emulate

VOCAB_SIZE, DTYPE, TARGETS = 131072, "bfloat16", ["sm_90", "sm_100"]
AMD_TARGET = "gfx942"  # compiled, not run
BATCH, SEQ_LEN, QUICK_SEQ_LEN = 2, 16, 4
PACKAGES = ("torch", "triton", "trl", "liger-kernel")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    has_gpu = torch.cuda.is_available()
    device = measure.DEVICE if has_gpu else torch.device("cpu")
    run = Run("bench_kernels", parse_args, argv, "tqdm", device=device)
    # Some peers ask for a GPU when they are imported.
    with nullcontext() if has_gpu else emulate(run.args.target[0]):
        peers = run.collect(kernels())
    return measure_on_gpu(run, peers) if has_gpu else count_on_cpu(run, peers)


def measure_on_gpu(run: Run, peers: list[Peer]) -> int:
    vocab_size, dtype = run.args.vocab, getattr(torch, run.args.dtype)
    wrong = measure.complaints(peers, vocab_size, dtype)
    if wrong:
        return run.refuse(wrong)
    copy = copy_gb_per_s(measure.DEVICE, numel=measure.COPY_NUMEL, min_run_s=0.5)
    facts = dict(vocab_size=vocab_size, dtype=run.args.dtype, copy_gb_per_s=f"{copy:.1f}")
    run.announce(*PACKAGES, **facts)
    found = measure.measured(peers, vocab_size, dtype, run.args.quick, copy)
    print(f"\nmeasured on {run.machine}; V = {vocab_size} or as it says, {run.args.dtype}")
    print(found.pivot(*tables.MEASURED))
    run.conclude()
    return run.write(f"kernels-{file_stem(run.machine)}", found)


def count_on_cpu(run: Run, peers: list[Peer]) -> int:
    from tqdm import tqdm

    args = run.args
    run.announce(*PACKAGES, vocab_size=args.vocab, dtype=args.dtype)
    shape = Shape(BATCH, QUICK_SEQ_LEN if args.quick else SEQ_LEN, args.vocab)
    batch = shape.draw(getattr(torch, args.dtype), torch.Generator().manual_seed(args.seed))
    batches = {case: make_inputs(batch.rows, batch.labels, case) for case in CASES}
    devices = [d for d in DEVICES if not args.quick or d.target in (*args.target, AMD_TARGET)]
    first = WHOLE_CALLS[0]
    quick_calls = [first._replace(shape=first.shape._replace(seq_len=64))]
    whole_calls = quick_calls if args.quick else WHOLE_CALLS
    counting = Counting(batches, args.target, devices, whole_calls)
    with tqdm(total=len(peers) * counting.num_steps, unit="run", leave=False) as bar:
        for peer in peers:
            with forgiven(peer, run.not_run):
                for step in counting.steps(peer):
                    bar.set_description(f"{peer.name}, {step}")
                    bar.update()
    if counting.wrong:
        return run.refuse(counting.wrong, "nothing is reported")
    print_tables(counting.figures, args)
    run.conclude("counted in an emulator, read in machine code, or modelled: nothing was measured")
    title = f"Triton kernels, V = {args.vocab}, {args.dtype}: counted in an emulator, modelled"
    draw = partial(tables.plot, case=str(ALL), title=f"{title}; not measured")
    return run.write("kernels-modelled", counting.figures, {"": draw})


def print_tables(figures: Figures, args: argparse.Namespace) -> None:
    where = f"V = {args.vocab}, {args.dtype}"
    targets = ", ".join(args.target)
    print(f"\ninstructions per logit, counted on {targets}; {where}, all rows scored\n")
    print(figures.pivot(*tables.INSTRUCTIONS), tables.INSTRUCTION_NOTES, sep="\n\n")
    shape = f"{BATCH} sequences of {QUICK_SEQ_LEN if args.quick else SEQ_LEN} tokens"
    print(f"\nbytes per logit, counted on {args.target[0]}; {where}, {shape}\n")
    print(figures.pivot(*tables.BYTES), tables.BYTES_NOTES, sep="\n\n")
    print(f"\nmodelled times of {ROWS} rows; {where}\n")
    print(figures.pivot(*tables.MODELLED), tables.MODEL_NOTES, sep="\n\n")
    print(tables.STATIC_NOTE + args.target[0] + ".")
    print("\nthe whole time of a call, modelled\n")
    print(figures.pivot(*tables.WHOLE_CALLS), tables.WHOLE_NOTES, sep="\n\n")
    print("\nthe model beside published times\n")
    checks = published.checks()[: 1 if args.quick else None]
    print(aligned([published.HEADINGS, *(check.cells() for check in checks)], 3))


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = command.parser(
        "Instructions, bytes and modelled times of compiled kernels; times on a GPU.", seed=0
    )
    parser.add_argument("--vocab", type=int, default=VOCAB_SIZE)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default=DTYPE)
    parser.add_argument(
        "--target", nargs="+", choices=["sm_80", "sm_90", "sm_100"], default=TARGETS
    )
    parser.add_argument("--quick", action="store_true", help="a few rows, one target")
    args = command.check(parser.parse_args(argv), parser, vocab=2)
    if args.quick:
        args.target = args.target[:1]
    return args


if __name__ == "__main__":
    sys.exit(main())
