"""The compiled kernels beside the peers' on any CPU; `python benchmarks/bench_kernels.py --help`.

Kernels are compiled for GPUs and run in an emulator that counts instructions and bytes; times are
modelled. On a machine with a GPU the same command measures instead. Results are compared with
float64 first: where they are wrong nothing is reported, and it exits with 1.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # read when triton is imported: interpreted code has no PTX

import torch

if not __package__:  # a script: the checkout's packages, and none of benchmarks/ at the top level
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.common import command
from benchmarks.common.command import Run
from benchmarks.common.peers import brief
from benchmarks.common.report import Figures, aligned, file_stem
from benchmarks.kernel import measure, model, rows, whole
from benchmarks.kernel.counts import (
    ALL,
    CASES,
    HALF,
    HALF_SHIFT,
    PASSES,
    Case,
    Inputs,
    Loop,
    Work,
    complaint,
    count,
    make_inputs,
    per_token_instructions,
    read_loop,
)
from benchmarks.kernel.peers import KernelPeer, candidates
from gpu_lab import published
from gpu_lab.devices import DEVICES, Device
from gpu_lab.driver import emulate

VOCAB_SIZE, DTYPE, TARGETS = 131072, "bfloat16", ["sm_90", "sm_100"]
AMD_TARGET = "gfx942"  # compiled, not run
BATCH, SEQ_LEN, QUICK_SEQ_LEN = 2, 16, 4
MODELLED_CASES = (ALL, HALF_SHIFT)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    has_gpu = torch.cuda.is_available()
    device = measure.DEVICE if has_gpu else torch.device("cpu")
    run = Run("bench_kernels", parse_args, argv, "tqdm", device=device)
    args, dtype = run.args, getattr(torch, run.args.dtype)
    # Some peers ask for a GPU when they are imported.
    with nullcontext() if has_gpu else emulate(args.target[0]):
        peers = run.collect(candidates(dtype))
    facts = dict(vocab_size=args.vocab, dtype=args.dtype)
    packages = ("torch", "triton", "trl", "liger-kernel")
    if has_gpu:
        wrong = measure.complaints(peers, args.vocab, dtype)
        if wrong:
            return run.refuse(wrong)
        figures, copy = measure.rows(peers, args.vocab, dtype, args.quick)
        run.announce(*packages, **facts, copy_gb_per_s=f"{copy:.1f}")
        print(f"\nmeasured on {run.machine}; V = {args.vocab}, {args.dtype}")
        print(measure.table(figures))
        of_calls = measure.whole_rows(peers, dtype, args.quick)
        print(f"\nwhole calls, {args.dtype}\n{measure.whole_table(of_calls)}")
        run.conclude()
        return run.write(f"kernels-{file_stem(run.machine)}", [*figures, *of_calls])

    run.announce(*packages, **facts)
    figures, wrong = count_all(run, dtype, peers)
    if wrong:
        return run.refuse(wrong, "nothing is reported")
    print_tables(figures, args)
    run.conclude("counted in an emulator, read in machine code, or modelled: nothing was measured")
    title = f"Triton kernels, V = {args.vocab}, {args.dtype}: counted in an emulator, modelled"
    draw = partial(rows.plot, case=str(ALL), title=f"{title}; not measured")
    return run.write("kernels-modelled", figures, {"": draw})


def count_all(run: Run, dtype: torch.dtype, peers: list[KernelPeer]) -> tuple[Figures, list[str]]:
    """Return the figures of everybody, and what is wrong. A peer that fails is not run."""
    from tqdm import tqdm

    args = run.args
    generator = torch.Generator().manual_seed(args.seed)
    shape = (BATCH, QUICK_SEQ_LEN if args.quick else SEQ_LEN, args.vocab)
    logits = torch.randn(shape, generator=generator).mul_(3).to(dtype)
    labels = torch.randint(args.vocab, shape[:2], generator=generator)
    batches = {case: make_inputs(logits, labels, case) for case in CASES}
    figures, wrong = Figures(), []
    devices = [d for d in DEVICES if not args.quick or d.target in (*args.target, AMD_TARGET)]
    shapes = [whole.SHAPES[0]._replace(seq_len=64)] if args.quick else whole.SHAPES
    steps = len(CASES) - 1 + len({*args.target, *(d.target for d in devices)}) + len(shapes)
    with tqdm(total=len(peers) * steps, unit="run", leave=False) as bar:
        for peer in peers:

            def step(what: str, name: str = peer.name) -> None:
                bar.set_description(f"{name}, {what}")
                bar.update()

            try:
                new, complaints = count_peer(peer, batches, args.target, devices, shapes, step)
            except Exception as error:
                if peer.ours:
                    raise
                run.not_run[peer.name] = brief(error)
                continue
            figures += new
            wrong += complaints
    return figures, wrong


def count_peer(
    peer: KernelPeer,
    batches: dict[Case, Inputs],
    targets: list[str],
    devices: Sequence[Device],
    shapes: Sequence[whole.Shape],
    step: Callable[[str], None],
) -> tuple[Figures, list[str]]:
    """All cases on the first target, one on the others, and the machine code of all devices."""
    figures, wrong = Figures(), []
    loops: dict[tuple[str, str], Loop] = {}
    works: dict[Case, dict[str, Work]] = {}
    compiled = dict.fromkeys(device.target for device in devices if device.target not in targets)
    for target in [*targets, *compiled]:
        for case in CASES if target == targets[0] else [ALL]:
            step(f"{target}, scored: {case}")
            inputs = batches[case]
            counted = count(peer, inputs, target, runs=target in targets)
            if case == ALL:
                for passes in PASSES:
                    loop = read_loop(counted.streaming[passes], inputs.logits.dtype)
                    if loop is not None:
                        loops[target, passes] = loop
                        figures += model.loop_rows(peer.name, target, passes, case, loop)
            if target not in targets:
                continue
            error = complaint(peer, inputs, counted)
            if error is not None:
                wrong.append(f"{peer.name}, {target}, scored: {case}: {error}")
            per_token = per_token_instructions(peer, target, inputs.logits.shape[-1])
            works.setdefault(case, counted.work)
            figures += model.work_rows(peer.name, target, inputs, counted.work, per_token)
    for case in MODELLED_CASES:
        figures += model.modelled_rows(peer.name, batches[case], works[case], loops)
    for shape in shapes:
        step(str(shape))
        case = ALL if shape.share == 1 else HALF
        figures += whole.whole_rows(
            peer, shape, batches[case], targets[0], works[case], loops, devices
        )
    return figures, wrong


def print_tables(figures: Figures, args: argparse.Namespace) -> None:
    where = f"V = {args.vocab}, {args.dtype}"
    targets = ", ".join(args.target)
    print(f"\ninstructions per logit, counted on {targets}; {where}, all rows scored\n")
    print(rows.instruction_table(figures), rows.INSTRUCTION_NOTES, sep="\n\n")
    shape = f"{BATCH} sequences of {QUICK_SEQ_LEN if args.quick else SEQ_LEN} tokens"
    print(f"\nbytes per logit, counted on {args.target[0]}; {where}, {shape}\n")
    print(rows.bytes_table(figures), rows.BYTES_NOTES, sep="\n\n")
    print(f"\nmodelled times of {model.ROWS} rows; {where}\n")
    print(rows.model_table(figures), rows.MODEL_NOTES, sep="\n\n")
    print(rows.STATIC_NOTE + args.target[0] + ".")
    print("\nthe whole time of a call, modelled\n")
    print(whole.table(figures), whole.NOTES, sep="\n\n")
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
