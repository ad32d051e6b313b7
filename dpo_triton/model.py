"""Sequence log-probabilities of a causal language model, whose head never makes logits."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._backends import BackendName
from .linear import fused_linear_seq_logprob
from .seq_logprob import Reduction

# What goes through the model's own treatment of logits, to see that it is the one we know of: from
# where a softcap is a line to where it is flat.
PROBE = (-1000.0, -30.0, -1.0, -0.01, 0.01, 1.0, 30.0, 1000.0)


def seq_logprob_from_model(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    temperature: float = 1.0,
    stats: Sequence[str] = (),
    tile_bytes: int | None = None,
    backend: BackendName = "auto",
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Log-probability of each sequence under a transformers causal language model, in nats.

    Runs the whole model, under whatever wraps it, with the head's product replaced for the time of
    the call by `fused_linear_seq_logprob`. Token t is scored by the hidden state at t - 1. What the
    model does to its logits (final softcap, logit scale or multiplier) is read from its
    configuration, and checked in every call against what the model really does.

    Args:
        model: a causal language model with `get_output_embeddings()`, bare or under
            DistributedDataParallel, FSDP2 (`fully_shard`), DeepSpeed's ZeRO-3, PEFT or accelerate.
        input_ids: (B, T) int64.
        attention_mask: (B, T), handed to the model.
        labels: (B, T) int64, not shifted, like input_ids, which they are by default.
        mask: (B, T) weights of the labels, bool, integer or floating; by default attention_mask:
            pass the answers' mask, as a prompt does not count.
        reduction, ignore_index, temperature, stats, tile_bytes, backend: see
            `fused_linear_seq_logprob`.
        model_kwargs: more arguments for the model, such as `position_ids`.

    Returns:
        (B,) float32, float64 for a float64 model; with stats, a pair of that and a dict from name
        to detached tensor, per token aligned with labels.

    Raises:
        TypeError: a model without a head, or with one that is no plain linear layer (an adapter
            on the head, a quantised one).
        ValueError: a model that does something else to its logits.
        RuntimeError: the model did not call its head.
    """
    head = output_head(model)
    scaling = logit_scaling(model)
    results: list[Any] = []
    head_outputs: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        result = fused_linear_seq_logprob(
            hidden,
            head.weight,
            input_ids if labels is None else labels,
            attention_mask if mask is None else mask,
            bias=head.bias,
            reduction=reduction,
            shift=True,
            ignore_index=ignore_index,
            temperature=temperature,
            logit_scale=scaling.logit_scale,
            softcap=scaling.softcap,
            stats=stats,
            tile_bytes=tile_bytes,
            backend=backend,
        )
        results.append(result)
        values = result[0] if isinstance(result, tuple) else result
        probe = torch.tensor(PROBE, dtype=values.dtype, device=values.device)
        return torch.cat([probe.view(1, 1, -1), values.view(1, 1, -1)], -1)

    with _replaced_forward(head, forward, head_outputs):
        output = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=False,
            return_dict=True,
            **(model_kwargs or {}),
        )
    if not results:
        raise RuntimeError(
            f"{type(model).__name__} did not call its head, {type(head).__name__}: a compiled "
            "model may have kept its code; pass the model that was compiled, or compile the loss"
        )
    _check_scaling(scaling, output.logits, model)
    values, named = results[-1] if stats else (results[-1], {})
    values = _Through.apply(values.detach(), head_outputs[-1], output.logits)  # type: ignore[no-untyped-call]
    return (values, named) if stats else values


class _Through(torch.autograd.Function):
    """values (B,), whose gradient goes back through what the head returned (1, 1, P + B), and waits
    for that of the model's logits, which is 0: FSDP gathers weights at the one and at the other,
    and DistributedDataParallel looks for used parameters there."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, head_output: Tensor, logits: Tensor) -> Tensor:
        ctx.save_for_backward(head_output.new_empty(0), logits.new_empty(0))
        ctx.shape = logits.shape
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor) -> tuple[None, Tensor, Tensor]:
        of_head, of_logits = ctx.saved_tensors
        grad_head = torch.nn.functional.pad(grad_values.to(of_head.dtype), (len(PROBE), 0))
        return None, grad_head.view(1, 1, -1), of_logits.new_zeros(ctx.shape)


class LogitScaling(NamedTuple):
    """What a model does to `hidden @ weight.T + bias`: cap(logit_scale * logits)."""

    logit_scale: float
    softcap: float | None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def logit_scaling(model: nn.Module) -> LogitScaling:
    """Read it from a transformers configuration: Gemma's `final_logit_softcapping`, Cohere's
    `logit_scale`, Granite's `logits_scaling` (a divisor), Falcon-H1's `lm_head_multiplier`.

    MiniCPM and kin scale hidden states before the head, which needs nothing here.
    """
    config = language_model(model).config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        value = getattr(config, name, None)
        scale *= 1.0 if value is None else float(value)
    divisor = getattr(config, "logits_scaling", None)
    scale /= 1.0 if divisor is None else float(divisor)
    softcap = getattr(config, "final_logit_softcapping", None)
    return LogitScaling(scale, None if softcap is None else float(softcap))


def output_head(model: nn.Module) -> nn.Linear:
    """The linear layer that makes the model's logits.

    Raises:
        TypeError: there is none, or it computes something else than `hidden @ weight.T + bias`.
    """
    head: Any = language_model(model).get_output_embeddings()
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
    """The module under the wrappers that knows its head."""
    for module in model.modules():
        if callable(getattr(module, "get_output_embeddings", None)):
            return module
    raise TypeError(
        f"model must be a causal language model with get_output_embeddings(), got "
        f"{type(model).__name__}; call fused_linear_seq_logprob with its hidden states and head"
    )


@contextlib.contextmanager
def _replaced_forward(head: nn.Linear, forward: Any, outputs: list[Tensor]) -> Iterator[None]:
    """Have the head run `forward`, and note what its hooks make of that: they stay, since FSDP and
    ZeRO-3 gather its weight in them."""
    hook = head.register_forward_hook(lambda module, args, output: outputs.append(output))
    head.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del head.forward
        hook.remove()


def _check_scaling(scaling: LogitScaling, logits: Tensor, model: nn.Module) -> None:
    """Compare what became of the probe with what was computed. Waits for a GPU."""
    got = logits.detach().flatten()[: len(PROBE)].double().cpu()
    expected = scaling(torch.tensor(PROBE, dtype=torch.float64))
    if got.shape != expected.shape or not torch.allclose(got, expected, rtol=1e-4, atol=1e-6):
        raise ValueError(
            f"{type(language_model(model)).__name__} treats its logits in a way that its "
            f"configuration does not say: {[round(x, 4) for x in PROBE]} became "
            f"{[round(x, 4) for x in got.tolist()]}, expected a logit_scale of "
            f"{scaling.logit_scale} and a softcap of {scaling.softcap}; call "
            "fused_linear_seq_logprob with hidden states, logit_scale and softcap of your own"
        )
