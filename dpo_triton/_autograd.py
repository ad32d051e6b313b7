"""From arguments through checks and operators to results: the one body of the public functions, and
the autograd function of logits.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed import ProcessGroup

from . import _checks, _ops
from ._records import Combined, Request, Scaling, Scored, Scores, Tokens, VocabShard


class Options(NamedTuple):
    """What a public function was told besides tensors, as it came."""

    reduction: str | None  # None: one value per token
    scaling: Scaling
    stats: Sequence[str]
    backend: str
    vocab_shard: VocabShard | None = None
    sequence_group: ProcessGroup | None = None


class Source(Protocol):
    """What the logits come from: a tensor of them, or hidden states and a head."""

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All that it is made of."""

    def check(self, tokens: Tokens) -> None:
        """Raise what is wrong with it, and with the tokens beside it."""

    def _asdict(self) -> dict[str, Any]:
        """What it is made of, as the caller named it."""

    def as_batch(self) -> Any:
        """Packed rows as a batch of one, a Source of the same kind."""

    def score(self, tokens: Tokens, request: Request) -> Scores:
        """Both passes, differentiable."""


AnySource = TypeVar("AnySource", bound=Source)


class Passes(NamedTuple):
    """Both passes over logits: by operators where all of them are here, else by stages and what the
    other ranks say."""

    # Logits, tokens, request -> a Combined, and the weights (B, T).
    forward: Callable[[Tensor, Tokens, Request], tuple[Combined, Tensor]]
    # Upstream (B, T), logits, scored, softmax, request, in place -> the gradient of logits.
    backward: Callable[[Tensor, Tensor, Scored, Tensor, Request, bool], Tensor]


def _forward(logits: Tensor, tokens: Tokens, request: Request) -> tuple[Combined, Tensor]:
    asked = (request.reduction, request.stats, request.backend)
    *combined, weights = _ops.logprob(logits, *tokens, *_ops.numbers_of(request), *asked)
    return Combined(*combined), weights


def _backward(
    grad_logps: Tensor,
    logits: Tensor,
    scored: Scored,
    softmax: Tensor,
    request: Request,
    in_place: bool,
) -> Tensor:
    inputs = (grad_logps, logits, *scored, softmax, *_ops.numbers_of(request), request.backend)
    if in_place:
        _ops.logprob_grad_(*inputs)
        return logits.detach()
    grad: Tensor = _ops.logprob_grad(*inputs)
    return grad


_BY_OPERATORS = Passes(_forward, _backward)


class Logits(NamedTuple):
    logits: Tensor  # (B, T, V) or (N, V)
    inplace_backward: bool

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.logits,)

    @property
    def dtype(self) -> torch.dtype:
        return self.logits.dtype

    def check(self, tokens: Tokens) -> None:
        _checks.check_logits(self.logits, tokens.cu_seqlens, self.inplace_backward)
        _checks.check_tokens(self.logits, tokens, "logits")

    def as_batch(self) -> "Logits":
        return self._replace(logits=self.logits[None])

    def score(self, tokens: Tokens, request: Request, passes: Passes = _BY_OPERATORS) -> Scores:
        logits, in_place = self
        if torch.is_grad_enabled() and logits.requires_grad:
            return Scores(*Logprob.apply(logits, tokens, request, in_place, passes))  # type: ignore[no-untyped-call]
        combined, _ = passes.forward(logits, tokens, request)
        return scores(request, combined)


def log_probabilities(
    source: Source, tokens: Tokens, options: Options
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """The one body of the public functions, which differ in the source alone."""
    is_sharded = options.vocab_shard is not None or options.sequence_group is not None
    given = (*source.tensors, tokens.labels, tokens.mask, tokens.cu_seqlens)
    if is_sharded or have_dtensor(given):
        from .parallel import sharded_scores

        found = sharded_scores(source, tokens, options)
    else:
        source, tokens, request = checked(source, tokens, options)
        found = source.score(tokens, request)
    return _named(found, tokens.cu_seqlens is not None, options)


def checked(
    source: AnySource, tokens: Tokens, options: Options
) -> tuple[AnySource, Tokens, Request]:
    """Check what came, and put it as the stages take it: tokens and their rows as a batch."""
    _checks.check_choices(options)
    source.check(tokens)
    if forward_ad._current_level >= 0:
        _checks.check_no_tangents({**source._asdict(), **tokens._asdict()})
    scaling = _checks.checked_scaling(options.scaling)
    labels, mask, cu_seqlens, shift, ignore_index = tokens
    if options.reduction is None and mask is not None:  # says only what is scored
        mask = mask != 0
    tokens = Tokens(labels, mask, cu_seqlens, bool(shift), _checks.checked_index(ignore_index))
    request = Request(
        scaling,
        _ops.symbols_of(scaling),
        options.reduction or "none",
        tuple(name for name in _checks.TOKEN_STATS if name in options.stats)
        if options.stats
        else (),
        "lengths" in options.stats,
        "token_logps" in options.stats,
        options.backend,
    )
    if cu_seqlens is not None:
        source, tokens = source.as_batch(), tokens.as_batch()
    return source, tokens, request


def scores(request: Request, combined: Combined) -> Scores:
    """The results of a call, of which no two share memory, with each other or with what the
    backward pass reads: lengths."""
    values, lengths, logps, _, stats = combined
    is_per_token = request.reduction == "none"
    return Scores(
        logps if is_per_token else values,
        lengths.clone() if request.wants_lengths else None,
        (logps.clone() if is_per_token else logps) if request.wants_logps else None,
        stats if request.stats else None,
    )


def _named(
    found: Scores, is_packed: bool, options: Options
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    result = found.result[0] if is_packed and options.reduction is None else found.result
    if not options.stats:
        return result
    every = {"lengths": found.lengths}
    tokens = [name for name in _checks.TOKEN_STATS if name in options.stats]
    stats = () if found.stats is None else found.stats
    for name, stat in zip(["token_logps", *tokens], [found.logps, *stats], strict=True):
        every[name] = stat[0] if is_packed and stat is not None else stat
    return result, {name: every[name] for name in options.stats}  # type: ignore[misc]


def have_dtensor(tensors: Sequence[object]) -> bool:
    """Whether one is a DTensor. `torch.distributed.tensor` is not imported: whoever passes one has
    done that."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return False
    return any(isinstance(x, module.DTensor) for x in tensors if type(x) is not Tensor)


class Logprob(torch.autograd.Function):
    """logits (B, T, V) -> Scores, of which the result is differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        tokens: Tokens,
        request: Request,
        inplace_backward: bool,
        passes: Passes,
    ) -> tuple[Tensor | None, ...]:
        if inplace_backward:
            check_no_hooks()
        combined, weights = passes.forward(logits, tokens, request)
        of_sequences = (tokens.cu_seqlens, combined.lengths)
        of_tokens = (tokens.labels, weights, combined.softmax)
        ctx.save_for_backward(logits, *of_tokens, *of_sequences, request.symbols)
        ctx.shift, ctx.request, ctx.passes = tokens.shift, request, passes
        ctx.inplace_backward, ctx.is_overwritten = inplace_backward, False
        return marked(ctx, scores(request, combined))

    @staticmethod
    def backward(
        ctx: Any, grad_result: Tensor, *unused: Tensor
    ) -> tuple[Tensor, None, None, None, None]:
        in_place = ctx.inplace_backward
        saved = saved_logits(ctx) if in_place else ctx.saved_tensors
        logits, labels, weights, softmax, cu_seqlens, lengths, symbols = saved
        scored = Scored(labels, weights, ctx.shift)
        request = ctx.request if symbols is None else ctx.request._replace(symbols=symbols)
        with torch.no_grad():
            upstream = spread(grad_result, request.reduction, lengths, cu_seqlens, weights)
            grad = ctx.passes.backward(upstream, logits, scored, softmax, request, in_place)
        ctx.is_overwritten = in_place
        return differentiated_once(grad), None, None, None, None


def marked(ctx: Any, found: Scores) -> Scores:
    """The results of a forward pass, all but the first one without a gradient."""
    _, *others = found
    ctx.mark_non_differentiable(*(x for x in others if x is not None))
    return found


def check_no_hooks() -> None:
    """In place, what is saved must be the very logits, and known to whoever else saved them."""
    if torch.compiler.is_compiling():
        return
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        raise RuntimeError(
            "inplace_backward=True got logits under saved-tensor hooks (non-reentrant activation "
            "checkpointing, save_on_cpu), where others may be handed the memory that the gradient "
            "overwrites, without a word; pass inplace_backward=False there, or take the "
            "log-probabilities out of the checkpointed function"
        )


def saved_logits(ctx: Any) -> tuple[Any, ...]:
    """The saved tensors of a pass in place, or why they are not what they were."""
    if ctx.is_overwritten:
        raise RuntimeError(
            "inplace_backward=True: an earlier backward pass wrote its gradient over the "
            "logits, so there is nothing to differentiate again; pass inplace_backward=False"
        )
    try:
        return tuple(ctx.saved_tensors)
    except RuntimeError as error:
        raise RuntimeError(
            "inplace_backward=True: the logits, or what they are a view of, were written to after "
            "the forward pass; two parts of one tensor cannot both be overwritten: score them in "
            f"one call, or pass inplace_backward=False ({error})"
        ) from error


def spread(
    grad_result: Tensor, reduction: str, lengths: Tensor, cu_seqlens: Tensor | None, weights: Tensor
) -> Tensor:
    """Upstream gradient of each token, (B, T), up to its weight. No host synchronisation."""
    if reduction == "none":
        return grad_result
    # An empty sequence gives 0 / 0 here, and has no token that would read it.
    grad_values = grad_result / lengths if reduction == "mean" else grad_result
    if cu_seqlens is None:
        return grad_values.unsqueeze(1).expand_as(weights)
    if grad_values.numel() == 0:
        return torch.zeros_like(weights)
    places = torch.arange(weights.numel(), dtype=cu_seqlens.dtype, device=weights.device)
    sequence = torch.searchsorted(cu_seqlens, places, right=True) - 1
    return grad_values[sequence.clamp_(0, grad_values.numel() - 1)].view_as(weights)


class _DifferentiatedOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, anything: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "double backward: the gradient that dpo_triton computes cannot be differentiated "
            "again; for second derivatives use dpo_triton.reference, which is plain PyTorch"
        )


def differentiated_once(grad: Any) -> Any:
    """A gradient that says so where it would be differentiated again."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return grad
    # It depends on tensors that were not all kept: a leaf of its own stands for them.
    anything = torch.empty((), requires_grad=True)
    return _DifferentiatedOnce.apply(grad, anything)  # type: ignore[no-untyped-call]
