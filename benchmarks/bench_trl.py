"""TRL's DPOTrainer with and without this package; `python benchmarks/bench_trl.py --help`.

One trainer takes steps in turns with its own head and with `dpo_triton.integrations.trl`'s, on the
same batch: forward pass of policy and reference, backward pass and metrics, without the optimiser.
The first step compares both; where they differ, no time is shown, and it exits with 1.
"""

import argparse
import dataclasses
import importlib.util
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not __package__:  # a script: the checkout's packages, and none of benchmarks/ at the top level
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import dpo_triton.integrations.trl as adapter
from benchmarks.common import command, measure, report
from benchmarks.common.peers import OURS
from benchmarks.common.report import Columns, optional

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

THEIRS = "TRL"
HEADS: dict[str, Callable[[], Any]] = {THEIRS: nullcontext, OURS: adapter.fused}
# SmolLM2-135M; what it learned does not change the time.
SHAPE: dict[str, Any] = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    rope_theta=100000.0,
    tie_word_embeddings=True,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=1,
)
NUM_LAYERS = [4]  # of 30
ANSWER_SHARE = 0.45  # of a sequence
MAX_LOSS_DIFFERENCE = 1e-4  # sums of -2500 nats are rounded to 1e-4, times beta
MAX_GRAD_DIFFERENCE = 1e-4  # of the largest element of a parameter's gradient
PACKAGES = ("trl", "transformers", "accelerate", "datasets")
COLUMNS = Columns(
    2,
    {
        "layers": lambda row: str(row.layers),
        "head": lambda row: row.head,
        "median s": lambda row: f"{row.seconds:.2f}",
        "least - most": lambda row: f"{row.seconds_least:.2f} - {row.seconds_most:.2f}",
        "steps": lambda row: str(row.steps),
        "peak MiB": lambda row: optional("{:.0f}", row.peak_mib),
        "speed-up": lambda row: f"{row.speedup:.2f}x",
    },
)


@dataclasses.dataclass(frozen=True)
class Row:
    """The steps of one head in a model of some layers."""

    layers: int
    head: str
    num_tokens: int  # of the batch, padding none
    num_scored: int
    seconds: float  # median of a step
    seconds_least: float
    seconds_most: float
    steps: int
    peak_mib: float | None  # above the start of a step, gradients included; None: not known
    loss: float  # of the first step
    grad_difference: float  # to TRL's, relative to the largest element
    speedup: float  # TRL's median over this one's


@dataclasses.dataclass
class Steps:
    """What steps took and gave, by head."""

    seconds: dict[str, list[float]] = dataclasses.field(
        default_factory=lambda: {head: [] for head in HEADS}
    )
    peak_mib: dict[str, float | None] = dataclasses.field(default_factory=dict)
    losses: dict[str, float] = dataclasses.field(default_factory=dict)  # of the first step
    grads: dict[str, list[Tensor]] = dataclasses.field(default_factory=dict)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"{', '.join(missing)} not found: pip install '.[trl]' in the repository")
    measure.map_buffers()
    machine = measure.machine_name(torch.device("cpu"))
    versions = command.versions("torch", *PACKAGES)
    print(f"{machine}; " + ", ".join(f"{name} {v}" for name, v in versions.items()))
    print(
        f"SmolLM2-135M's shape, float32, {2 * args.pairs} sequences of {args.seq_len} tokens, "
        f"{ANSWER_SHARE:.0%} of them the answer; --seed {args.seed}"
    )
    load = measure.OtherLoad()
    rows: list[Row] = []
    for layers in args.layers:
        new = measure_heads(layers, args)
        wrong = complaints(new)
        if wrong:
            return command.refuse(wrong, "no time is shown")
        rows += new
    print("\n" + COLUMNS.table(rows))
    print(
        "\nmedian s: of a step, without the optimiser. peak MiB: resident, above the start of a "
        f"step.\nOther processes used {load.share():.0%} of the cores."
    )
    run = dict(
        machine=machine,
        seed=args.seed,
        command=command.command_line("bench_trl", argv),
        others=load.share(),
        **versions,
    )
    whole = command.is_whole(args, parse_args([]), "layers", "pairs", "seq_len", "steps")
    csv, _ = command.output_paths(args, f"trl-{report.file_stem(machine)}", whole)
    report.write_csv(csv, rows, run)
    print(f"rows: {csv}")
    return 0


def measure_heads(layers: int, args: argparse.Namespace) -> list[Row]:
    """Train one model in turns, and return a row for each head."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer

    steps = Steps()

    class InTurns(DPOTrainer):  # type: ignore[misc]
        def training_step(self, *inputs: Any, **options: Any) -> Tensor:
            step = super().training_step
            turn = self.state.global_step
            heads = list(HEADS)[:: 1 if turn % 2 else -1]
            if turn > args.steps:  # the last, so that its gc and page settings disturb no time
                for head in heads:
                    with HEADS[head]():
                        self.model.zero_grad()
                        steps.peak_mib[head] = measure.peak_mib(
                            lambda: step(*inputs, **options), torch.device("cpu")
                        )
                return torch.zeros(())
            measure.map_buffers(measure.HEAP_BYTES)
            for head in heads:
                self.model.zero_grad()
                with HEADS[head]():
                    start = time.perf_counter()
                    loss = step(*inputs, **options)
                    seconds = time.perf_counter() - start
                if turn > 0:
                    steps.seconds[head].append(seconds)
                else:
                    steps.losses[head] = float(loss)
                    steps.grads[head] = [p.grad.clone() for p in self.model.parameters()]
            measure.map_buffers()
            return loss

    torch.manual_seed(args.seed)
    config = LlamaConfig(num_hidden_layers=layers, **SHAPE)
    policy, reference = (LlamaForCausalLM(config) for _ in range(2))
    tokenizer = make_tokenizer()
    data, num_scored = make_pairs(args, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        trainer = InTurns(
            model=policy,
            ref_model=reference,
            train_dataset=data,
            processing_class=tokenizer,
            args=DPOConfig(
                output_dir=folder,
                per_device_train_batch_size=args.pairs,
                max_steps=args.steps + 2,  # the first compares, the last has the memory
                max_length=None,
                optim="sgd",
                learning_rate=1e-4,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
        )
        trainer.train()
    theirs = statistics.median(steps.seconds[THEIRS])
    return [
        Row(
            layers=layers,
            head=head,
            num_tokens=2 * args.pairs * args.seq_len,
            num_scored=num_scored,
            seconds=statistics.median(steps.seconds[head]),
            seconds_least=min(steps.seconds[head]),
            seconds_most=max(steps.seconds[head]),
            steps=args.steps,
            peak_mib=steps.peak_mib[head],
            loss=steps.losses[head],
            grad_difference=max(
                float((ours - true).abs().max() / true.abs().max())
                for ours, true in zip(steps.grads[head], steps.grads[THEIRS], strict=True)
            ),
            speedup=theirs / statistics.median(steps.seconds[head]),
        )
        for head in HEADS
    ]


def make_tokenizer() -> Any:
    """A word is a token: w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>"] + [f"w{i}" for i in range(SHAPE["vocab_size"] - 3)]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def make_pairs(args: argparse.Namespace, tokenizer: Any) -> tuple[Any, int]:
    """Pairs for one batch, all of one length, and the number of their scored tokens."""
    from datasets import Dataset

    draw = random.Random(args.seed)
    num_answer = round(ANSWER_SHARE * args.seq_len)

    def text(num_tokens: int) -> str:
        return " ".join(f"w{draw.randrange(SHAPE['vocab_size'] - 3)}" for _ in range(num_tokens))

    rows = [
        dict(
            prompt=text(args.seq_len - num_answer),
            chosen=" " + text(num_answer - 1),  # and the end of sequence, which TRL adds
            rejected=" " + text(num_answer - 1),
        )
        for _ in range(args.pairs)
    ]
    return Dataset.from_list(rows), 2 * args.pairs * num_answer


def complaints(rows: list[Row]) -> list[str]:
    """What differs between the heads: the loss and the gradients of the first step."""
    theirs = next(row for row in rows if row.head == THEIRS)
    return [
        f"{row.layers} layers: loss {row.loss:.7f} and {theirs.loss:.7f}, gradients differ by "
        f"{row.grad_difference:.1e} of the largest element"
        for row in rows
        if not abs(row.loss - theirs.loss) <= MAX_LOSS_DIFFERENCE
        or not row.grad_difference <= MAX_GRAD_DIFFERENCE
    ]


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = command.parser(
        "Steps of TRL's DPOTrainer with its own head and with this package's, on a CPU.", seed=0
    )
    parser.add_argument("--layers", type=int, nargs="+", default=NUM_LAYERS)
    parser.add_argument("--pairs", type=int, default=1, help="of a batch")
    parser.add_argument("--seq-len", type=int, default=512, help="prompt and answer, in tokens")
    parser.add_argument("--steps", type=int, default=4, help="timed, with each head")
    parser.set_defaults(no_plot=True)
    args = command.check(parser.parse_args(argv), parser)
    if min(args.layers) < 1 or args.pairs < 1 or args.seq_len < 8 or args.steps < 1:
        parser.error("--layers, --pairs and --steps must be 1 or more, and --seq-len 8 or more")
    return args


if __name__ == "__main__":
    sys.exit(main())
