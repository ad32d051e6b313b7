"""Runs of TRL's own trainers on a CPU: a few steps of a tiny Llama from a fixed seed.

The optimiser is plain SGD: its steps are the gradients, where Adam's first step is their sign,
rounding errors of a zero gradient included.
"""

import os
import random
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")  # trl itself imports without it
pytest.importorskip("peft")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import trl
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

HAS_HEAD = Version(trl.__version__) >= Version("1.15")  # trainers without logits
VOCAB_SIZE = 4133  # past a tile of the head, and no multiple of anything


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token: w0, w1, ..."""
    words = ["<pad>", "<eos>", "<unk>"] + [f"w{i}" for i in range(VOCAB_SIZE - 3)]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<eos>",
        unk_token="<unk>",
    )


def make_model(tie_word_embeddings: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,  # logits that differ
        tie_word_embeddings=tie_word_embeddings,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def make_pairs(num_pairs: int = 8) -> Dataset:
    """Prompts and answers of different lengths."""
    draw = random.Random(3)

    def text(shortest: int, longest: int) -> str:
        words = draw.choices(range(VOCAB_SIZE - 3), k=draw.randint(shortest, longest))
        return " ".join(f"w{i}" for i in words)

    return Dataset.from_list(
        [
            dict(prompt=text(3, 9), chosen=" " + text(1, 7), rejected=" " + text(1, 12))
            for _ in range(num_pairs)
        ]
    )


def make_labelled() -> Dataset:
    """An answer a row, wanted or not; neighbours differ, since KTO pairs each with the next."""
    rows = []
    for pair in make_pairs():
        rows.append(dict(prompt=pair["prompt"], completion=pair["chosen"], label=True))
        rows.append(dict(prompt=pair["prompt"], completion=pair["rejected"], label=False))
    return Dataset.from_list(rows)


DATA = {"DPO": make_pairs, "KTO": make_labelled, "CPO": make_pairs, "ORPO": make_pairs}
TRAINERS = {
    "DPO": (trl.DPOTrainer, trl.DPOConfig),
    "KTO": (trl.KTOTrainer, trl.KTOConfig),
    "CPO": (CPOTrainer, CPOConfig),
    "ORPO": (ORPOTrainer, ORPOConfig),
}


class Run:
    """A training run: what it logged, and how far each parameter that trains went."""

    def __init__(self, trainer: Any) -> None:
        start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        of_the_machine = ("runtime", "per_second", "total_flos")  # the last counts padding
        self.logs = [
            {name: value for name, value in row.items() if not name.endswith(of_the_machine)}
            for row in trainer.state.log_history
        ]
        self.end = dict(trainer.model.named_parameters())
        self.moved = {
            name: p.detach() - start[name]
            for name, p in trainer.model.named_parameters()
            if p.requires_grad
        }


def run(kind: str, tokenizer: Any, folder: Any, **options: Any) -> Run:
    """Train; of the options a function makes an argument of the trainer, others are its config's.

    Each run makes its own: a trainer changes its model.
    """
    trainer_class, config_class = TRAINERS[kind]
    torch.manual_seed(11)  # of an adapter's weights
    made = dict(model=make_model) | {k: v for k, v in options.items() if callable(v)}
    config = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4 if kind == "KTO" else 2,
        max_steps=3,
        learning_rate=0.3,
        lr_scheduler_type="constant",
        optim="sgd",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=5,
    ) | {k: v for k, v in options.items() if k not in made}
    trainer = trainer_class(
        args=config_class(**config),
        train_dataset=DATA[kind](),
        processing_class=tokenizer,
        **{name: make() for name, make in made.items()},
    )
    return Run(trainer)


def assert_same_runs(ours: Run, theirs: Run, tolerance: float = 1e-5) -> None:
    """Logs to the tolerance, relative beyond 1; moves to that part of the longest in a tensor, and
    three roundings, one a step, of the parameter."""
    assert len(ours.logs) == len(theirs.logs) >= 3
    for mine, other in zip(ours.logs, theirs.logs, strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            assert mine[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
    assert ours.moved.keys() == theirs.moved.keys()
    assert max(float(moved.abs().max()) for moved in theirs.moved.values()) > 1e-3
    for name, moved in theirs.moved.items():
        error = float((ours.moved[name] - moved).abs().max())
        rounding = 3 * 2.0**-24 * float(theirs.end[name].detach().abs().max())
        assert error <= tolerance * float(moved.abs().max()) + rounding, name


def reference_model() -> LlamaForCausalLM:
    """Not the policy, so that rewards are not 0 at the first step."""
    model = make_model()
    draw = torch.Generator().manual_seed(13)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=draw))
    return model


def lora() -> LoraConfig:
    return LoraConfig(
        r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )


REF = dict(ref_model=reference_model)
