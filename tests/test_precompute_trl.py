"""A precomputed reference in the place of the one that TRL's DPOTrainer computes."""

import contextlib

import pytest
import torch
from tiny_llama import save_tiny_llama

from dpo_triton.precompute import precompute_ref_logps

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


class PrecomputedDPOTrainer(trl.DPOTrainer):
    """As in the README, with the file beside the trainer's output, and adapters turned off."""

    def _precompute_ref_logps(self, dataset, name, batch_size):
        dataset = dataset.map(self.cut)
        model = self.ref_model or self.model
        off = model.disable_adapter() if hasattr(model, "disable_adapter") else None
        with off or contextlib.nullcontext():
            ref_logps = precompute_ref_logps(
                model,
                dataset,
                f"{self.args.output_dir}/{name}.safetensors",
                batch_size=batch_size,
                progress=False,
            )
        for column, values in ref_logps.columns().items():
            dataset = dataset.add_column(column, values)
        return dataset

    def cut(self, row):
        """As TRL's collator cuts: the answers, to max_length with the prompt."""
        room = self.args.max_length - len(row["prompt_ids"])
        return {name: row[name][:room] for name in ("chosen_ids", "rejected_ids")}


def trainer(kind, folder, output, adapter, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    words = ["one", "two", "three", "many", "hi", "yes", "no"]

    def text(size):
        return " ".join(words[i] for i in torch.randint(7, (size,), generator=generator))

    generator = torch.Generator().manual_seed(3)
    rows = [
        dict(prompt=text(2 + i % 3), chosen=" " + text(1 + i % 4), rejected=" " + text(6))
        for i in range(6)
    ]
    config = trl.DPOConfig(
        output_dir=str(output),
        precompute_ref_log_probs=True,
        per_device_train_batch_size=2,
        max_steps=2,
        max_length=9,  # cuts answers
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        **options,
    )
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    return kind(
        model=model,
        args=config,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(rows),
        peft_config=lora if adapter else None,
    )


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "LoRA"])
def test_trl_trains_as_with_the_reference_that_it_computes(adapter, tmp_path):
    folder = save_tiny_llama(tmp_path / "model")
    logs = []
    for name, kind in (("own", PrecomputedDPOTrainer), ("trl", trl.DPOTrainer)):
        run = trainer(kind, folder, tmp_path / name, adapter)
        columns = [run.train_dataset[c] for c in ("ref_chosen_logps", "ref_rejected_logps")]
        logs.append((torch.tensor([list(c) for c in columns]), run))
        run.train()
    assert (tmp_path / "own" / "train.safetensors").exists()
    (ours, own), (theirs, plain) = logs
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for a, b in zip(own.state.log_history[:2], plain.state.log_history[:2], strict=True):
        for key in ("loss", "rewards/margins", "rewards/chosen"):
            assert a[key] == pytest.approx(b[key], abs=1e-4), key
    assert own.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
