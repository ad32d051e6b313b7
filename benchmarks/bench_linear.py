"""Time, memory and accuracy of heads, hidden states to log-probabilities, beside the peers;
`python benchmarks/bench_linear.py --help`.

Results are compared with float64 first: where they are wrong nothing is timed, and it exits with 1.
"""

import argparse
import dataclasses
import secrets
import shlex
import sys
from pathlib import Path

import torch

# The checkout's package, whether or not another one is installed: these are its figures.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import linear_cases as cases
import linear_goals
import linear_model
import linear_peers
import linear_report as report
import measure
from bench_vocab import RESULTS, require_bench_extra, version
from goals import goal_lines
from linear_cases import Shape
from linear_peers import LinearPeer
from linear_report import FROZEN, TRAINED, LinearRow
from report import BACKWARD, FORWARD, file_stem, write_csv

# 2048 tokens, but where V is so large that a batch of them would take minutes on two cores.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("SmolLM2-135M", 576, 49152, 4, 512),
        Shape("MiniMind", 768, 6400, 4, 512),
        Shape("Qwen2.5-0.5B", 896, 151936, 4, 48),
    )
}
HEADLINE = "SmolLM2-135M"
SHARES = [0.25, linear_goals.SHARE, 1.0]
BFLOAT16_SHARES = [linear_goals.SHARE]  # at the headline
ROUNDS, OTHER_ROUNDS = 3, 1  # samples: where times are judged, and elsewhere
MODES = [(FORWARD, TRAINED), (BACKWARD, TRAINED), (BACKWARD, FROZEN)]
QUICK_SEQ_LEN = 16
MODELLED = (896, 151936)  # H and V of Qwen2.5-0.5B: what the vocabularies come to
VERSIONS = ("triton", "trl", "liger-kernel")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    require_bench_extra(["tqdm"] if args.no_plot else ["tqdm", "matplotlib"])
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    measure.map_buffers()
    runnable, not_run = linear_peers.collect(args.backend)
    by_name = {peer.name: peer for peer in runnable}
    wrong = cases.complaints(
        by_name[linear_peers.OURS],
        by_name[linear_peers.FORMULA],
        [torch.float32, torch.bfloat16],
        device,
    )
    if wrong:
        print("wrong results, so nothing is timed:", *wrong, sep="\n  ", file=sys.stderr)
        return 1

    machine = measure.machine_name(device)
    run: dict[str, str | int | float] = dict(
        machine=machine,
        torch=torch.__version__,
        **{name: version(name) for name in VERSIONS},
        seed=args.seed,
        command=shlex.join(["python", "benchmarks/bench_linear.py", *argv]),
    )
    print(*(f"{name}: {value}" for name, value in run.items()), "", sep="\n")
    print(*(f"{peer.name}: {linear_peers.DESCRIPTIONS[peer.name]}" for peer in runnable), sep="\n")
    others = measure.OtherLoad()
    rows, failures = measure_all(args, device, runnable)
    for what, where in failures.items():
        not_run[what] = f"{len(where)} times, at first with {where[0]}"
    print("", *(f"not run: {name}: {reason}" for name, reason in not_run.items()), sep="\n")
    print("", report.NOTES, sep="\n")
    print(f"other processes: {others.share():.0%} of the cores while this ran", end="\n\n")

    hidden_size, vocab_size = MODELLED
    modelled = linear_model.modelled(
        "Qwen2.5-0.5B", hidden_size, vocab_size, SHARES, {TRAINED: False, FROZEN: True}
    )
    print(f"modelled for a GPU, not measured: H = {hidden_size}, V = {vocab_size}")
    print(linear_model.table(modelled), linear_model.NOTES, sep="\n", end="\n\n")

    goals = linear_goals.judge(rows, HEADLINE)
    print(
        goal_lines(f"goals, {HEADLINE}, float32, forward + backward; errors: all", goals)
        if goals
        else f"goals: none can be judged without {HEADLINE}"
    )
    csv, png = output_paths(args, machine)
    write_csv(csv, rows, run)
    write_csv(csv.with_name(csv.stem + "-modelled.csv"), modelled, {"trl": "1.16.0"})
    print(f"\nrows: {csv}")
    if png is not None:
        report.plot(png, rows, machine)
        print(f"plot: {png}")
    return 0


def measure_all(
    args: argparse.Namespace, device: torch.device, runnable: list[LinearPeer]
) -> tuple[list[LinearRow], dict[str, list[str]]]:
    """Return a row for each implementation in each case, and what failed -> in which cases.

    The rows of a model and dtype are printed when they are done.
    """
    from tqdm import tqdm

    plan = plan_of(args)

    def is_judged(shape: Shape, dtype: torch.dtype, share: float, passes: str, head: str) -> bool:
        at_headline = (shape.name, dtype, passes) == (HEADLINE, torch.float32, BACKWARD)
        return at_headline and (share, head) in linear_goals.JUDGED

    def peers_at(case: tuple[Shape, torch.dtype, float, str, str]) -> list[LinearPeer]:
        is_headline = is_judged(*case) and (case[2], case[4]) == linear_goals.JUDGED[0]
        return [
            peer
            for peer in runnable
            if (case[2] < 1 or not peer.only_some_scored)
            and (is_headline or not peer.only_headline)
        ]

    def rounds_at(case: tuple[Shape, torch.dtype, float, str, str]) -> int:
        return ROUNDS if is_judged(*case) and not args.quick else OTHER_ROUNDS

    every_case = [
        (shape, dtype, share, *mode)
        for shape, dtype, shares in plan
        for share in shares
        for mode in MODES
    ]
    steps = sum((1 + rounds_at(case)) * len(peers_at(case)) for case in every_case)
    generator = torch.Generator(device).manual_seed(args.seed)
    rows: list[LinearRow] = []
    failures: dict[str, list[str]] = {}
    with tqdm(total=steps, unit="run", leave=False) as progress:
        for shape, dtype, shares in plan:
            new: list[LinearRow] = []
            for batch in cases.make_batches(shape, dtype, shares, generator):
                for passes, head in MODES:
                    progress.set_description(f"{batch}, {passes}")
                    case = (shape, dtype, batch.share, passes, head)
                    new += cases.measure_case(
                        batch,
                        passes,
                        head,
                        peers_at(case),
                        rounds_at(case),
                        failures,
                        progress.update,
                    )
            sizes = f"H = {shape.hidden_size}, V = {shape.vocab_size}"
            heading = f"\n{shape.name}: {sizes}, {shape.batch * shape.seq_len} tokens"
            tqdm.write(f"{heading}\n{report.table(new)}", file=sys.stdout)
            rows += new
    return rows, failures


def plan_of(args: argparse.Namespace) -> list[tuple[Shape, torch.dtype, list[float]]]:
    """What is measured: a model's shape, a dtype, and the shares of rows scored."""
    shapes = [SHAPES[name] for name in args.model]
    if args.quick:
        shapes = [dataclasses.replace(s, seq_len=min(s.seq_len, QUICK_SEQ_LEN)) for s in shapes]
    plan = [(shape, torch.float32, args.share) for shape in shapes]
    bfloat16_shares = [share for share in BFLOAT16_SHARES if share in args.share]
    plan += [(s, torch.bfloat16, bfloat16_shares) for s in shapes if s.name == HEADLINE]
    return [(shape, dtype, shares) for shape, dtype, shares in plan if shares]


def output_paths(args: argparse.Namespace, machine: str) -> tuple[Path, Path | None]:
    """Return where the CSV file and the plot go; git ignores the names that a partial run gets."""
    name = f"linear-{file_stem(machine)}"
    if args.quick or (args.model, args.share) != (list(SHAPES), SHARES):
        name += ".local"
    csv = args.csv or RESULTS / f"{name}.csv"
    return csv, None if args.no_plot else args.plot or csv.with_suffix(".png")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time, memory and accuracy of heads: hidden states to log-probabilities."
    )
    parser.add_argument(
        "--quick", action="store_true", help="few tokens, once: figures mean little"
    )
    parser.add_argument("--model", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument(
        "--share", type=float, nargs="+", default=SHARES, help="of the rows scored, in (0, 1]"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", choices=["auto", "triton", "cpu", "torch"], default="auto")
    parser.add_argument("--seed", type=int, help="of the batches; by default a fresh one")
    parser.add_argument("--csv", type=Path, help="default: benchmarks/results/linear-<machine>.csv")
    parser.add_argument("--plot", type=Path, help="PNG; by default beside the CSV file")
    parser.add_argument("--no-plot", action="store_true")
    args = parser.parse_args(argv)
    if args.seed is None:
        args.seed = secrets.randbelow(2**31)
    if torch.device(args.device).type not in ("cpu", "cuda"):
        parser.error(f"--device must be a cpu or cuda device, got {args.device}")
    if not all(0 < share <= 1 for share in args.share):
        parser.error("--share must be in (0, 1]")
    return args


if __name__ == "__main__":
    sys.exit(main())
