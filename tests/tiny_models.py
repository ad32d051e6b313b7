"""Tiny random models of many families, a batch for them, and what their full logits give."""

import os

import pytest
import torch
from torch import Tensor, nn

from dpo_triton import reference

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

# Odd, and no multiple of anything: a head's last tile is never full.
VOCAB_SIZE = 517
SMALL = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
# What is peculiar to the head of each.
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen3": dict(tie_word_embeddings=True),
    "gemma2": dict(final_logit_softcapping=3.0),
    "gemma3_text": dict(final_logit_softcapping=2.0),
    "cohere": dict(logit_scale=0.25),
    "granite": dict(logits_scaling=4.0, embedding_multiplier=3.0),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=32),
    "phi": {},  # a bias
    "bloom": dict(n_head=4),
    "falcon_h1": dict(
        lm_head_multiplier=0.5, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=16
    ),
    "hyperclovax": dict(logits_scaling=0.25),  # a factor, where it is Granite's divisor
    "minicpm3": dict(  # a divisor of hidden states
        dim_model_base=8,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    ),
    "mpt": dict(d_model=32, n_heads=4, n_layers=2, logit_scale="inv_sqrt_d_model"),  # not read
    "recurrent_gemma": dict(
        logits_soft_cap=3.0, lru_width=32, attention_window_size=16, num_hidden_layers=3
    ),
}
SLOW = ("falcon_h1",)


def tiny_model(
    family: str, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> nn.Module:
    config = transformers.AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family]})
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():  # so large that a softcap bends, and no gradient is near 0
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model.to(device)


def tiny_batch(device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Three answers, the second sequence padded, and one sequence without an answer."""
    input_ids = torch.randint(3, VOCAB_SIZE, (4, 11))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 7:] = 0
    mask = torch.zeros(4, 11)
    mask[0, 4:] = torch.rand(7) + 0.5
    mask[1, 3:7] = 1
    mask[3, 10:] = 1
    batch = dict(input_ids=input_ids, attention_mask=attention_mask, mask=mask)
    return {name: x.to(device) for name, x in batch.items()}


def by_full_logits(model: nn.Module, batch: dict[str, Tensor], **options) -> Tensor:
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return reference.seq_logprob(logits, batch["input_ids"], batch["mask"], shift=True, **options)
