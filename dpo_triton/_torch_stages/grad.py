"""Third stage: the gradient of the logits; see `kernels/grad.py` for the mathematics."""

import numpy as np
import torch
from torch import Tensor

from .._records import Columns, Scaling, Scored
from ._rows import Workspace, exponent_scale, own_columns, row_grid


def grad(
    grad_logps: Tensor,
    logits: Tensor,
    scored: Scored,
    softmax: Tensor,
    columns: Columns,
    scaling: Scaling,
    out: Tensor | None,
) -> Tensor:
    """Return the gradient of logits, (B, T, W), in `out` if given, which may be logits itself;
    grad_logps is not read where a token is not scored."""
    labels, weights, shift = scored
    softcap, dtype = scaling.softcap, weights.dtype
    scale = exponent_scale(scaling, dtype)
    tokens = weights.flatten().nonzero().squeeze(1)
    rows = tokens - int(shift)
    complement, reference, share, own_scale = softmax.index_select(1, tokens)[:, :, None]
    upstream = grad_logps.reshape(-1).index_select(0, tokens)[:, None].to(dtype)
    coefficient = upstream * weights.view(-1).index_select(0, tokens)[:, None] * scaling.slope
    is_large = (own_scale != scale)[:, 0]
    y = own_columns(labels.flatten().index_select(0, tokens), columns.first, logits.shape[-1])
    if out is None:
        out = zeros_like(logits)
    else:
        is_scored = torch.zeros(weights.numel(), dtype=torch.bool, device=weights.device)
        is_scored[rows] = True
        for sequence, theirs in zip(out, is_scored.view(weights.shape), strict=True):
            sequence.index_fill_(0, (~theirs).nonzero().squeeze(1), 0)
    workspace = Workspace(logits, rows, dtype)
    # Contiguous, out has the groups of any grid; else it is logits, or has their strides.
    out_grid = out.view(workspace.grid.shape) if out.is_contiguous() else row_grid(out)
    for here, g, places in workspace.blocks():
        d = workspace.load(g, places, scaling)
        chain = None if softcap is None else scaling.chain(d)
        large = is_large[here].nonzero().squeeze(1)
        exponents = d[large] * own_scale[here][large] - reference[here][large]
        workspace.to_exponents_(-reference[here], scale)
        d[large] = exponents
        workspace.block(len(d)).exp2_()
        d.mul_(-(coefficient * share)[here])
        workspace.fill_target_(y[here], (coefficient * complement)[here])
        if chain is not None:
            d.mul_(chain)
        if isinstance(places, slice):
            out_grid[g, places] = d
        else:
            out_grid[g].index_copy_(0, places, d.to(out.dtype))
    return out


def zeros_like(logits: Tensor) -> Tensor:
    """Contiguous zeros like logits, on a CPU straight from the operating system by NumPy's calloc.

    Pages of rows that are not scored are then never touched, and large gradients ask for huge
    pages.
    """
    if logits.device.type != "cpu":
        return torch.zeros_like(logits, memory_format=torch.contiguous_format)
    words = {2: np.int16, 4: np.int32, 8: np.int64}[logits.element_size()]
    return torch.from_numpy(np.zeros(logits.shape, words)).view(logits.dtype)
