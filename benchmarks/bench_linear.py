"""Time, memory and accuracy of heads, hidden states to log-probabilities, beside the peers;
`python benchmarks/bench_linear.py --help`.

Results are compared with float64 first: where they are wrong nothing is timed, and it exits with 1.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch

if not __package__:  # a script: the checkout's packages, and none of benchmarks/ at the top level
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.common import command, measure, report
from benchmarks.common.batches import Shape
from benchmarks.common.cases import Effort, Plan, Setting, measure_all
from benchmarks.common.check import check_batches, complaints
from benchmarks.common.command import Run
from benchmarks.common.peers import OURS
from benchmarks.common.report import BOTH, FORWARD
from benchmarks.head import model, rows
from benchmarks.head.peers import FORMULA, candidates, upstream_of_simpo
from benchmarks.head.rows import FROZEN, SHARE, TRAINED, rows_of

# 2048 tokens, but where V is so large that a batch of them would take minutes on two cores.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape(4, 512, 49152, 576, "SmolLM2-135M"),
        Shape(4, 512, 6400, 768, "MiniMind"),
        Shape(4, 48, 151936, 896, "Qwen2.5-0.5B"),
    )
}
# On a GPU: the hidden sizes of models of half a billion and of eight billion parameters, from a
# micro-batch to what a step may score at once.
GPU_SHAPES = {
    shape.name: shape
    for hidden_size in (896, 4096)
    for shape in (
        Shape(2, 512, 151936, hidden_size, f"H{hidden_size}-1k"),
        Shape(8, 1024, 151936, hidden_size, f"H{hidden_size}-8k"),
        Shape(64, 1024, 151936, hidden_size, f"H{hidden_size}-64k"),
    )
}
GPU_SHARES = [1.0]
HEADLINE = "SmolLM2-135M"
SHARES = [0.25, SHARE, 1.0]
BFLOAT16_SHARES = [SHARE]  # at the headline
REPEATED, ONCE = Effort(3, None), Effort(1, None)  # where times are judged, and elsewhere
MODES = [(FORWARD, TRAINED), (BOTH, TRAINED), (BOTH, FROZEN)]
QUICK_SEQ_LEN = 16
MODELLED = (896, 151936)  # H and V of Qwen2.5-0.5B: what today's vocabularies come to


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    run = Run("bench_linear", parse_args, argv, "tqdm")
    measure.map_buffers()
    args, device = run.args, run.device
    runnable = run.collect(candidates(args.backend))
    by_name = {peer.name: peer for peer in runnable}
    dtypes = [torch.float32, torch.bfloat16]
    checked = check_batches(dtypes, device, hidden_size=24, upstream=upstream_of_simpo)
    wrong = complaints([by_name[OURS]], by_name[FORMULA], checked, device)
    if wrong:
        return run.refuse(wrong)

    run.announce("torch", "triton", "numba", "trl", "liger-kernel")
    plans = [plan for plan in plans_of(args) if has_room(plan.shape, device)]
    found = measure_all(plans, runnable, run, rows_of)
    run.conclude(rows.NOTES)

    hidden_size, vocab_size = MODELLED
    modelled = model.modelled("Qwen2.5-0.5B", hidden_size, vocab_size, SHARES)
    print(f"modelled for a GPU, not measured: H = {hidden_size}, V = {vocab_size}")
    print(report.table(modelled), model.NOTES, sep="\n", end="\n\n")
    heading = f"{HEADLINE}, float32, forward + backward; errors: all"
    run.judge(heading, rows.judge(found, HEADLINE), HEADLINE)
    name = f"linear-{report.file_stem(run.machine)}"
    return run.write(name, found, {"": rows.plot}, {"-modelled": modelled})


def plans_of(args: argparse.Namespace) -> list[Plan]:
    """What is measured."""
    shapes = [{**SHAPES, **GPU_SHAPES}[name] for name in args.model]
    if args.quick:
        shapes = [shape._replace(seq_len=min(shape.seq_len, QUICK_SEQ_LEN)) for shape in shapes]
    if args.device.startswith("cuda"):
        return [make_plan(shape, torch.bfloat16, args.share, args) for shape in shapes]
    plans = [make_plan(shape, torch.float32, args.share, args) for shape in shapes]
    shares = [share for share in BFLOAT16_SHARES if share in args.share]
    headline = [shape for shape in shapes if shape.name == HEADLINE and shares]
    return plans + [make_plan(shape, torch.bfloat16, shares, args) for shape in headline]


def make_plan(
    shape: Shape, dtype: torch.dtype, shares: list[float], args: argparse.Namespace
) -> Plan:
    settings = []
    for share, (passes, head) in itertools.product(shares, MODES):
        at_headline = (shape.name, dtype, passes) == (HEADLINE, torch.float32, BOTH)
        is_judged = at_headline and (share, head) in rows.JUDGED
        is_quoted = is_judged and (share, head) == rows.JUDGED[0]
        is_repeated = (is_judged or args.device.startswith("cuda")) and not args.quick
        effort = REPEATED if is_repeated else ONCE
        settings.append(Setting(share, passes, effort, head == TRAINED, is_quoted))
    sizes = f"H = {shape.hidden_size}, V = {shape.vocab_size}"
    group = f"{shape.name}: {sizes}, {shape.batch * shape.seq_len} tokens, {dtype}"
    return Plan(group, shape, dtype, settings, upstream_of_simpo)


def has_room(shape: Shape, device: torch.device) -> bool:
    """Whether the float64 truth fits beside the batch; says so where it does not."""
    tokens = shape.batch * shape.seq_len
    of_truth = 8 * shape.hidden_size * (3 * shape.vocab_size + 4 * tokens)
    of_logits = 4 * 8 * shape.seq_len * shape.vocab_size  # a sequence's, and what is made of them
    if of_truth + of_logits <= measure.free_bytes(device):
        return True
    print(f"left out: {shape.name} needs {(of_truth + of_logits) / 2**30:.0f} GiB of memory")
    return False


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
