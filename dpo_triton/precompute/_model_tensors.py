"""The tensors that a model's forward pass reads, under the names that they have in its base."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .._language_model import language_model

# What checkpointing and FSDP wrap a module in, under a name that is none of the model's.
WRAPPERS = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod")


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, by name.

    PEFT's: with the adapters off (`model.disable_adapter()`) the base's alone, named as without
    PEFT; with one on, it counts, and those that are not active do not.

    Raises:
        ValueError: a tensor whose values are elsewhere, or an adapter merged into a base that is
            asked for.
    """
    base = language_model(model)
    adapted = _adapted_modules(base)
    idle = _idle_adapters(model)
    named = {}
    for name, tensor in sorted(base.state_dict(keep_vars=True).items()):
        counted = _name_of(name, adapted, idle)
        if counted is not None and isinstance(tensor, Tensor):  # not a module's extra state
            named[counted] = tensor
    named |= _virtual_tokens(model)
    for name, tensor in named.items():
        _check_is_here(name, tensor)
    return named


def _adapted_modules(base: nn.Module) -> dict[str, str]:
    """From a module that PEFT adapts to the path in it of the base's; "" if the adapter is on."""
    adapted = {}
    for name, module in base.named_modules():
        inner = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
        if inner is None or not hasattr(module, "disable_adapters"):
            continue
        if module.disable_adapters and getattr(module, "merged", False):
            raise ValueError(
                f"the adapters are off, but {name} has one merged into its weight, which the first "
                "forward pass takes out; call model.unmerge_adapter() before"
            )
        path = next(path for path, within in module.named_modules() if within is inner)
        adapted[name] = path if module.disable_adapters else ""
    return adapted


def _idle_adapters(model: nn.Module) -> set[str]:
    module: Any
    for module in model.modules():
        if hasattr(module, "peft_config") and hasattr(module, "active_adapters"):
            active = module.active_adapters
            active = active() if callable(active) else active
            return set(module.peft_config) - set(active)
    return set()


def _name_of(name: str, adapted: dict[str, str], idle: set[str]) -> str | None:
    """A tensor's name without wrappers and adapters that are off; None where it does not count."""
    kept: list[str] = []
    path, is_adapted = "", False
    parts = iter(name.split("."))
    for part in parts:
        if is_adapted and part in idle:
            return None
        path = f"{path}.{part}" if path else part
        if part not in WRAPPERS:
            kept.append(part)
        while path in adapted:  # an adapter on an adapter
            is_adapted = True
            inner = adapted[path]
            if not inner:
                break
            for expected in inner.split("."):
                if next(parts, None) != expected:
                    return None
            path = f"{path}.{inner}"
    return ".".join(kept)


def _virtual_tokens(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Of prompt tuning and kin, where they are on."""
    for module in model.modules():
        encoders: Any = getattr(module, "prompt_encoder", None)
        if isinstance(encoders, nn.ModuleDict) and not getattr(module, "_adapters_disabled", False):
            active = str(module.active_adapter)
            for name, tensor in encoders[active].state_dict(keep_vars=True).items():
                yield f"prompt_encoder.{active}.{name}", tensor
            return


def _check_is_here(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ValueError(
            f"{name} must have values, got a tensor on the meta device: the model is offloaded; "
            "load it whole on one device"
        )
    if hasattr(tensor, "ds_id") and tensor.numel() == 0:
        raise ValueError(
            f"{name} must have values, got none: DeepSpeed's ZeRO-3 has partitioned the model; "
            "pass it as it was before deepspeed.initialize"
        )
