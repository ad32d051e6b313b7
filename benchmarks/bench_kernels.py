"""The compiled kernels beside the peers' on any CPU; `python benchmarks/bench_kernels.py --help`.

Kernels are compiled for GPUs and run in an emulator that counts instructions and bytes; times are
modelled. On a machine with a GPU the same command measures instead. Results are compared with
float64 first: where they are wrong nothing is reported, and it exits with 1.
"""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # read when triton is imported: interpreted code has no PTX

import torch

# The checkout's package, whether or not another one is installed: these are its figures.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kernel_goals
import kernel_model
import kernel_peers
import kernel_report as report
from bench_vocab import RESULTS, require_bench_extra, version
from gpu_lab.driver import emulate
from gpu_lab.model import DEVICES, check
from kernel_counts import (
    ALL,
    CASES,
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
from kernel_peers import KernelPeer
from kernel_report import Rows
from report import write_csv

VOCAB_SIZE, DTYPE, TARGETS = kernel_goals.VOCAB_SIZE, kernel_goals.DTYPE, ["sm_90", "sm_100"]
AMD_TARGET = "gfx942"  # compiled, not run
BATCH, SEQ_LEN, QUICK_SEQ_LEN = 2, 16, 4
MODELLED_CASES = (ALL, HALF_SHIFT)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    require_bench_extra(["tqdm"] if args.no_plot else ["tqdm", "matplotlib"])
    dtype = getattr(torch, args.dtype)
    if torch.cuda.is_available():
        peers, not_run = kernel_peers.collect(dtype)
        return measure_gpu(args, argv, peers, not_run)
    with emulate(args.target[0]):  # some peers ask for a GPU when they are imported
        peers, not_run = kernel_peers.collect(dtype)
    run = run_facts(argv, args)
    announce(run, peers)

    rows, wrong = count_all(args, dtype, peers, not_run)
    if wrong:
        print("wrong results, so nothing is reported:", *wrong, sep="\n  ", file=sys.stderr)
        return 1
    print("", *(f"not run: {name}: {reason}" for name, reason in not_run.items()), sep="\n")
    print_tables(rows, args)
    if (args.vocab, args.dtype) == (VOCAB_SIZE, DTYPE):
        print("\n" + kernel_goals.goals_text(kernel_goals.judge(rows)))
    else:
        print("\n" + kernel_goals.goals_text([]))

    path = output_path(args, "kernels-modelled")
    write_csv(path, list(rows), run)
    print(f"\nrows: {path}")
    if not args.no_plot:
        title = f"Triton kernels, V = {args.vocab}, {args.dtype}: counted in an emulator, modelled"
        report.plot(path.with_suffix(".png"), rows, str(ALL), f"{title}; not measured")
        print(f"plot: {path.with_suffix('.png')}")
    return 0


def count_all(
    args: argparse.Namespace,
    dtype: torch.dtype,
    peers: list[KernelPeer],
    not_run: dict[str, str],
) -> tuple[Rows, list[str]]:
    """Return the rows of everybody, and what is wrong. A peer that fails moves to not_run."""
    from tqdm import tqdm

    generator = torch.Generator().manual_seed(args.seed)
    shape = (BATCH, QUICK_SEQ_LEN if args.quick else SEQ_LEN, args.vocab)
    logits = torch.randn(shape, generator=generator).mul_(3).to(dtype)
    labels = torch.randint(args.vocab, shape[:2], generator=generator)
    batches = {case: make_inputs(logits, labels, case) for case in CASES}
    rows, wrong = Rows(), []
    with tqdm(total=len(peers) * (len(CASES) + len(args.target)), unit="run", leave=False) as bar:
        for peer in list(peers):

            def step(what: str, name: str = peer.name) -> None:
                bar.set_description(f"{name}, {what}")
                bar.update()

            try:
                new, complaints = count_peer(peer, batches, args.target, step)
            except Exception as error:
                if peer.name == kernel_peers.OURS:
                    raise
                not_run[peer.name] = f"{type(error).__name__}: {str(error).strip()[:160]}"
                continue
            rows += new
            wrong += complaints
    return rows, wrong


def count_peer(
    peer: KernelPeer,
    batches: dict[Case, Inputs],
    targets: list[str],
    step: Callable[[str], None],
) -> tuple[Rows, list[str]]:
    """All cases on the first target, one on the others, and the machine code of all of them."""
    rows, wrong = Rows(), []
    loops: dict[tuple[str, str], Loop] = {}
    works: dict[Case, dict[str, Work]] = {}
    for target in [*targets, AMD_TARGET]:
        for case in CASES if target == targets[0] else [ALL]:
            step(f"{target}, scored: {case}")
            inputs = batches[case]
            counted = count(peer, inputs, target)
            if case == ALL:
                for passes in PASSES:
                    loop = read_loop(peer, counted.kernels[passes], inputs, target)
                    if loop is not None:
                        loops[target, passes] = loop
                        rows += kernel_model.loop_rows(peer.name, target, passes, case, loop)
            if target == AMD_TARGET:
                continue
            error = complaint(peer, inputs, counted)
            if error is not None:
                wrong.append(f"{peer.name}, {target}, scored: {case}: {error}")
            per_token = per_token_instructions(peer, target, inputs.logits.shape[-1])
            works.setdefault(case, counted.work)
            rows += kernel_model.work_rows(peer.name, target, inputs, counted.work, per_token)
    for case in MODELLED_CASES:
        rows += kernel_model.modelled_rows(peer.name, batches[case], works[case], loops)
    return rows, wrong


def print_tables(rows: Rows, args: argparse.Namespace) -> None:
    where = f"V = {args.vocab}, {args.dtype}"
    targets = ", ".join(args.target)
    print(f"\ninstructions per logit, counted on {targets}; {where}, all rows scored\n")
    print(report.instruction_table(rows), report.INSTRUCTION_NOTES, sep="\n\n")
    shape = f"{BATCH} sequences of {QUICK_SEQ_LEN if args.quick else SEQ_LEN} tokens"
    print(f"\nbytes per logit, counted on {args.target[0]}; {where}, {shape}\n")
    print(report.bytes_table(rows), report.BYTES_NOTES, sep="\n\n")
    print(f"\nmodelled times of {kernel_model.ROWS} rows; {where}\n")
    print(report.model_table(rows), report.MODEL_NOTES, sep="\n\n")
    print(report.STATIC_NOTE + args.target[0] + ".")
    missing = [d.name for d in DEVICES if d.target not in (*args.target, AMD_TARGET)]
    if missing:
        print(f"not modelled: {', '.join(missing)}: pass its --target")
    modelled, published = check()
    print(
        f"the model's check: TRL's forward of 8192 x 151936 on an H100: modelled {modelled:.2f} ms,"
        f" published {published:.2f} ms"
    )


def measure_gpu(
    args: argparse.Namespace, argv: list[str], peers: list[KernelPeer], not_run: dict[str, str]
) -> int:
    """Time what is otherwise counted, and print and write the rows."""
    import kernel_measure
    import measure

    dtype = getattr(torch, args.dtype)
    machine = measure.machine_name(kernel_measure.DEVICE)
    wrong = kernel_measure.complaints(peers, args.vocab, dtype)
    if wrong:
        print("wrong results, so nothing is timed:", *wrong, sep="\n  ", file=sys.stderr)
        return 1
    rows, copy = kernel_measure.rows(peers, args.vocab, dtype, args.quick)
    run = run_facts(argv, args) | dict(machine=machine, copy_gb_per_s=f"{copy:.1f}")
    announce(run, peers)
    print("", *(f"not run: {name}: {reason}" for name, reason in not_run.items()), sep="\n")
    print(f"\nmeasured on {machine}; V = {args.vocab}, {args.dtype}")
    print(kernel_measure.table(rows))
    path = output_path(args, re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-"))
    write_csv(path, list(rows), run)
    print(f"\nrows: {path}")
    return 0


def run_facts(argv: list[str], args: argparse.Namespace) -> dict[str, str]:
    """What all rows of a run share."""
    packages = {"torch": "torch", "triton": "triton", "trl": "trl", "liger": "liger-kernel"}
    return dict(
        vocab_size=str(args.vocab),
        dtype=args.dtype,
        seed=str(args.seed),
        **{name: version(package) for name, package in packages.items()},
        command=shlex.join(["python", "benchmarks/bench_kernels.py", *argv]),
    )


def announce(run: dict[str, str], peers: list[KernelPeer]) -> None:
    print(*(f"{name}: {value}" for name, value in run.items()), "", sep="\n")
    print(*(f"{p.name}: {kernel_peers.DESCRIPTIONS[p.name]}" for p in peers), sep="\n")


def output_path(args: argparse.Namespace, name: str) -> Path:
    """Return where the CSV file goes; git ignores the name that a partial run gets."""
    partial = args.quick or (args.vocab, args.dtype, args.target) != (VOCAB_SIZE, DTYPE, TARGETS)
    return Path(args.output) / f"{name}{'.local' * partial}.csv"


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Instructions, bytes and modelled times of compiled kernels; times on a GPU."
    )
    parser.add_argument("--vocab", type=int, default=VOCAB_SIZE)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default=DTYPE)
    parser.add_argument(
        "--target", nargs="+", choices=["sm_80", "sm_90", "sm_100"], default=TARGETS
    )
    parser.add_argument("--quick", action="store_true", help="a few rows, one target")
    parser.add_argument("--no-plot", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--seed", type=int, default=0, help="of the batch")
    args = parser.parse_args(argv)
    if args.vocab < 2:
        parser.error(f"--vocab must be 2 or more, got {args.vocab}")
    if args.quick:
        args.target = args.target[:1]
    return args


if __name__ == "__main__":
    sys.exit(main())
