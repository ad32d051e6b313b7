"""Third stage: the gradient of the logits; see `kernels/grad.py` for the mathematics."""

import numpy as np
import torch
from torch import Tensor

from ._rows import Workspace, exponent_scale, own_columns, row_grid


def grad(
    grad_logps: Tensor,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    complement: Tensor,
    reference: Tensor,
    share: Tensor,
    shift: bool,
    first_column: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    out: Tensor | None,
) -> Tensor:
    """Return the gradient of logits, (B, T, W), in `out` if given, which may be logits itself.

    They are the W columns from first_column on of the vocabulary.

    grad_logps is (B, T); it is not read where a token is not scored.
    """
    dtype = weights.dtype
    scored = weights.flatten().nonzero().squeeze(1)
    scale = exponent_scale(temperature, logit_scale, softcap, dtype)

    def of_rows(x: Tensor) -> Tensor:  # (B, T) or (B * T,) to (M, 1)
        return x.reshape(-1).index_select(0, scored)[:, None]

    slope = (1.0 if softcap is not None else logit_scale) / temperature
    coefficient = of_rows(grad_logps).to(dtype) * of_rows(weights) * slope
    target_grad = coefficient * of_rows(complement)
    scaled_share = -coefficient * of_rows(share)
    offsets = -of_rows(reference)
    workspace = Workspace(logits, scored - int(shift), dtype)
    y = own_columns(labels.flatten().index_select(0, scored), first_column, logits.shape[-1])
    if out is None:
        out = _zeros(logits)
    else:
        is_scored = torch.zeros(weights.numel(), dtype=torch.bool, device=weights.device)
        is_scored[scored - int(shift)] = True
        for group, theirs in zip(out, is_scored.view(weights.shape), strict=True):
            group.index_fill_(0, (~theirs).nonzero().squeeze(1), 0)
    out_grid = row_grid(out)
    for here, g, places in workspace.blocks():
        d = workspace.load(g, places, logit_scale, softcap)
        block = workspace.block(len(d))
        chain = None
        if softcap is not None:  # du / dx = logit_scale * (1 - tanh ** 2)
            chain = (d / softcap).square_().neg_().add_(1).mul_(logit_scale)
        torch.add(workspace.pad(offsets[here]), block, alpha=scale, out=block)  # rounded once
        block.exp2_()
        d.mul_(scaled_share[here])
        workspace.fill_target_(y[here], target_grad[here])
        if chain is not None:
            d.mul_(chain)
        # Contiguous rows are one group of out; else it has the strides of logits.
        to, where = (
            (out_grid[0], workspace.rows[here]) if len(out_grid) == 1 else (out_grid[g], places)
        )
        to.index_copy_(0, where, d.to(out.dtype))
    return out


def _zeros(logits: Tensor) -> Tensor:
    """Contiguous zeros like logits, on a CPU straight from the operating system by NumPy's calloc.

    Pages of rows that are not scored are then never touched, and large gradients ask for huge
    pages.
    """
    if logits.device.type != "cpu":
        return torch.zeros_like(logits, memory_format=torch.contiguous_format)
    words = {2: np.int16, 4: np.int32, 8: np.int64}[logits.element_size()]
    return torch.from_numpy(np.zeros(logits.shape, words)).view(logits.dtype)
