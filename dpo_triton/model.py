"""Sequence log-probabilities of a causal language model, whose head never makes logits."""

import contextlib
import inspect
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._autograd import Options, log_probabilities
from ._backends import BackendName
from ._head import Head
from ._language_model import language_model, logit_scaling, num_virtual_tokens, output_head
from ._records import Scaling, Tokens
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
    cu_seqlens: Tensor | None = None,
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
            Virtual tokens (prompt tuning, p-tuning) are not scored.
        input_ids: (B, T) int64, or (N,) with `cu_seqlens`.
        attention_mask: (B, T), handed to the model. Where it begins with 0, positions are counted
            from each sequence's first token and handed to a model that takes position_ids.
        labels: shape of input_ids, int64, not shifted; input_ids by default.
        mask: shape of input_ids, weights of the labels, bool, integer or floating; by default every
            token whose predecessor is none of padding, by attention_mask: pass the answers' mask,
            as a prompt does not count.
        cu_seqlens: (S + 1,): packed sequences, without attention_mask. Positions that begin anew
            tell the model of them; whether it keeps them apart is tried at its first call.
        reduction, ignore_index, temperature, tile_bytes, backend: see `fused_linear_seq_logprob`.
        stats: likewise, and "aux_loss", the load balancing loss of a mixture of experts, which
            alone among them keeps its gradient.
        model_kwargs: more arguments for the model, such as `position_ids`.

    Returns:
        (B,) or (S,) float32, float64 for a float64 model; with stats, a pair of that and a dict
        from name to detached tensor, per token aligned with labels.

    Raises:
        TypeError: a model without a head, or with one that is no plain linear layer (an adapter
            on the head, a quantised one).
        ValueError: a model that does something else to its logits, or mixes packed sequences; an
            argument that does not fit.
        RuntimeError: the model did not call its head.
    """
    base = language_model(model)
    head = output_head(model)
    scaling = logit_scaling(model)
    kwargs = dict(model_kwargs or {})
    positions: Tensor | None
    if cu_seqlens is not None:
        _check_packed(input_ids, attention_mask, cu_seqlens)
        _check_kept_apart(model, head, input_ids.device)
        positions = _packed_positions(len(input_ids), cu_seqlens)
    else:
        positions = _positions(attention_mask)
        if mask is None and attention_mask is not None and attention_mask.dim() == 2:
            # What follows a row's padding has no token before it.
            is_first = F.pad(attention_mask[:, :-1] == 0, (1, 0))
            mask = attention_mask.masked_fill(is_first, 0)
    if positions is not None and _takes_positions(base):
        kwargs.setdefault("position_ids", positions)
    if "aux_loss" in stats:
        _check_has_aux_loss(base)
        kwargs["output_router_logits"] = True
    num_virtual = num_virtual_tokens(model)
    tokens = Tokens(input_ids if labels is None else labels, mask, cu_seqlens, True, ignore_index)
    own_stats = [name for name in stats if name != "aux_loss"]
    options = Options(reduction, scaling._replace(temperature=temperature), own_stats, backend)
    results: list[Any] = []
    head_outputs: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        if cu_seqlens is not None:
            hidden = hidden[0]
        elif hidden.shape[1] == input_ids.shape[1] + num_virtual:
            hidden = hidden[:, num_virtual:]
        source = Head(hidden, head.weight, head.bias, tile_bytes)
        result = log_probabilities(source, tokens, options)
        results.append(result)
        values = result[0] if isinstance(result, tuple) else result
        probe = torch.tensor(PROBE, dtype=values.dtype, device=values.device)
        return torch.cat([probe.view(1, 1, -1), values.view(1, 1, -1)], -1)

    with _replaced_forward(head, forward, head_outputs):
        output = model(
            input_ids=input_ids if cu_seqlens is None else input_ids[None],
            attention_mask=attention_mask,
            use_cache=False,
            return_dict=True,
            **kwargs,
        )
    if not results:
        raise RuntimeError(
            f"{type(model).__name__} did not call its head, {type(head).__name__}: a compiled "
            "model may have kept its code; pass the model that was compiled, or compile the loss"
        )
    _check_scaling(scaling, output.logits, base)
    result = results[-1]
    values, named = result if isinstance(result, tuple) else (result, {})
    values = _Through.apply(values.detach(), head_outputs[-1], output.logits)  # type: ignore[no-untyped-call]
    if "aux_loss" in stats:
        named["aux_loss"] = output.aux_loss
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
        grad_head = F.pad(grad_values.to(of_head.dtype), (len(PROBE), 0))
        return None, grad_head.view(1, 1, -1), of_logits.new_zeros(ctx.shape)


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


def _check_scaling(scaling: Scaling, logits: Tensor, base: nn.Module) -> None:
    """Compare what became of the probe with what was computed. Waits for a GPU."""
    got = logits.detach().flatten()[: len(PROBE)].double().cpu()
    expected = scaling.slope * scaling.cap_(torch.tensor(PROBE, dtype=torch.float64))
    if got.shape != expected.shape or not torch.allclose(got, expected, rtol=1e-4, atol=1e-6):
        raise ValueError(
            f"{type(base).__name__} treats its logits in a way that its "
            f"configuration does not say: {[round(x, 4) for x in PROBE]} became "
            f"{[round(x, 4) for x in got.tolist()]}, expected a logit_scale of "
            f"{scaling.logit_scale} and a softcap of {scaling.softcap}; call "
            "fused_linear_seq_logprob with hidden states, logit_scale and softcap of your own"
        )


def _positions(attention_mask: Tensor | None) -> Tensor | None:
    """(B, T) positions counted from each sequence's first token; None where no padding is before
    one, and the model's own are these. Waits for a GPU."""
    if attention_mask is None or attention_mask.dim() != 2 or bool(attention_mask[:, :1].all()):
        return None
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def _packed_positions(num_tokens: int, cu_seqlens: Tensor) -> Tensor:
    """(1, N) positions that begin anew with each sequence, and with what comes after the last."""
    at = torch.arange(num_tokens, device=cu_seqlens.device)
    starts = cu_seqlens.long()
    return (at - starts[torch.searchsorted(starts, at, right=True) - 1])[None]


def _takes_positions(base: nn.Module) -> bool:
    return "position_ids" in inspect.signature(base.forward).parameters


def _check_packed(input_ids: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor) -> None:
    if attention_mask is not None:
        raise ValueError(
            "attention_mask must be None with cu_seqlens, got both; packed tokens have no padding"
        )
    if input_ids.dim() != 1:
        raise ValueError(
            f"input_ids must have shape (N,) with cu_seqlens, got {tuple(input_ids.shape)}; pass "
            "input_ids[0] of a packed batch, without cu_seqlens pass (B, T)"
        )
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(
            f"cu_seqlens must have shape (S + 1,), got {tuple(cu_seqlens.shape)}; it holds 0, then "
            "the end of each sequence"
        )


# How the attention of a model was computed when it was last seen to keep sequences apart.
_kept_apart: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def _check_kept_apart(model: nn.Module, head: nn.Linear, device: torch.device) -> None:
    """Run two packed sequences twice, with another first one, and see that the second one's hidden
    states stay: recurrent layers, and attention whose mask does not heed positions, mix them."""
    base = language_model(model)
    attention = getattr(base.config, "_attn_implementation", None)
    if _takes_positions(base) and _kept_apart.get(base, ()) == attention:
        return
    hidden_states: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        hidden_states.append(hidden[0])
        return hidden.new_zeros(1, 1, 1)

    cuda = [device] if device.type == "cuda" else []
    position_ids = torch.arange(4, device=device).repeat(1, 2)
    with torch.no_grad(), torch.random.fork_rng(cuda), _replaced_forward(head, forward, []):
        for token in range(2 if _takes_positions(base) else 0):
            torch.manual_seed(0)  # the same dropout
            input_ids = torch.tensor([[token] * 4 + [0, 1, 0, 1]], device=device)
            model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    if hidden_states:
        first, second = (hidden[4:].float() for hidden in hidden_states)
        tolerance = 8 * torch.finfo(hidden_states[0].dtype).eps * float(first.abs().max())
        if float((first - second).abs().max()) <= tolerance:
            _kept_apart[base] = attention
            return
    raise ValueError(
        f"{type(base).__name__} must keep packed sequences apart by position_ids, and "
        + ("lets a sequence see the one before it" if hidden_states else "does not take them")
        + "; pad them to (B, T) with an attention_mask"
    )


def _check_has_aux_loss(base: Any) -> None:
    config = base.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not hasattr(config, "output_router_logits"):
        raise ValueError(
            f'stats may have "aux_loss" for a mixture of experts, got it for '
            f"{type(base).__name__}, whose configuration has no output_router_logits; leave it out"
        )
