"""Preference training of a causal LM, end to end: on a CPU in minutes, without making logits.

    python examples/train_dpo.py                                # SmolLM2-135M, preferences.jsonl
    python examples/train_dpo.py --data pairs.jsonl.gz --loss sigmoid_norm --beta 5 --steps 60
    python examples/train_dpo.py --resume                       # where the last checkpoint was
    python examples/train_dpo.py --compare 5                    # beside materialised logits

The forms of a row of the data are in the documentation of dpo_triton.data.parse_pair. The
reference is the model as it was loaded; its log-probabilities are computed once and kept. The
folder --output gets tokens/, ref_logps.safetensors, checkpoint.pt, report.json, training.png, and
in model/ what was trained: a LoRA adapter, or with --full all. Either is a --model of a next run.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import command_line
import torch
from causal_lm import CURE
from checkpoints import Checkpoint, NotFinite, Step, locked
from comparison import Compared, compare, in_words, print_comparison
from preference_training import (
    Evaluation,
    Options,
    evaluate,
    fused_scorer,
    preference_loss,
    score_rows,
    train,
    verdict,
)
from preparation import Setup, prepare

from dpo_triton.data import file_hash
from dpo_triton.losses import LOSSES
from dpo_triton.precompute import RefLogps

# Options that decide the losses.
SETTINGS = ("model", "data", "eval_data", "holdout", "limit", "skip_bad_rows", "max_length")
SETTINGS += ("loss", "beta", "loss_option", "lr", "steps", "batch_size", "accumulate", "dropout")
SETTINGS += ("full", "lora_rank", "seed")
MODULES = ("transformers", "peft", "safetensors", "tqdm", "matplotlib")
LABELS = {
    "loss": "loss",
    "margin": "reward margin",
    "reward_accuracy": "reward of chosen > of rejected",
    "sum_accuracy": "log p of chosen larger, sum",
    "mean_accuracy": "log p of chosen larger, mean",
}


def run(args: argparse.Namespace) -> int:
    """Train, evaluate, and write all results; return 1 if --compare finds a difference."""
    from training_plot import plot

    began = time.perf_counter()
    options, settings = options_of(args), settings_of(args)
    checkpoint = Checkpoint(args.output / "checkpoint.pt", args.save_every, settings)
    if checkpoint.path.exists() and not args.resume:
        raise ValueError(
            f"--output {args.output} has the checkpoint of a run; pass --resume to go on with it, "
            "or another --output, or delete it"
        )
    if checkpoint.path.exists():
        checkpoint.read()  # complains before anything is loaded
    setup = prepare(args)
    compared = []
    if args.compare:
        compared = compare(setup, dataclasses.replace(options, steps=args.compare), args.backend)
        if not print_comparison(*compared):
            return 1
    steps = train(
        setup.model,
        setup.train_rows,
        setup.train_ref,
        options,
        fused_scorer(args.backend),
        checkpoint=checkpoint,
        resume=args.resume,
    )
    embedding = {} if args.full else dict(save_embedding_layers=False)  # no adapter is there
    setup.model.save_pretrained(args.output / "model", **embedding)
    setup.tokenizer.save_pretrained(args.output / "model")

    # The policy before its first step is the reference.
    before, rows = setup.held_out_ref, setup.held_out_rows
    after, evaluations = before, []
    if len(rows):
        after = score_rows(setup.model, rows, args.batch_size, args.backend, "evaluate")
        evaluations = [evaluate(options, policy, before) for policy in (before, after)]
    seconds = time.perf_counter() - began
    write_report(args, setup, steps, evaluations, compared, seconds)
    title = f"{args.loss}, beta {args.beta:g}, lr {args.lr:g}, seed {args.seed}: "
    title += f"{len(setup.train_rows)} pairs, {len(rows)} held out"
    if compared:
        title += f"\n{in_words(*compared)}"
    plot(args.output / "training.png", steps, evaluations, before, after, title)
    times = len(steps) * args.batch_size / len(setup.train_rows)
    in_steps = sum(step.seconds for step in steps)
    print(f"\n{len(setup.train_rows)} pairs, each trained on {times:.1f} times, in {seconds:.0f} s,"
          f" {in_steps:.0f} s in the steps; see {args.output}")  # fmt: skip
    if compared:
        print(in_words(*compared))
    if evaluations:
        print_evaluations(evaluations, len(rows))
        print(verdict(evaluations[1].reward_accuracy, len(rows)))
    return 0


def print_evaluations(evaluations: Sequence[Evaluation], num_pairs: int) -> None:
    before, after = evaluations
    print(f"\n{f'{num_pairs} held-out pairs':<34}{'before':>10}{'after':>10}")
    for name, label in LABELS.items():
        print(f"{label:<34}{getattr(before, name):>10.3f}{getattr(after, name):>10.3f}")
    print()


def write_report(
    args: argparse.Namespace,
    setup: Setup,
    steps: Sequence[Step],
    evaluations: Sequence[Evaluation],
    compared: Sequence[Compared],
    seconds: float,
) -> None:
    """Write settings, evaluations, comparison and steps to report.json, which is strict JSON."""
    report = dict(
        settings=settings_of(args),
        train_pairs=len(setup.train_rows),
        held_out_pairs=len(setup.held_out_rows),
        evaluations=[evaluation._asdict() for evaluation in evaluations],
        comparison=[result._asdict() for result in compared],
        seconds=seconds,
        steps=[step._asdict() for step in steps],
    )
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    (args.output / "report.json").write_text(text + "\n", encoding="utf-8")


def options_of(args: argparse.Namespace) -> Options:
    return Options(
        loss=args.loss,
        beta=args.beta,
        loss_options=dict(args.loss_option),
        lr=args.lr,
        steps=args.steps,
        batch_size=args.batch_size,
        seed=args.seed,
        accumulate=args.accumulate,
        dropout=args.dropout,
    )


def settings_of(args: argparse.Namespace) -> dict[str, str]:
    """What decides the losses, as text. A file counts by its name and content; a model's folder by
    its name, since ref_logps.safetensors knows its weights."""

    def shown(value: Any) -> Any:
        if isinstance(value, list):
            return [shown(v) for v in value]
        if isinstance(value, Path):
            return f"{value.name} ({file_hash(value)})" if value.is_file() else value.name
        return value

    return {name: str(shown(getattr(args, name))) for name in SETTINGS}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, defaults filled in."""

    def option(text: str) -> tuple[str, Any]:
        name, _, value = text.partition("=")
        try:
            return name, float(value)
        except ValueError:
            return name, value

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = command_line.add_common(parser)
    count, share = command_line.count, command_line.share
    add("--eval-data", type=Path, action="append", metavar="FILE", help="held out; repeat")
    add("--holdout", type=share, default=0.25, help="else this share of --data is (0.25)")
    add("--loss", choices=sorted(LOSSES), default="sigmoid")
    add("--beta", type=float, default=0.1)
    add("--loss-option", type=option, action="append", default=[], metavar="NAME=VALUE")
    add("--lr", type=float, help="default: 5e-4, with --full 1e-5")
    add("--steps", type=count, default=12, metavar="N")
    add("--accumulate", type=count, default=1, metavar="N", help="parts of a batch: less memory")
    add("--dropout", action="store_true", help="leave the model's dropout on")
    add("--full", action="store_true", help="train all weights, not LoRA adapters")
    add("--lora-rank", type=count, default=16, metavar="N")
    add("--seed", type=int, default=0, help="of batches, held-out pairs and adapters")
    add("--output", type=Path, default=Path("out", "train_dpo"), metavar="FOLDER")
    add("--save-every", type=count, default=10, metavar="N", help="steps between checkpoints")
    add("--resume", action="store_true", help="go on from the checkpoint in --output")
    add("--compare", type=count, metavar="N", help="first take N steps without and with logits")
    args = parser.parse_args(argv)
    command_line.fill_in(args)
    args.lr = (1e-5 if args.full else 5e-4) if args.lr is None else args.lr
    return args


def check(args: argparse.Namespace) -> None:
    """Complain of options before anything is loaded."""
    command_line.check(args, MODULES, [])
    for path in args.eval_data or ():
        with open(path, "rb"):
            pass
    pair = RefLogps(*-torch.ones(2, 1), *torch.ones(2, 1))
    preference_loss(options_of(args), pair, pair)
    if args.accumulate > args.batch_size:
        raise ValueError(f"--accumulate must be at most --batch-size, got {args.accumulate}")
    if args.accumulate > 1 and LOSSES[args.loss].sorts:
        raise ValueError(f"--loss {args.loss} sorts the batch and cannot be taken in parts")
    if not math.isfinite(args.lr) or args.lr < 0:
        raise ValueError(f"--lr must be finite and not below 0, got {args.lr}")


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0; 1 where training or --compare goes wrong, 2 for input that cannot be used."""
    args = parse_args(argv)
    try:
        check(args)
        with locked(args.output):
            return run(args)
    except NotFinite as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ImportError, OSError, TypeError, ValueError) as error:
        cure = CURE if isinstance(error, ImportError) else ""
        print(f"error: {error}{cure}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
