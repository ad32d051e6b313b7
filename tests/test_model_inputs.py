"""seq_logprob_from_model on packed rows, left padding and virtual tokens; the auxiliary loss."""

import pytest
import torch
from batches import max_error
from tiny_models import SMALL, VOCAB_SIZE, by_full_logits, tiny_model, transformers
from torch import Tensor, nn

from dpo_triton import reference, seq_logprob_from_model

LENGTHS = (5, 1, 8, 3)


def draw_sequences() -> list[Tensor]:
    return [torch.randint(3, VOCAB_SIZE, (length,)) for length in LENGTHS]


def alone(model: nn.Module, sequences: list[Tensor], **options) -> Tensor:
    """By full logits, one sequence at a time."""
    values = []
    for ids in sequences:
        logits = model(ids[None]).logits
        values.append(reference.seq_logprob(logits, ids[None], shift=True, **options)[0])
    return torch.stack(values)


def padded(sequences: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, (S, T)."""
    shape = len(sequences), max(map(len, sequences))
    input_ids = torch.randint(3, VOCAB_SIZE, shape)  # padding that would be seen
    attention_mask = torch.zeros(shape, dtype=torch.long)
    for row, ids in enumerate(sequences):
        at = slice(-len(ids), None) if side == "left" else slice(len(ids))
        input_ids[row, at], attention_mask[row, at] = ids, 1
    return input_ids, attention_mask


def cu_seqlens_of(sequences: list[Tensor]) -> Tensor:
    lengths = torch.tensor([0, *map(len, sequences)])
    return lengths.cumsum(0, dtype=torch.int32)


def tiny_moe() -> nn.Module:
    config = transformers.AutoConfig.for_model(
        "mixtral", **SMALL, num_local_experts=4, num_experts_per_tok=2
    )
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


# Learned positions; rotary ones; a sliding window, and softmax in float32 whatever the weights are.
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_packed_rows_equal_each_alone(family):
    model, sequences = tiny_model(family), draw_sequences()
    packed = torch.cat(sequences)
    values, stats = seq_logprob_from_model(
        model, packed, cu_seqlens=cu_seqlens_of(sequences), stats=("lengths", "token_logps")
    )
    exact = alone(model, sequences)
    assert stats["lengths"].tolist() == [length - 1 for length in LENGTHS]
    assert stats["token_logps"].shape == packed.shape
    tolerance = 1e-6 if family == "gemma2" else 1e-9
    assert max_error(values, exact.detach()) <= tolerance
    parameters = list(model.parameters())
    upstream = torch.randn(len(sequences), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(x, parameters, upstream) for x in (values, exact))
    for a, b in zip(ours, theirs, strict=True):
        assert max_error(a, b) <= tolerance * (1 + float(b.abs().max()))


def test_packed_rows_with_a_mask_and_padding_after_the_last():
    model, sequences = tiny_model("llama"), draw_sequences()
    packed, mask = torch.cat([*sequences, torch.tensor([7, 7])]), torch.rand(sum(LENGTHS) + 2)
    values = seq_logprob_from_model(
        model, packed, mask=mask, cu_seqlens=cu_seqlens_of(sequences), reduction="sum"
    )
    weights = mask[:-2].split(LENGTHS)
    for i, ids in enumerate(sequences):
        exact = alone(model, [ids], mask=weights[i][None], reduction="sum")
        assert max_error(values[i], exact[0].detach()) <= 1e-9


@pytest.mark.parametrize("family", ["mpt", "recurrent_gemma", "falcon"])
def test_a_model_that_mixes_packed_rows_is_refused(family):
    """It takes no positions; it is recurrent; its mask does not heed positions."""
    if family == "falcon":
        config = transformers.FalconConfig(vocab_size=VOCAB_SIZE, hidden_size=32)
        config.num_hidden_layers, config.num_attention_heads = 1, 4
        model = transformers.FalconForCausalLM(config)
    else:
        model = tiny_model(family)
    sequences = draw_sequences()
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"keep packed sequences apart .* pad them to"):
        seq_logprob_from_model(model, torch.cat(sequences), cu_seqlens=cu_seqlens_of(sequences))
    assert torch.equal(torch.get_rng_state(), state)
    head = model.get_output_embeddings()
    assert "forward" not in vars(head)


def test_packed_rows_are_tried_once_in_training_mode_too():
    """Dropout draws the same in both trials, and leaves the generator alone."""
    model = tiny_model("gpt2").train()
    calls = []
    model.transformer.register_forward_hook(lambda *_: calls.append(1))
    sequences = draw_sequences()
    for _ in range(2):
        seq_logprob_from_model(model, torch.cat(sequences), cu_seqlens=cu_seqlens_of(sequences))
    assert len(calls) == 2 + 2


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (dict(attention_mask=torch.ones(1, 3)), "attention_mask must be None with cu_seqlens"),
        (
            dict(input_ids=torch.ones(1, 3).long()),
            r"input_ids must have shape \(N,\).*\(1, 3\)",
        ),
        (dict(cu_seqlens=torch.tensor(3)), r"cu_seqlens must have shape \(S \+ 1,\), got \(\)"),
    ],
)
def test_packed_arguments_are_checked(change, complaint):
    arguments = dict(input_ids=torch.ones(3).long(), cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=complaint):
        seq_logprob_from_model(tiny_model("llama"), **(arguments | change))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_left_padding_changes_nothing(family):
    """GPT-2's positions are learned: padding must not count."""
    model, sequences = tiny_model(family), draw_sequences()
    exact = alone(model, sequences).detach()
    for side in ("left", "right"):
        values = seq_logprob_from_model(model, *padded(sequences, side))
        assert max_error(values, exact) <= 1e-9, side


def test_the_callers_positions_are_kept():
    model, sequences = tiny_model("gpt2"), draw_sequences()
    input_ids, attention_mask = padded(sequences, "left")
    positions = torch.randint(9, input_ids.shape)
    values = seq_logprob_from_model(
        model, input_ids, attention_mask, model_kwargs=dict(position_ids=positions)
    )
    logits = model(input_ids, attention_mask=attention_mask, position_ids=positions).logits
    mask = attention_mask.clone()
    mask[:, 1:] *= attention_mask[:, :-1]
    exact = reference.seq_logprob(logits, input_ids, mask, shift=True)
    assert max_error(values, exact.detach()) <= 1e-9


@pytest.mark.parametrize("kind", ["PromptTuning", "PromptEncoder", "PrefixTuning"])
def test_virtual_tokens_come_before_and_are_not_scored(kind):
    """Prompt tuning, p-tuning, and prefix tuning, which adds keys and values alone."""
    peft = pytest.importorskip("peft")
    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny_model("llama"), config).double()
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_()
    input_ids, attention_mask = padded(draw_sequences(), "right")
    mask = attention_mask.clone()
    mask[:, 0] = 0
    values = seq_logprob_from_model(model, input_ids, attention_mask, mask=mask)
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    logits = logits[:, -input_ids.shape[1] :]
    exact = reference.seq_logprob(logits, input_ids, mask, shift=True)
    assert max_error(values, exact.detach()) <= 1e-9
    trained = [p for p in model.parameters() if p.requires_grad]
    upstream = torch.randn(len(values), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(x, trained, upstream) for x in (values, exact))
    for a, b in zip(ours, theirs, strict=True):
        assert max_error(a, b) <= 1e-9 * (1 + float(b.abs().max()))
    with model.disable_adapter():
        plain = seq_logprob_from_model(model, input_ids, attention_mask, mask=mask)
    base = by_full_logits(
        model.get_base_model(),
        dict(input_ids=input_ids, attention_mask=attention_mask, mask=mask),
    )
    assert max_error(plain, base.detach()) <= 1e-9


def test_the_auxiliary_loss_of_a_mixture_of_experts_keeps_its_gradient():
    model = tiny_moe()
    input_ids, attention_mask = padded(draw_sequences(), "right")
    values, stats = seq_logprob_from_model(
        model, input_ids, attention_mask, stats=("aux_loss", "lengths")
    )
    output = model(input_ids, attention_mask, output_router_logits=True)
    exact = reference.seq_logprob(output.logits, input_ids, attention_mask, shift=True)
    assert sorted(stats) == ["aux_loss", "lengths"]
    assert max_error(stats["aux_loss"], output.aux_loss.detach()) <= 1e-9
    assert max_error(values, exact.detach()) <= 1e-9
    parameters = list(model.parameters())
    losses = values.sum() + 0.3 * stats["aux_loss"], exact.sum() + 0.3 * output.aux_loss
    ours, theirs = (torch.autograd.grad(x, parameters) for x in losses)
    for a, b in zip(ours, theirs, strict=True):
        assert max_error(a, b) <= 1e-9 * (1 + float(b.abs().max()))
    assert isinstance(seq_logprob_from_model(model, input_ids, attention_mask), Tensor)


def test_an_auxiliary_loss_that_no_model_has_is_an_error():
    with pytest.raises(ValueError, match=r'"aux_loss" .* LlamaForCausalLM.*leave it out'):
        seq_logprob_from_model(tiny_model("llama"), torch.ones(1, 3).long(), stats=("aux_loss",))
