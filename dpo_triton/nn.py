"""`fused_dpo_loss` and `fused_linear_dpo_loss` as modules: options once, tensors in each call.

    from dpo_triton.nn import DPOLoss

    dpo_loss = DPOLoss(beta=0.1, loss_type="ipo", shift=True)
    loss, metrics = dpo_loss(policy_logits, labels, mask, ref_logits=ref_logits)

A module computes nothing of its own, and has no parameters and no state.
"""

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ._backends import BackendName
from .dpo_loss import DPOLossOutput, fused_dpo_loss, fused_linear_dpo_loss
from .losses import LOSSES, Layout, LossName, LossOptions
from .seq_logprob import DistributionStat, Reduction, ScoreOptions

__all__ = ["DPOLoss", "LinearDPOLoss"]


class _PairOptions(LossOptions, ScoreOptions, total=False):
    """What both functions take beside tensors."""

    ref_reduction: Reduction | None
    loss_type: LossName | Sequence[LossName]
    loss_weights: Sequence[float] | None
    beta: float
    rpo_alpha: float | None
    ld_alpha: float | None
    use_weighting: bool
    layout: Layout
    stats: Sequence[DistributionStat]


class DPOLossOptions(_PairOptions, total=False):
    """Of the constructor of `DPOLoss`."""

    inplace_backward: bool


class DPOLossInputs(DPOLossOptions, total=False):
    """Of a call of `DPOLoss`, beside its positional arguments."""

    ref_logps: Tensor | None
    ref_logits: Tensor | None
    cu_seqlens: Tensor | None


class LinearDPOLossOptions(_PairOptions, total=False):
    """Of the constructor of `LinearDPOLoss`."""

    tile_bytes: int | None


class LinearDPOLossInputs(LinearDPOLossOptions, total=False):
    """Of a call of `LinearDPOLoss`, beside its positional arguments."""

    bias: Tensor | None
    ref_logps: Tensor | None
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_bias: Tensor | None
    cu_seqlens: Tensor | None


class _PairLoss(nn.Module):
    """Keeps options for its calls, which may give others."""

    options: dict[str, Any]

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

    def _check_options(self) -> None:
        """Call itself with a batch of no pairs: the functions' own checks speak here already."""
        backend = self.options.get("backend", "auto")
        if backend not in get_args(BackendName):
            names = ", ".join(repr(name) for name in get_args(BackendName))
            raise ValueError(f"backend must be out of {names}, got {backend!r}")
        loss_type = self.options.get("loss_type", "sigmoid")
        losses = [loss_type] if isinstance(loss_type, str) else list(loss_type)
        known = [LOSSES[name] for name in losses if name in LOSSES]
        later: dict[str, Any] = {}  # what may come with the tensors
        if any(loss.needs_reference for loss in known):
            later |= dict(ref_logps=_empty(0), ref_reduction="sum")
        if any("kl" in loss.options for loss in known):
            later["kl"] = 0.0
        # in PyTorch, on the CPU: where the tensors will be is not known yet
        self._of_no_pairs(later | self.options | dict(backend="torch"))

    def _of_no_pairs(self, inputs: dict[str, Any]) -> None:
        raise NotImplementedError


class DPOLoss(_PairLoss):
    """`dpo_triton.fused_dpo_loss` as a module.

    Args:
        options: the keyword arguments of `dpo_triton.fused_dpo_loss` that are no tensors, and the
            options of the losses; for each the default is the function's.

    Call:
        `module(policy_logits, labels, mask, ...)`, with the tensors of `fused_dpo_loss`: ref_logps
        or ref_logits, and cu_seqlens. An option that is given there too holds for that call, such
        as a kl or a beta that changes; under torch.compile a number that changes has to come there.

    Returns:
        `DPOLossOutput(loss, metrics)` of each call.

    Raises:
        TypeError, ValueError: an option that does not fit, already in the constructor; and, in a
            call, all that the function raises.
    """

    def __init__(self, **options: Unpack[DPOLossOptions]) -> None:
        super().__init__()
        self.options = dict(options)
        self._check_options()

    def forward(
        self,
        policy_logits: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        **inputs: Unpack[DPOLossInputs],
    ) -> DPOLossOutput:
        return fused_dpo_loss(policy_logits, labels, mask, **(self.options | dict(inputs)))

    def _of_no_pairs(self, inputs: dict[str, Any]) -> None:
        fused_dpo_loss(_empty(0, 1, 1), _empty(0, 1).long(), **inputs)


class LinearDPOLoss(_PairLoss):
    """`dpo_triton.fused_linear_dpo_loss` as a module.

    Args:
        options: the keyword arguments of `dpo_triton.fused_linear_dpo_loss` that are no tensors,
            and the options of the losses; for each the default is the function's.

    Call:
        `module(hidden, weight, labels, mask, ...)`, with the tensors of `fused_linear_dpo_loss`:
        bias, ref_logps, or ref_hidden, ref_weight and ref_bias, and cu_seqlens. The head is the
        caller's, and no parameter of this module. Options as in `DPOLoss`.

    Returns:
        `DPOLossOutput(loss, metrics)` of each call.

    Raises:
        TypeError, ValueError: as `DPOLoss`.
    """

    def __init__(self, **options: Unpack[LinearDPOLossOptions]) -> None:
        super().__init__()
        self.options = dict(options)
        self._check_options()

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        **inputs: Unpack[LinearDPOLossInputs],
    ) -> DPOLossOutput:
        return fused_linear_dpo_loss(hidden, weight, labels, mask, **(self.options | dict(inputs)))

    def _of_no_pairs(self, inputs: dict[str, Any]) -> None:
        fused_linear_dpo_loss(_empty(0, 1, 1), _empty(1, 1), _empty(0, 1).long(), **inputs)


def _empty(*shape: int) -> Tensor:
    """Of no surrounding default: a model may be built on the meta device or in 16 bits."""
    return torch.zeros(shape, dtype=torch.float32, device="cpu")
