"""The check that comes before any timing: small batches are compared with float64."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.common.batches import Batch, Shape, increasing
from benchmarks.common.cases import HEADS, Call
from benchmarks.common.peers import Peer, brief
from benchmarks.common.report import BOTH

CHECK_VOCAB_SIZES = (257, 5003)  # less than a tile, and more
CHECK_MASK = ((0, 0, 1, 0, 1, 1, 0), (1,) * 7)  # holes


def check_batches(
    dtypes: Iterable[torch.dtype],
    device: torch.device,
    hidden_size: int | None = None,
    upstream: Callable[[Tensor], Tensor] = increasing,
) -> Iterator[Batch]:
    """Small ones of both vocabulary sizes, with holes in the mask."""
    mask = torch.tensor(CHECK_MASK, device=device)
    for vocab_size, dtype in itertools.product(CHECK_VOCAB_SIZES, dtypes):
        generator = torch.Generator(device).manual_seed(vocab_size)
        shape = Shape(len(CHECK_MASK), len(CHECK_MASK[0]), vocab_size, hidden_size)
        batch = shape.draw(dtype, generator, upstream)
        yield dataclasses.replace(batch, mask=mask, share=float(mask.float().mean()))


def complaints(
    ours: Sequence[Peer], plain: Peer, batches: Iterable[Batch], device: torch.device
) -> list[str]:
    """Compare small batches with float64, their head trained and frozen; return what is off.

    Right is twice the error of the plain formula, or three roundings, and one of the result.
    """
    found = []
    for batch, trains_weight, peer in itertools.product(batches, (True, False), ours):
        if batch.weight is None and not trains_weight:
            continue
        where = f"{peer.name}, V = {batch.vocab_size}, {batch.dtype}"
        where += "" if batch.weight is None else f", {HEADS[trains_weight]} head"
        call, other = (Call.of(p, batch, BOTH, trains_weight) for p in (peer, plain))
        try:
            call.try_out(batch.truth, device)
        except Exception as error:
            found.append(f"{where}: {brief(error)}")
            continue
        other.try_out(batch.truth, device)
        stray = float(call.run()[1][0].detach()[batch.mask == 0].abs().max())
        errors = zip(
            ("values", "gradient of the rows", "gradient of the weight"),
            (call.value_error, *call.grad_errors),
            (other.value_error, *other.grad_errors),
            batch.roundings,
            strict=False,
        )
        right = [(what, error, max(2 * its, 6 * half) + half) for what, error, its, half in errors]
        found += [
            f"{where}: {what} off by {error:.1e}, at most {budget:.1e} is right"
            for what, error, budget in (*right, ("gradient of what is not scored", stray, 0.0))
            if not error <= budget  # NaN is off too
        ]
    return found
