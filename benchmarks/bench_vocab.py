"""Throughput, memory and accuracy over vocabulary sizes; `python benchmarks/bench_vocab.py --help`.

Results are compared with float64 first: where they are wrong nothing is timed, and it exits with 1.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

if not __package__:  # a script: the checkout's packages, and none of benchmarks/ at the top level
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.common import command, goals, measure, peers, report
from benchmarks.common.cases import Session
from benchmarks.common.peers import Peer, Place
from benchmarks.common.report import BACKWARD, FORWARD
from benchmarks.vocab import cases, rows
from benchmarks.vocab.cases import Effort
from benchmarks.vocab.peers import candidates
from benchmarks.vocab.rows import Row

HEADLINE = 128256
VOCAB_SIZES = [6400, 32000, 50257, HEADLINE, 151936, 262144]
QUICK_VOCAB_SIZES = [32000, HEADLINE]
DTYPES = ["bfloat16", "float32"]
SHARES = [1.0, 0.5]

# At the headline, and elsewhere. On two cores the whole run has three minutes.
EFFORTS = {
    "cpu": (Effort(2**25, 3, 0.15, 4), Effort(2**23, 1, 0.05, 2)),
    "cuda": (Effort(2**29, 3, 0.1, 4), Effort(2**28, 1, 0.1, 2)),
}
QUICK_EFFORTS = {"cpu": Effort(2**23, 1, 0.02, 2), "cuda": Effort(2**27, 1, 0.02, 2)}
BYTES_PER_LOGIT = 64  # of memory: the hungriest implementation, its batch, and room to spare
COPY_NUMEL = {"cpu": 2**26, "cuda": 2**28}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    command.require_bench_extra(args, "tqdm")
    device = torch.device(args.device)
    if device.index is not None:
        torch.cuda.set_device(device)
    measure.map_buffers()
    runnable, not_run = peers.collect(candidates(device, args.backend))
    dtypes = [getattr(torch, name) for name in args.dtype]
    wrong = cases.complaints([peer for peer in runnable if peer.ours], dtypes, device)
    if wrong:
        return command.refuse(wrong)

    machine = measure.machine_name(device)
    copy_numel = min(COPY_NUMEL[device.type], measure.free_bytes(device) // 32)
    copy_gb_per_s = measure.copy_gb_per_s(device, numel=copy_numel, min_run_s=0.5)
    run: dict[str, str | int | float] = dict(
        machine=machine,
        copy_gb_per_s=round(copy_gb_per_s, 2),
        torch=torch.__version__,
        **command.versions("triton"),
        seed=args.seed,
        command=command.command_line("bench_vocab", argv),
    )
    command.announce(run, {peer.name: peer.description for peer in runnable})
    others = measure.OtherLoad()
    measured, failures = measure_all(args, device, dtypes, runnable, copy_gb_per_s)
    command.print_not_run(not_run, failures)
    print("", rows.NOTES, sep="\n")
    print(f"other processes: {others.share():.0%} of the cores while this ran", end="\n\n")
    heading = f"V = {HEADLINE} (of the speeds: on a CPU)"
    print(goals.text(heading, rows.judge(measured, HEADLINE), f"V = {HEADLINE}"), end="\n\n")

    csv, png = output_paths(args, machine)
    report.write_csv(csv, measured, run)
    print(f"rows: {csv}")
    if png is not None:
        rows.plot(png, measured, machine)
        print(f"plot: {png}")
    return 0


def measure_all(
    args: argparse.Namespace,
    device: torch.device,
    dtypes: list[torch.dtype],
    runnable: list[Peer],
    copy_gb_per_s: float,
) -> tuple[list[Row], dict[str, list[str]]]:
    """Return a row for each implementation in each case, and what failed -> in which cases.

    The rows of a vocabulary size are printed when it is done.
    """
    from tqdm import tqdm

    def peers_at(vocab_size: int, passes: str) -> list[Peer]:
        place = Place(vocab_size == HEADLINE, passes == BACKWARD, all_scored=False)
        return [peer for peer in runnable if peer.serves(place)]

    efforts = {vocab_size: effort_at(vocab_size, args.quick, device) for vocab_size in args.vocab}
    steps = sum(
        (1 + effort.rounds) * len(peers_at(vocab_size, passes))
        for vocab_size, effort in efforts.items()
        for passes in (FORWARD, BACKWARD)
    )
    generator = torch.Generator(device).manual_seed(args.seed)
    every: list[Row] = []
    with tqdm(total=steps * len(dtypes) * len(args.share), unit="run", leave=False) as progress:
        session = Session(device, progress.update)
        for vocab_size, effort in efforts.items():
            new: list[Row] = []
            for dtype in dtypes:
                torch.compiler.reset()  # it compiles for eight shapes and no more
                for batch in cases.make_batches(vocab_size, dtype, args.share, effort, generator):
                    for passes in (FORWARD, BACKWARD):
                        progress.set_description(f"{batch}, {passes}")
                        of_case = peers_at(vocab_size, passes)
                        new += cases.measure_case(
                            session, batch, passes, of_case, effort, copy_gb_per_s
                        )
            tqdm.write(f"\nV = {vocab_size}\n{rows.table(new)}", file=sys.stdout)
            every += new
    return every, session.failures


def effort_at(vocab_size: int, quick: bool, device: torch.device) -> Effort:
    """Return the effort at one vocabulary size, with a batch that memory has room for."""
    at_headline, elsewhere = EFFORTS[device.type]
    effort = at_headline if vocab_size == HEADLINE else elsewhere
    if quick:
        effort = QUICK_EFFORTS[device.type]
    most = measure.free_bytes(device) // BYTES_PER_LOGIT
    return dataclasses.replace(effort, num_logits=min(effort.num_logits, most))


def output_paths(args: argparse.Namespace, machine: str) -> tuple[Path, Path | None]:
    whole = command.is_whole(args, parse_args([]), "quick", "vocab", "dtype", "share")
    return command.output_paths(args, report.file_stem(machine), whole)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = command.parser(
        "Speed, memory and accuracy of log-probabilities over vocabulary sizes.",
        device=True,
        share=True,
    )
    parser.add_argument("--quick", action="store_true", help="a tenth: two sizes, little repeated")
    parser.add_argument("--vocab", type=int, nargs="+", help=f"by default {VOCAB_SIZES}")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.set_defaults(share=SHARES)
    args = command.check(parser.parse_args(argv), parser)
    if args.vocab is None:
        args.vocab = QUICK_VOCAB_SIZES if args.quick else VOCAB_SIZES
    if min(args.vocab) < 2:
        parser.error(f"--vocab must be 2 or more, got {min(args.vocab)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
