"""What a transformers causal language model is: its head, and what it does to its logits."""

from typing import Any

from torch import nn

from ._records import Scaling

# By which power of what a configuration has under a name a logit is multiplied: Cohere's,
# Falcon-H1's, Granite's.
POWERS = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
# The classes that understand such a name otherwise; 0: it does not concern the logits.
OTHER_POWERS = {
    "HyperCLOVAXForCausalLM": {"logits_scaling": 1},
    "HyperCLOVAXVisionV2ForConditionalGeneration": {"logits_scaling": 1},
    "MiniCPM3ForCausalLM": {"logits_scaling": 0},  # scales hidden states, before the head
    "MptForCausalLM": {"logit_scale": 0},  # read by MosaicML's own class alone, MPTForCausalLM
}
# Gemma's, RecurrentGemma's, xLSTM's.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def logit_scaling(model: nn.Module) -> Scaling:
    """What a model does to `hidden @ weight.T + bias`, by its transformers configuration.

    Raises:
        ValueError: a scale that is no number, nor MPT's "inv_sqrt_d_model".
    """
    base = language_model(model)
    config = base.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    powers = dict(POWERS)
    for kind in type(base).__mro__:
        powers |= OTHER_POWERS.get(kind.__name__, {})
    scale = 1.0
    for name, power in powers.items():
        value = getattr(config, name, None)
        if value is None or power == 0:
            continue
        if value == "inv_sqrt_d_model":
            value = config.d_model**-0.5
        if isinstance(value, str):
            raise ValueError(
                f'{name} of the model\'s configuration must be a number or "inv_sqrt_d_model", got '
                f"{value!r}; call fused_linear_seq_logprob with a logit_scale of your own"
            )
        scale *= float(value) ** power
    caps = [getattr(config, name, None) for name in SOFTCAPS]
    softcap = next((float(cap) for cap in caps if cap is not None), None)
    return Scaling(1.0, scale, softcap)


def output_head(model: nn.Module) -> nn.Linear:
    """The linear layer that makes the model's logits.

    Raises:
        TypeError: there is none, or it computes something else than `hidden @ weight.T + bias`.
    """
    base = language_model(model)
    head: Any = base.get_output_embeddings()
    if head is None:
        raise TypeError(
            f"model must have a head that makes logits, got {type(base).__name__}, which ends in "
            "hidden states; load it with AutoModelForCausalLM"
        )
    if hasattr(head, "modules_to_save"):  # PEFT's, of a head that trains in full
        active = head.active_adapter
        active = active[0] if isinstance(active, list) else active
        is_saved = active in head.modules_to_save and not head.disable_adapters
        head = head.modules_to_save[active] if is_saved else head.original_module
    if hasattr(head, "base_layer"):
        raise TypeError(
            f"the model's head carries an adapter ({type(head).__name__}), whose part of the "
            "logits would be lost; leave the head out of target_modules, list it in "
            "modules_to_save, or merge the adapter first"
        )
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise TypeError(
            f"the model's head must be a torch.nn.Linear, got {type(head).__name__}; "
            "call fused_linear_seq_logprob with hidden states and a weight of your own"
        )
    if "forward" in vars(head):
        raise TypeError(
            "the forward method of the model's head has been replaced (offloading hooks, or a "
            "patch for another loss), and would be passed over; remove that first"
        )
    return head


def language_model(model: nn.Module) -> Any:
    """The module under all wrappers (distributed, compiled, PEFT's) that knows its head."""
    for module in model.modules():
        if "_orig_mod" in module._modules:  # torch.compile's, which answers for what it wraps
            continue
        get_base_model = getattr(module, "get_base_model", None)  # PEFT's
        base = get_base_model() if callable(get_base_model) else module
        if callable(getattr(base, "get_output_embeddings", None)):
            return base
    raise TypeError(
        f"model must be a causal language model with get_output_embeddings(), got "
        f"{type(model).__name__}; call fused_linear_seq_logprob with its hidden states and head"
    )


def num_virtual_tokens(model: nn.Module) -> int:
    """How many tokens PEFT's prompt tuning or p-tuning puts before each sequence when it is on."""
    for module in model.modules():
        config = getattr(module, "active_peft_config", None)
        if config is not None:
            return int(getattr(config, "num_virtual_tokens", None) or 0)
    return 0
