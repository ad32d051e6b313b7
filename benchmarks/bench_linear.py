"""Time, memory and accuracy of heads, hidden states to log-probabilities, beside the peers;
`python benchmarks/bench_linear.py --help`.

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
from benchmarks.common.peers import OURS, Peer, Place
from benchmarks.common.report import BACKWARD, FORWARD
from benchmarks.head import cases, model, rows
from benchmarks.head.cases import Shape
from benchmarks.head.peers import FORMULA, candidates
from benchmarks.head.rows import FROZEN, SHARE, TRAINED, Row

# 2048 tokens, but where V is so large that a batch of them would take minutes on two cores.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("SmolLM2-135M", 576, 49152, 4, 512),
        Shape("MiniMind", 768, 6400, 4, 512),
        Shape("Qwen2.5-0.5B", 896, 151936, 4, 48),
    )
}
# On a GPU: the hidden sizes of models of half a billion and of eight billion parameters, from a
# micro-batch to what a step may score at once.
GPU_SHAPES = {
    shape.name: shape
    for hidden_size in (896, 4096)
    for shape in (
        Shape(f"H{hidden_size}-1k", hidden_size, 151936, 2, 512),
        Shape(f"H{hidden_size}-8k", hidden_size, 151936, 8, 1024),
        Shape(f"H{hidden_size}-64k", hidden_size, 151936, 64, 1024),
    )
}
GPU_SHARES = [1.0]
HEADLINE = "SmolLM2-135M"
SHARES = [0.25, SHARE, 1.0]
BFLOAT16_SHARES = [SHARE]  # at the headline
ROUNDS, OTHER_ROUNDS = 3, 1  # samples: where times are judged, and elsewhere
MODES = [(FORWARD, TRAINED), (BACKWARD, TRAINED), (BACKWARD, FROZEN)]
QUICK_SEQ_LEN = 16
MODELLED = (896, 151936)  # H and V of Qwen2.5-0.5B: what today's vocabularies come to

Case = tuple[Shape, torch.dtype, float, str, str]  # and share, passes, head


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    command.require_bench_extra(args, "tqdm")
    device = torch.device(args.device)
    if device.index is not None:
        torch.cuda.set_device(device)
    measure.map_buffers()
    runnable, not_run = peers.collect(candidates(args.backend))
    by_name = {peer.name: peer for peer in runnable}
    dtypes = [torch.float32, torch.bfloat16]
    wrong = cases.complaints(by_name[OURS], by_name[FORMULA], dtypes, device)
    if wrong:
        return command.refuse(wrong)

    machine = measure.machine_name(device)
    run: dict[str, str | int | float] = dict(
        machine=machine,
        torch=torch.__version__,
        **command.versions("triton", "trl", "liger-kernel"),
        seed=args.seed,
        command=command.command_line("bench_linear", argv),
    )
    command.announce(run, {peer.name: peer.description for peer in runnable})
    others = measure.OtherLoad()
    measured, failures = measure_all(args, device, runnable)
    command.print_not_run(not_run, failures)
    print("", rows.NOTES, sep="\n")
    print(f"other processes: {others.share():.0%} of the cores while this ran", end="\n\n")

    hidden_size, vocab_size = MODELLED
    modelled = model.modelled(
        "Qwen2.5-0.5B", hidden_size, vocab_size, SHARES, {TRAINED: False, FROZEN: True}
    )
    print(f"modelled for a GPU, not measured: H = {hidden_size}, V = {vocab_size}")
    print(model.COLUMNS.table(modelled), model.NOTES, sep="\n", end="\n\n")

    heading = f"{HEADLINE}, float32, forward + backward; errors: all"
    print(goals.text(heading, rows.judge(measured, HEADLINE), HEADLINE))
    csv, png = output_paths(args, machine)
    report.write_csv(csv, measured, run)
    modelled_csv = csv.with_name(csv.stem + "-modelled.csv")
    report.write_csv(modelled_csv, modelled, {"trl": model.TRL_VERSION})
    print(f"\nrows: {csv}")
    if png is not None:
        rows.plot(png, measured, machine)
        print(f"plot: {png}")
    return 0


def measure_all(
    args: argparse.Namespace, device: torch.device, runnable: list[Peer]
) -> tuple[list[Row], dict[str, list[str]]]:
    """Return a row for each implementation in each case, and what failed -> in which cases.

    The rows of a model and dtype are printed when they are done.
    """
    from tqdm import tqdm

    def is_judged(case: Case) -> bool:
        shape, dtype, share, passes, head = case
        at_headline = (shape.name, dtype, passes) == (HEADLINE, torch.float32, BACKWARD)
        return at_headline and (share, head) in rows.JUDGED

    def peers_at(case: Case) -> list[Peer]:
        _, _, share, passes, head = case
        is_headline = is_judged(case) and (share, head) == rows.JUDGED[0]
        place = Place(is_headline, passes == BACKWARD, all_scored=share == 1)
        return [peer for peer in runnable if peer.serves(place)]

    def rounds_at(case: Case) -> int:
        is_repeated = is_judged(case) or device.type == "cuda"
        return ROUNDS if is_repeated and not args.quick else OTHER_ROUNDS

    plan = [one for one in plan_of(args) if has_room(one[0], device)]
    every_case = [
        (shape, dtype, share, *mode)
        for shape, dtype, shares in plan
        for share in shares
        for mode in MODES
    ]
    steps = sum((1 + rounds_at(case)) * len(peers_at(case)) for case in every_case)
    generator = torch.Generator(device).manual_seed(args.seed)
    every: list[Row] = []
    with tqdm(total=steps, unit="run", leave=False) as progress:
        session = Session(device, progress.update, warms_up=False)
        for shape, dtype, shares in plan:
            new: list[Row] = []
            for batch in cases.make_batches(shape, dtype, shares, generator):
                for passes, head in MODES:
                    progress.set_description(f"{batch}, {passes}")
                    case = (shape, dtype, batch.share, passes, head)
                    new += cases.measure_case(
                        session, batch, passes, head, peers_at(case), rounds_at(case)
                    )
            sizes = f"H = {shape.hidden_size}, V = {shape.vocab_size}"
            heading = f"\n{shape.name}: {sizes}, {shape.batch * shape.seq_len} tokens"
            tqdm.write(f"{heading}\n{rows.table(new)}", file=sys.stdout)
            every += new
    return every, session.failures


def plan_of(args: argparse.Namespace) -> list[tuple[Shape, torch.dtype, list[float]]]:
    """What is measured: a model's shape, a dtype, and the shares of rows scored."""
    shapes = [{**SHAPES, **GPU_SHAPES}[name] for name in args.model]
    if args.quick:
        shapes = [dataclasses.replace(s, seq_len=min(s.seq_len, QUICK_SEQ_LEN)) for s in shapes]
    if args.device.startswith("cuda"):
        return [(shape, torch.bfloat16, args.share) for shape in shapes]
    plan = [(shape, torch.float32, args.share) for shape in shapes]
    bfloat16_shares = [share for share in BFLOAT16_SHARES if share in args.share]
    plan += [(s, torch.bfloat16, bfloat16_shares) for s in shapes if s.name == HEADLINE]
    return [(shape, dtype, shares) for shape, dtype, shares in plan if shares]


def has_room(shape: Shape, device: torch.device) -> bool:
    """Whether the float64 truth fits beside the batch; says so where it does not."""
    tokens = shape.batch * shape.seq_len
    of_truth = 8 * shape.hidden_size * (3 * shape.vocab_size + 4 * tokens)
    of_logits = 4 * 8 * shape.seq_len * shape.vocab_size  # a sequence's, and what is made of them
    if of_truth + of_logits <= measure.free_bytes(device):
        return True
    print(f"left out: {shape.name} needs {(of_truth + of_logits) / 2**30:.0f} GiB of memory")
    return False


def output_paths(args: argparse.Namespace, machine: str) -> tuple[Path, Path | None]:
    whole = command.is_whole(args, parse_args([]), "quick", "model", "share")
    return command.output_paths(args, f"linear-{report.file_stem(machine)}", whole)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = command.parser(
        "Time, memory and accuracy of heads: hidden states to log-probabilities.",
        device=True,
        share=True,
    )
    parser.add_argument(
        "--quick", action="store_true", help="few tokens, once: figures mean little"
    )
    parser.add_argument(
        "--model",
        nargs="+",
        choices=[*SHAPES, *GPU_SHAPES],
        help=f"by default on a CPU {', '.join(SHAPES)}, on a GPU the others",
    )
    args = parser.parse_args(argv)
    on_gpu = args.device.startswith("cuda")
    args.model = args.model or list(GPU_SHAPES if on_gpu else SHAPES)
    args.share = args.share or (GPU_SHARES if on_gpu else SHARES)
    return command.check(args, parser)


if __name__ == "__main__":
    sys.exit(main())
