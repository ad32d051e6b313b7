"""Throughput, memory and accuracy over vocabulary sizes; `python benchmarks/bench_vocab.py --help`.

Results are compared with float64 first: where they are wrong nothing is timed, and it exits with 1.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import secrets
import shlex
import sys
from pathlib import Path

import torch

# The checkout's package, whether or not another one is installed: these are its figures.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import accuracy
import goals
import measure
import peers
import report
from cases import Effort, make_batches, measure_case
from peers import Peer
from report import BACKWARD, FORWARD, Row

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
RESULTS = Path(__file__).resolve().parent / "results"


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    require_bench_extra(["tqdm"] if args.no_plot else ["tqdm", "matplotlib"])
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    measure.map_buffers()
    runnable, not_run = peers.collect(device, args.backend)
    dtypes = [getattr(torch, name) for name in args.dtype]
    wrong = accuracy.complaints([peer for peer in runnable if peer.ours], dtypes, device)
    if wrong:
        print("wrong results, so nothing is timed:", *wrong, sep="\n  ", file=sys.stderr)
        return 1

    machine = measure.machine_name(device)
    copy_numel = min(COPY_NUMEL[device.type], measure.free_bytes(device) // 32)
    copy_gb_per_s = measure.copy_gb_per_s(device, numel=copy_numel, min_run_s=0.5)
    run: dict[str, str | int | float] = dict(
        machine=machine,
        copy_gb_per_s=round(copy_gb_per_s, 2),
        torch=torch.__version__,
        triton=version("triton"),
        seed=args.seed,
        command=shlex.join(["python", "benchmarks/bench_vocab.py", *argv]),
    )
    print(*(f"{name}: {value}" for name, value in run.items()), "", sep="\n")
    print(*(f"{peer.name}: {peers.DESCRIPTIONS[peer.name]}" for peer in runnable), sep="\n")
    others = measure.OtherLoad()
    rows, failures = measure_all(args, device, dtypes, runnable, copy_gb_per_s)
    for what, where in failures.items():
        not_run[what] = f"{len(where)} times, at first with {where[0]}"
    print("", *(f"not run: {name}: {reason}" for name, reason in not_run.items()), sep="\n")
    print("", report.NOTES, sep="\n")
    print(f"other processes: {others.share():.0%} of the cores while this ran", end="\n\n")
    print(goals.goals_text(goals.judge(rows, HEADLINE), HEADLINE), end="\n\n")

    csv, png = output_paths(args, machine)
    report.write_csv(csv, rows, run)
    print(f"rows: {csv}")
    if png is not None:
        report.plot(png, rows, machine)
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
        everyone = (vocab_size, passes) == (HEADLINE, BACKWARD)
        return [peer for peer in runnable if everyone or not peer.only_headline_backward]

    efforts = {vocab_size: effort_at(vocab_size, args.quick, device) for vocab_size in args.vocab}
    steps = sum(
        (1 + effort.rounds) * len(peers_at(vocab_size, passes))
        for vocab_size, effort in efforts.items()
        for passes in (FORWARD, BACKWARD)
    )
    generator = torch.Generator(device).manual_seed(args.seed)
    rows: list[Row] = []
    failures: dict[str, list[str]] = {}
    with tqdm(total=steps * len(dtypes) * len(args.share), unit="run", leave=False) as progress:
        for vocab_size, effort in efforts.items():
            new: list[Row] = []
            for dtype in dtypes:
                torch.compiler.reset()  # it compiles for eight shapes and no more
                for batch in make_batches(vocab_size, dtype, args.share, effort, generator):
                    for passes in (FORWARD, BACKWARD):
                        progress.set_description(f"{batch}, {passes}")
                        new += measure_case(
                            batch,
                            passes,
                            peers_at(vocab_size, passes),
                            effort,
                            copy_gb_per_s,
                            failures,
                            progress.update,
                        )
            tqdm.write(f"\nV = {vocab_size}\n{report.table(new)}", file=sys.stdout)
            rows += new
    return rows, failures


def effort_at(vocab_size: int, quick: bool, device: torch.device) -> Effort:
    """Return the effort at one vocabulary size, with a batch that memory has room for."""
    at_headline, elsewhere = EFFORTS[device.type]
    effort = at_headline if vocab_size == HEADLINE else elsewhere
    if quick:
        effort = QUICK_EFFORTS[device.type]
    most = measure.free_bytes(device) // BYTES_PER_LOGIT
    return dataclasses.replace(effort, num_logits=min(effort.num_logits, most))


def output_paths(args: argparse.Namespace, machine: str) -> tuple[Path, Path | None]:
    """Return where the CSV file and the plot go; git ignores the names that a partial run gets."""
    name = report.file_stem(machine)
    if args.quick or (args.vocab, args.dtype, args.share) != (VOCAB_SIZES, DTYPES, SHARES):
        name += ".local"
    csv = args.csv or RESULTS / f"{name}.csv"
    return csv, None if args.no_plot else args.plot or csv.with_suffix(".png")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Speed, memory and accuracy of log-probabilities over vocabulary sizes."
    )
    parser.add_argument("--quick", action="store_true", help="a tenth: two sizes, little repeated")
    parser.add_argument("--vocab", type=int, nargs="+", help=f"by default {VOCAB_SIZES}")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument(
        "--share", type=float, nargs="+", default=SHARES, help="of the rows scored, in (0, 1]"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", choices=["auto", "triton", "cpu", "torch"], default="auto")
    parser.add_argument("--seed", type=int, help="of the batches; by default a fresh one")
    parser.add_argument("--csv", type=Path, help="by default benchmarks/results/<machine>.csv")
    parser.add_argument("--plot", type=Path, help="PNG; by default beside the CSV file")
    parser.add_argument("--no-plot", action="store_true")
    args = parser.parse_args(argv)
    if args.vocab is None:
        args.vocab = QUICK_VOCAB_SIZES if args.quick else VOCAB_SIZES
    if args.seed is None:
        args.seed = secrets.randbelow(2**31)
    if torch.device(args.device).type not in EFFORTS:
        parser.error(f"--device must be a cpu or cuda device, got {args.device}")
    if min(args.vocab) < 2 or not all(0 < share <= 1 for share in args.share):
        parser.error("--vocab must be 2 or more, and --share in (0, 1]")
    return args


def require_bench_extra(packages: list[str]) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"{' and '.join(missing)} not found: pip install dpo-triton[bench]"
            + (", or pass --no-plot" if missing == ["matplotlib"] else "")
        )


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
