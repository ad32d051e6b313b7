"""Throughput, memory and accuracy over vocabulary sizes; `python benchmarks/bench_vocab.py --help`.

Results are compared with float64 first: where they are wrong nothing is timed, and it exits with 1.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import re
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
from report import BACKWARD, FORWARD, Row

HEADLINE = 128256
VOCAB_SIZES = [6400, 32000, 50257, HEADLINE, 151936, 262144]
QUICK_VOCAB_SIZES = [32000, HEADLINE]
DTYPES = ["bfloat16", "float32"]
SHARES = [1.0, 0.5]

# At the headline, and elsewhere. Every buffer of a batch is larger than 32 MiB: from there on glibc
# asks the operating system for fresh pages each time, as it does for batches of everyday size.
EFFORTS = {
    "cpu": (Effort(2**25, 3, 0.2, 4), Effort(9 * 2**21, 1, 0.05, 2)),
    "cuda": (Effort(2**29, 3, 0.1, 4), Effort(2**28, 1, 0.1, 2)),
}
QUICK_EFFORTS = {"cpu": Effort(9 * 2**21, 1, 0.02, 2), "cuda": Effort(2**27, 1, 0.02, 2)}
BYTES_PER_LOGIT = 64  # of memory: the hungriest implementation, its batch, and room to spare
COPY_NUMEL = {"cpu": 2**26, "cuda": 2**28}
RESULTS = Path(__file__).resolve().parent / "results"


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    args = parse_args(argv)
    require_bench_extra(["tqdm"] if args.no_plot else ["tqdm", "matplotlib"])
    from tqdm import tqdm

    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    runnable, not_run = peers.collect(device, args.backend)
    dtypes = [getattr(torch, name) for name in args.dtype]
    wrong = accuracy.complaints([peer for peer in runnable if peer.ours], dtypes, device)
    if wrong:
        print("wrong results, so nothing is timed:", *wrong, sep="\n  ", file=sys.stderr)
        return 1

    machine = measure.machine_name(device)
    copy_numel = min(COPY_NUMEL[device.type], measure.free_bytes(device) // 32)
    copy_gb_per_s = measure.copy_gb_per_s(device, numel=copy_numel, min_run_s=0.3)
    run: dict[str, str | int | float] = dict(
        machine=machine,
        copy_gb_per_s=round(copy_gb_per_s, 2),
        torch=torch.__version__,
        triton=version("triton"),
        seed=args.seed,
        command=shlex.join(
            ["python", "benchmarks/bench_vocab.py", *(sys.argv[1:] if argv is None else argv)]
        ),
    )
    print(*(f"{name}: {value}" for name, value in run.items()), "", sep="\n")
    print(*(f"{peer.name}: {peers.DESCRIPTIONS[peer.name]}" for peer in runnable), sep="\n")

    efforts = {vocab_size: effort_at(vocab_size, args.quick, device) for vocab_size in args.vocab}
    at = {
        (vocab_size, passes): [
            peer
            for peer in runnable
            if not peer.only_headline_backward or (vocab_size, passes) == (HEADLINE, BACKWARD)
        ]
        for vocab_size in args.vocab
        for passes in (FORWARD, BACKWARD)
    }
    steps = sum(
        len(some) * (1 + efforts[vocab_size].rounds) for (vocab_size, _), some in at.items()
    )
    generator = torch.Generator(device).manual_seed(args.seed)
    rows: list[Row] = []
    failures: dict[str, list[str]] = {}
    with tqdm(total=steps * len(dtypes) * len(args.share), unit="run", leave=False) as progress:
        for vocab_size, effort in efforts.items():
            new: list[Row] = []
            for dtype in dtypes:
                torch.compiler.reset()  # it gives up after eight shapes
                for batch in make_batches(vocab_size, dtype, args.share, effort, generator):
                    for passes in (FORWARD, BACKWARD):
                        progress.set_description(f"{batch}, {passes}")
                        new += measure_case(
                            batch,
                            passes,
                            at[vocab_size, passes],
                            effort,
                            copy_gb_per_s,
                            failures,
                            progress.update,
                        )
            tqdm.write(f"\nV = {vocab_size}\n{report.table(new)}", file=sys.stdout)
            rows += new

    not_run |= {
        what: f"in {len(where)} cases, {where[0]} first" for what, where in failures.items()
    }
    print("", *(f"not run: {what}: {why}" for what, why in not_run.items()), sep="\n")
    print(
        "", report.NOTES, "", goals.goals_text(goals.judge(rows, HEADLINE), HEADLINE), "", sep="\n"
    )
    slug = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    whole = not args.quick and (args.vocab, args.dtype, args.share) == (VOCAB_SIZES, DTYPES, SHARES)
    csv = args.csv or RESULTS / (f"{slug}.csv" if whole else f"{slug}.local.csv")
    report.write_csv(csv, rows, run)
    print(f"rows: {csv}")
    if not args.no_plot:
        png = args.plot or csv.with_suffix(".png")
        report.plot(png, rows, machine)
        print(f"plot: {png}")
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Speed, memory and accuracy of log-probabilities over vocabulary sizes."
    )
    parser.add_argument("--quick", action="store_true", help="two vocabulary sizes, small batches")
    parser.add_argument("--vocab", type=int, nargs="+", help=f"sizes; else {VOCAB_SIZES}")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument(
        "--share", type=float, nargs="+", default=SHARES, help="of the rows scored, in (0, 1]"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", choices=["auto", "triton", "torch"], default="auto")
    parser.add_argument("--seed", type=int, default=None, help="of the logits; else a fresh one")
    parser.add_argument("--csv", type=Path, help="else results/<machine>.csv, here")
    parser.add_argument("--plot", type=Path, help="PNG; else beside the CSV file")
    parser.add_argument("--no-plot", action="store_true")
    args = parser.parse_args(argv)
    args.vocab = args.vocab or (QUICK_VOCAB_SIZES if args.quick else VOCAB_SIZES)
    args.seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    if torch.device(args.device).type not in EFFORTS:
        parser.error(f"--device must be a cpu or cuda device, got {args.device}")
    if min(args.vocab) < 2 or not all(0 < share <= 1 for share in args.share):
        parser.error("--vocab takes sizes from 2 on, --share numbers in (0, 1]")
    return args


def require_bench_extra(packages: list[str]) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"{' and '.join(missing)} not installed: pip install dpo-triton[bench]"
            + (" (or pass --no-plot)" if missing == ["matplotlib"] else "")
        )


def effort_at(vocab_size: int, quick: bool, device: torch.device) -> Effort:
    """The effort at one vocabulary size, with a batch that memory has room for."""
    at_headline, elsewhere = EFFORTS[device.type]
    effort = at_headline if vocab_size == HEADLINE else elsewhere
    if quick:
        effort = QUICK_EFFORTS[device.type]
    most = measure.free_bytes(device) // BYTES_PER_LOGIT
    return dataclasses.replace(effort, num_logits=min(effort.num_logits, most))


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
