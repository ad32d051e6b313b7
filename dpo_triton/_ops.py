"""Both passes over logits as torch.library operators: `logprob`, `logprob_grad`, `logprob_grad_`.

Here alone arguments are flat, as schemas want them. torch.compile sees an opaque call that its fake
describes. Operators are registered without autograd, which is outside of them, in `_autograd`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._backends import resolve_backend
from ._records import Columns, Combined, Partials, Request, Scaling, Scored, Tokens, sum_dtype

# Of the operators: the package's own name, so that another copy of it, imported under another name
# as the Hugging Face Hub does, can live in the same process.
NAMESPACE = __name__.rpartition(".")[0].replace(".", "_")
_library: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]

TOKENS = "Tensor labels, Tensor? mask, Tensor? cu_seqlens, bool shift, SymInt ignore_index"
# symbols are the numbers before them where a graph does not know these; see `symbols_of`.
SCALING = "float temperature, float logit_scale, float? softcap, Tensor? symbols"
_GRAD_INPUTS = f"Tensor labels, Tensor weights, bool shift, Tensor softmax, {SCALING}, str backend"


class Operator:
    """An operator of this package: its dispatcher where somebody watches, else its body alone."""

    def __init__(self, schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> None:
        name = schema.partition("(")[0]
        tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
        _library.define(schema, tags=tags)
        _library.impl(name, body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
        self.overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        self.body = body

    def __call__(self, *inputs: Any) -> Any:
        if is_watched(*inputs):
            return self.overload(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return self.body(*inputs)


def is_watched(*inputs: Any) -> bool:
    """Whether more than the device takes part in an operator: a tracer, a mode, a transform, a
    profiler, or a tensor that is more than its memory. In eager calls the dispatcher would take
    longer than a kernel's launch.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
    ):
        return True
    for x in inputs:  # noqa: SIM110, any() and its generator take longer
        if isinstance(x, Tensor) and not _is_plain(x):
            return True
    return False


def _is_plain(tensor: Tensor) -> bool:
    """Not of a class of its own, without data, with a sign to be resolved, batched, sparse, ..."""
    if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
        return False
    return torch._C._dispatch_keys(tensor).raw_repr() in _plain_keys(tensor.device.type)


@functools.cache
def _plain_keys(device_type: str) -> frozenset[int]:
    """Dispatch keys of tensors that are their memory and nothing else."""
    if device_type == "meta":
        return frozenset()
    plain = torch.empty(0, device=device_type)
    with torch.inference_mode():
        of_inference = torch.empty(0, device=device_type)
    return frozenset(torch._C._dispatch_keys(x).raw_repr() for x in (plain, of_inference))


def symbols_of(scaling: Scaling) -> Tensor | None:
    """The numbers of a scaling as a tensor, (2,) or (3,) float64 on the CPU, while compiling.

    A graph would hold an operator's numbers as constants, and be compiled anew for each new
    temperature. The products below are what PyTorch keeps symbolic. None for the defaults.
    """
    if not torch.compiler.is_compiling():
        return None
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    temperature, logit_scale, softcap = scaling
    is_one = [statically_known_true(number == 1.0) for number in (temperature, logit_scale)]
    if softcap is None and all(is_one):
        return None
    one = torch.ones((), dtype=torch.float64)
    return torch.stack([one * number for number in scaling if number is not None])


class Numbers(NamedTuple):
    """A scaling as operators take it; its symbols, if there are any, are what counts."""

    temperature: float
    logit_scale: float
    softcap: float | None
    symbols: Tensor | None  # with a third one if there is a softcap


def numbers_of(request: Request) -> tuple[float | Tensor | None, ...]:
    """The fields of `Numbers`."""
    if request.symbols is None:
        return *request.scaling, None
    return 1.0, 1.0, None, request.symbols


def scaling_of(
    temperature: float, logit_scale: float, softcap: float | None, symbols: Tensor | None
) -> Scaling:
    """The scaling that an operator was called with."""
    if symbols is None:
        return Scaling(temperature, logit_scale, softcap)
    temperature, logit_scale, *caps = symbols.tolist()
    return Scaling(temperature, logit_scale, caps[0] if caps else None)


def _logprob(logits: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """Both stages of the forward pass: a Combined, and the weights (B, T)."""
    labels, mask, cu_seqlens, shift, ignore_index, *numbers, reduction, stats, backend = inputs
    stages = resolve_backend(backend, logits.device, logits.dtype)
    tokens = Tokens(labels, mask, cu_seqlens, shift, ignore_index)
    scaling, vocab_size = scaling_of(*numbers), logits.shape[-1]
    columns, dtype = Columns.all_of(vocab_size), sum_dtype(logits.dtype)
    partials = Partials.empty(tokens, columns, stages.num_splits(vocab_size), len(stats), dtype)
    stages.partials(logits, tokens, columns, scaling, stats, partials)
    stages.check(tokens, partials.weights, vocab_size)
    combined = Combined.empty(partials.weights, tokens.num_sequences(reduction), len(stats))
    stages.combine(partials, cu_seqlens, reduction, vocab_size, scaling, stats, combined)
    return *combined, partials.weights


def _fake_logprob(logits: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    labels, mask, cu_seqlens, shift, ignore_index, *_, reduction, stats, _ = inputs
    tokens = Tokens(labels, mask, cu_seqlens, shift, ignore_index)
    weights = labels.new_empty(labels.shape, dtype=sum_dtype(logits.dtype))
    return *Combined.empty(weights, tokens.num_sequences(reduction), len(stats)), weights


def _logprob_grad(grad_logps: Tensor, logits: Tensor, *inputs: Any) -> Tensor:
    """The gradient of logits, (B, T, V) contiguous; grad_logps is (B, T), possibly expanded."""
    return _grad(grad_logps, logits, inputs, None)


def _logprob_grad_(grad_logps: Tensor, logits: Tensor, *inputs: Any) -> None:
    """Write the gradient of logits over logits."""
    _grad(grad_logps, logits, inputs, logits)
    torch.autograd.graph.increment_version(logits)


def _grad(grad_logps: Tensor, logits: Tensor, inputs: Sequence[Any], out: Tensor | None) -> Tensor:
    labels, weights, shift, softmax, *numbers, backend = inputs
    stages = resolve_backend(backend, logits.device, logits.dtype)
    scored, columns = Scored(labels, weights, shift), Columns.all_of(logits.shape[-1])
    return stages.grad(grad_logps, logits, scored, softmax, columns, scaling_of(*numbers), out)


logprob = Operator(
    f"logprob(Tensor logits, {TOKENS}, {SCALING}, str reduction, str[] stats, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _logprob,
    _fake_logprob,
)
logprob_grad = Operator(
    f"logprob_grad(Tensor grad_logps, Tensor logits, {_GRAD_INPUTS}) -> Tensor",
    _logprob_grad,
    lambda grad_logps, logits, *inputs: torch.empty_like(
        logits, memory_format=torch.contiguous_format
    ),
)
logprob_grad_ = Operator(
    f"logprob_grad_(Tensor grad_logps, Tensor(a!) logits, {_GRAD_INPUTS}) -> ()",
    _logprob_grad_,
    lambda grad_logps, logits, *inputs: None,
)
