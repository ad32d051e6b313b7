"""The Triton kernels that the kernel benchmark sets side by side, as (logits, labels, mask, shift).

logits are (B, T, V), labels (B, T) int64, mask (B, T) int64 of 0 and 1, or None: all are scored.
The result is the sum of the log-probabilities of each sequence, (B,) in nats, differentiable: of
labels[b, t] by logits[b, t], or with shift of labels[b, t + 1], for which the peers have to slice
the logits.
"""

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

import dpo_triton

SeqLogprob = Callable[[Tensor, Tensor, Tensor | None, bool], Tensor]

OURS = "dpo_triton"
TRL = "TRL"
LIGER = "Liger"
FLASH_ATTENTION = "flash-attention"
MODULES = {
    TRL: "trl.kernels.logprob_entropy",
    LIGER: "liger_kernel.ops.cross_entropy",
    FLASH_ATTENTION: "flash_attn.ops.triton.cross_entropy",
}
DESCRIPTIONS = {
    OURS: 'fused_seq_logprob(..., shift=..., backend="triton")',
    TRL: "trl.kernels.logprob_entropy; it computes the entropy too",
    LIGER: "liger_kernel's cross-entropy; its forward writes the gradient over the logits",
    FLASH_ATTENTION: "flash_attn's Triton cross-entropy",
}


@dataclass(frozen=True)
class KernelPeer:
    name: str
    fn: SeqLogprob
    tile: Callable[[str, int, str], int]  # (kernel, vocab_size, dtype) -> columns
    result_dtype: torch.dtype = torch.float32  # of a token's log-probability
    overwrites_logits: bool = False  # when it is differentiated
    per_token_kernels: tuple[str, ...] = ()  # they read no logits
    run_per_token: Callable[[int, int], object] | None = None  # those, for (vocab_size, tokens)
    on_target: Callable[[str], contextlib.AbstractContextManager[None]] = lambda target: (
        contextlib.nullcontext()
    )


def collect(dtype: torch.dtype) -> tuple[list[KernelPeer], dict[str, str]]:
    """Return what is installed, this package first, and the reason for each peer that is not."""
    peers = [ours()]
    missing = {}
    makers = {TRL: trl, LIGER: liger, FLASH_ATTENTION: flash_attention}
    for name, make in makers.items():
        reason = why_not(MODULES[name])
        if reason is None:
            peers.append(make(dtype))
        else:
            missing[name] = reason
    return peers, missing


def ours() -> KernelPeer:
    def fn(logits: Tensor, labels: Tensor, mask: Tensor | None, shift: bool) -> Tensor:
        value = dpo_triton.fused_seq_logprob(
            logits, labels, mask, reduction="sum", shift=shift, backend="triton"
        )
        assert isinstance(value, Tensor)
        return value

    def tile(kernel: str, vocab_size: int, dtype_name: str) -> int:
        logits = torch.empty((1, 1, vocab_size), dtype=getattr(torch, dtype_name), device="meta")
        if kernel == "_partials_kernel":
            config = module("dpo_triton.kernels.partials").launch_config(logits, False)
        else:
            config = module("dpo_triton.kernels.grad").launch_config(logits, logits, False)
        return int(config["BLOCK_V"])

    def combine(vocab_size: int, num_tokens: int) -> object:
        kernels = module("dpo_triton.kernels")
        partials = torch.ones(2, kernels.num_splits(vocab_size), num_tokens)
        target, weights = torch.zeros(num_tokens), torch.ones(1, num_tokens)
        return kernels.combine(
            partials, target, weights, None, "sum", vocab_size, 1.0, 1.0, None, ()
        )

    return KernelPeer(OURS, fn, tile, per_token_kernels=("_combine_kernel",), run_per_token=combine)


def trl(dtype: torch.dtype) -> KernelPeer:
    kernels = module(MODULES[TRL])

    def fn(logits: Tensor, labels: Tensor, mask: Tensor | None, shift: bool) -> Tensor:
        logits, labels, mask = sliced(logits, labels, mask, shift)
        logps, _ = kernels.selective_log_softmax_and_entropy(logits, labels, row_mask=mask)
        return masked_sum(logps, mask)

    return KernelPeer(TRL, fn, lambda kernel, vocab_size, dtype_name: int(kernels._BLOCK_SIZE))


def liger(dtype: torch.dtype) -> KernelPeer:
    kernels = module(MODULES[LIGER])

    def fn(logits: Tensor, labels: Tensor, mask: Tensor | None, shift: bool) -> Tensor:
        logits, labels, mask = sliced(logits, labels, mask, shift)
        targets = ignoring(labels, mask).reshape(-1)
        loss, *_ = kernels.LigerCrossEntropyFunction.apply(
            logits.reshape(-1, logits.shape[-1]), targets, None, -100, 0.0, 0.0, "none"
        )
        return -masked_sum(loss.view_as(labels).float(), mask)

    def tile(kernel: str, vocab_size: int, dtype_name: str) -> int:
        return int(min(kernels.MAX_FUSED_SIZE, triton.next_power_of_2(vocab_size)))

    @contextlib.contextmanager
    def on_target(target: str) -> Iterator[None]:
        """Have it choose its warps for the target rather than for this machine."""
        names = {"sm_80": "ampere_ada", "sm_90": "hopper", "sm_100": "blackwell"}
        before = kernels.infer_device_arch, kernels.is_hip
        kernels.infer_device_arch = lambda *args: names.get(target, target)
        kernels.is_hip = lambda: target.startswith("gfx")
        try:
            yield
        finally:
            kernels.infer_device_arch, kernels.is_hip = before

    return KernelPeer(
        LIGER, fn, tile, result_dtype=dtype, overwrites_logits=True, on_target=on_target
    )


def flash_attention(dtype: torch.dtype) -> KernelPeer:
    kernels = module(MODULES[FLASH_ATTENTION])

    def fn(logits: Tensor, labels: Tensor, mask: Tensor | None, shift: bool) -> Tensor:
        logits, labels, mask = sliced(logits, labels, mask, shift)
        targets = ignoring(labels, mask).reshape(-1)
        losses, _ = kernels.cross_entropy_loss(logits.reshape(-1, logits.shape[-1]), targets)
        return -masked_sum(losses.view_as(labels), mask)

    def tile(kernel: str, vocab_size: int, dtype_name: str) -> int:
        most = 16 * 1024 if "fwd" in kernel else 4 * 1024  # constants inside of its functions
        return min(most, triton.next_power_of_2(vocab_size))

    return KernelPeer(FLASH_ATTENTION, fn, tile)


def sliced(
    logits: Tensor, labels: Tensor, mask: Tensor | None, shift: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    if not shift:
        return logits, labels, mask
    return logits[:, :-1], labels[:, 1:], None if mask is None else mask[:, 1:]


def ignoring(labels: Tensor, mask: Tensor | None) -> Tensor:
    return labels if mask is None else labels.masked_fill(mask == 0, -100)


def masked_sum(logps: Tensor, mask: Tensor | None) -> Tensor:
    return (logps if mask is None else logps * mask).sum(1)


def module(name: str) -> Any:
    return importlib.import_module(name)


def why_not(name: str) -> str | None:
    """The reason why a module cannot be imported, or None."""
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    try:
        importlib.import_module(name)
    except Exception as error:  # what a package does at import without a GPU is its own affair
        lines = str(error).strip().splitlines() or [""]
        return f"{name}: {type(error).__name__}: {lines[0][:120]}"
    return None
