"""Third stage: the gradient of the logits; see `kernels/grad.py` for the mathematics."""

import numpy as np
import torch
from torch import Tensor

from .._records import Columns, Scaling, Scored
from ._rows import (
    Workspace,
    blocks,
    exponent_scale,
    own_columns,
    row_grid,
    row_numbers,
    split_like,
    views,
)


def grad(
    grad_logps: Tensor,
    logits: Tensor,
    scored: Scored,
    softmax: Tensor,
    columns: Columns,
    scaling: Scaling,
    out: Tensor | None,
) -> Tensor:
    """Return the gradient of logits, (B, T, W), in `out` if given, which may be logits itself.

    They are the W columns from `columns.first` on of the vocabulary. grad_logps is (B, T); it is
    not read where a token is not scored.
    """
    labels, weights, shift = scored
    complement, reference, share, _ = softmax
    softcap = scaling.softcap
    dtype = weights.dtype
    tokens = weights.flatten().nonzero().squeeze(1)
    rows = row_numbers(tokens, shift)
    scale = exponent_scale(scaling, dtype)

    def of_rows(x: Tensor) -> Tensor:  # (B, T) or (B * T,) to (M, 1)
        return x.reshape(-1).index_select(0, tokens)[:, None]

    coefficient = of_rows(grad_logps).to(dtype) * of_rows(weights) * scaling.slope
    target_grad = coefficient * of_rows(complement)
    scaled_share = -coefficient * of_rows(share)

    grid = row_grid(logits)
    if out is None:
        out = _zeros(logits)
        out_grid = out.view(grid.shape)
    else:
        out_grid = row_grid(out)
        others = np.setdiff1d(np.arange(weights.numel()), rows)
        for runs in blocks(others, grid.shape[1], len(others)):
            for view in views(out_grid, runs):
                view.zero_()

    workspace = Workspace(logits, len(rows), dtype)
    chain = torch.empty_like(workspace.rows(workspace.max_rows if softcap is not None else 0))
    offsets = workspace.pad(-of_rows(reference))
    y = own_columns(labels.flatten().index_select(0, tokens), columns.first, logits.shape[-1])
    per_row = (y, target_grad, scaled_share)
    per_block = zip(*(torch.split(x, workspace.max_rows) for x in per_row), strict=True)
    lo = 0
    for runs, (y_here, target_here, scale_here) in zip(
        blocks(rows, grid.shape[1], workspace.max_rows), per_block, strict=False
    ):
        num_rows = len(y_here)
        d = workspace.load(grid, runs, scaling)
        if softcap is not None:  # du / dx = logit_scale * (1 - tanh ** 2)
            torch.div(d, softcap, out=chain[:num_rows])
            chain[:num_rows].square_().neg_().add_(1).mul_(scaling.logit_scale)
        workspace.to_exponents(num_rows, offsets[lo:], scale)
        workspace.exp2_(num_rows)
        d.mul_(scale_here)
        workspace.fill_target_(y_here, target_here)
        if softcap is not None:
            d.mul_(chain[:num_rows])
        places = views(out_grid, runs)
        for place, computed in zip(places, split_like(d, places), strict=True):
            place.copy_(computed)
        lo += num_rows
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
