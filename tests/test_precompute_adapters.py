"""Reference files of PEFT models: with adapters off they are the base model's, before and after."""

import copy

import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_model
from tiny_reference import draw_dataset, equal, run

from dpo_triton.precompute import model_fingerprint

pytest.importorskip("safetensors")
peft = pytest.importorskip("peft")

LORA = dict(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
# What PEFT wraps: linear layers, some of them twice; the head; single tokens; nothing.
ADAPTERS = {
    "lora": lambda: peft.LoraConfig(**LORA),
    "dora": lambda: peft.LoraConfig(**LORA, use_dora=True),
    "head": lambda: peft.LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "ia3": lambda: peft.IA3Config(
        target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "tokens": lambda: peft.LoraConfig(**LORA, trainable_token_indices=[1, 5]),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def base_model():
    torch.manual_seed(5)
    return tiny_model("llama", torch.float32)


def train(model):
    """All that trains moves."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_with_adapters_off_the_file_is_the_base_models(adapter, tmp_path):
    base, dataset, path = base_model(), draw_dataset(), tmp_path / "ref.safetensors"
    expected = run(base, dataset, path)
    content = path.read_bytes()
    model = peft.get_peft_model(copy.deepcopy(base), ADAPTERS[adapter]())
    for _ in range(2):  # before training, after
        with model.disable_adapter():
            assert model_fingerprint(model) == model_fingerprint(base)
            assert equal(run(model, dataset, path), expected)
            assert equal(run(model, dataset, tmp_path / "anew.safetensors"), expected)
        train(model)
    assert path.read_bytes() == content
    with pytest.raises(ValueError, match=r"adapter is on; call this inside of model.disable_adap"):
        run(model, dataset, path)


def test_an_adapter_that_is_on_counts_and_an_idle_one_does_not(tmp_path):
    """A reference that is an adapter, beside the policy's."""
    model = peft.get_peft_model(base_model(), peft.LoraConfig(**LORA), adapter_name="policy")
    model.add_adapter("ref", peft.LoraConfig(**LORA))
    model.set_adapter("policy")
    policy = model_fingerprint(model)
    model.set_adapter("ref")
    dataset, path = draw_dataset(), tmp_path / "ref.safetensors"
    expected = run(model, dataset, path)
    reference = model_fingerprint(model)
    assert reference != policy
    model.set_adapter("policy")
    train(model)
    assert model_fingerprint(model) != policy
    with pytest.raises(ValueError, match="another model"):
        run(model, dataset, path)
    model.set_adapter("ref")
    assert equal(run(model, dataset, path), expected)
    train(model)
    assert model_fingerprint(model) != reference
    with (
        model.disable_adapter(),
        pytest.raises(ValueError, match="an adapter was on, and now is not"),
    ):
        run(model, dataset, path)


def test_a_merged_adapter_is_not_taken_for_the_base():
    model = peft.get_peft_model(base_model(), peft.LoraConfig(**LORA))
    model.merge_adapter()
    with model.disable_adapter(), pytest.raises(ValueError, match=r"call model.unmerge_adapter"):
        model_fingerprint(model)


def test_wrappers_do_not_rename_tensors():
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper

    base = base_model()
    expected = model_fingerprint(base)
    assert model_fingerprint(torch.compile(base, backend="eager")) == expected
    base.model.layers[0] = checkpoint_wrapper.checkpoint_wrapper(base.model.layers[0])
    assert model_fingerprint(base) == expected


def test_a_model_saved_and_loaded_is_the_same(tmp_path):
    model = base_model()
    model.config.pad_token_id = None
    expected = model_fingerprint(model)
    model.config.pad_token_id = 7
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert model_fingerprint(loaded) == expected
    loaded.resize_token_embeddings(VOCAB_SIZE + 1)  # changes every value
    assert model_fingerprint(loaded) != expected
