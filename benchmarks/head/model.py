"""Bytes, products and launches per token of a head on a GPU, modelled: nothing here is measured.

Assumed: bfloat16, one call on TOKENS tokens of which a share is scored; both schemes drop the rest.
Every operand of every launch crosses the memory once: nothing stays in a cache between launches. A
product that adds to its result reads and writes it. A product is scored tokens x H x V
multiply-adds. Only launches per tile count, not the few dozen of a call. From the sources of trl
1.16 and of dpo_triton/_head/, torch >= 2.8.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from benchmarks.common.peers import OURS
from benchmarks.common.report import shown
from benchmarks.head.peers import TRL
from benchmarks.head.rows import FROZEN, TRAINED
from dpo_triton._backends import backend_named
from dpo_triton._head._autograd import TILE_BYTES_ELSEWHERE
from dpo_triton._head._tiles import Plan, Tiles

TOKENS = 8192
BF16, FLOAT32 = 2, 4
TRL_TILE = (4096, 32768)  # tokens, columns
NOTES = f"""\
products: each scored tokens x H x V multiply-adds, per scored token. launches, bytes: per token.
of the tiles: bytes that are logits or their gradient. largest tile: MiB.
One call of {TOKENS} tokens, bfloat16; every operand of a launch crosses the memory once, and
nothing stays in a cache. Launches per tile alone."""


@dataclass(frozen=True, kw_only=True)
class ModelledRow:
    """Forward + backward of one scheme, modelled."""

    scheme: str = shown("scheme")
    head: str = shown("head")
    model: str
    hidden_size: int
    vocab_size: int
    scored_share: float = shown("scored", "{:.0%}")
    tiles: int = shown("tiles")
    products: float = shown("products", "{:.2f}")  # per scored token
    launches_per_token: float = shown("launches", "{:.4f}")
    bytes_per_token: float = shown("bytes", "{:.0f}")
    tile_bytes_per_token: float = shown("of the tiles", "{:.0f}")  # logits and their gradient
    tile_mib: float = shown("largest tile", "{:.0f}")
    source: str = "modelled"


class Scheme(NamedTuple):
    """What a tile costs in launches, and in crossings of the memory."""

    products: int
    launches: int  # a tile
    logits: int  # crossings of a tile by logits or their gradient, each of bfloat16
    weight_reads: int  # of the tile's columns, bfloat16
    hidden_reads: int  # of the tile's rows, bfloat16
    hidden_sum_bytes: int  # a tile, for an element of the float32 sum of hidden's gradient
    weight_sum_bytes: int = 0  # the same of weight's; and
    weight_bytes: int = 0  # once, for an element of weight: zeros, and the result


# TRL: forward a product and a kernel; backward a product, a kernel in place, and a product for each
# gradient that adds to a float32 sum; zeros before and a conversion after.
# This package: forward a product and a kernel; backward the same product, a kernel, a product that
# adds to hidden's gradient, and one that writes weight's (a block of rows: where there are several
# it adds). With a frozen head the gradient is made in the forward pass: combine of the columns so
# far, fourteen small operations for the rescaling, a kernel, a product that adds; the sum is read
# and written, and rescaled too.
SCHEMES = {
    (TRAINED, TRL): Scheme(4, 6, 7, 3, 3, 2 * FLOAT32, 2 * FLOAT32, 2 * FLOAT32 + BF16),
    (TRAINED, OURS): Scheme(4, 6, 7, 3, 3, 2 * FLOAT32, 0, BF16),
    (FROZEN, TRL): Scheme(3, 5, 6, 3, 2, 2 * FLOAT32),
    (FROZEN, OURS): Scheme(2, 19, 5, 2, 1, 4 * FLOAT32),
}


def modelled(
    model: str, hidden_size: int, vocab_size: int, shares: Iterable[float]
) -> list[ModelledRow]:
    """Return a row for each share, head and scheme."""
    width = backend_named("triton").tile_width
    largest = {TRL: TRL_TILE, OURS: (TILE_BYTES_ELSEWHERE // (width * BF16), width)}
    rows = []
    for share, ((head, name), scheme) in itertools.product(shares, SCHEMES.items()):
        scored = round(share * TOKENS)
        height, width = map(min, (scored, vocab_size), largest[name])
        row_tiles, column_tiles = -(-scored // height), -(-vocab_size // width)
        tiles = row_tiles * column_tiles
        # Tiles that are kept for the backward pass save a product each.
        keeps = (head, name) == (TRAINED, OURS)
        kept = _kept_tiles(scored, vocab_size) / tiles if keeps else 0.0
        of_logits = (scheme.logits - kept) * BF16 * scored * vocab_size
        of_weight = vocab_size * hidden_size * (
            row_tiles * ((scheme.weight_reads - kept) * BF16 + scheme.weight_sum_bytes)
            + scheme.weight_bytes
        )  # fmt: skip
        of_hidden = scored * hidden_size * column_tiles * (
            (scheme.hidden_reads - kept) * BF16 + scheme.hidden_sum_bytes
        )  # fmt: skip
        rows.append(
            ModelledRow(
                scheme=name,
                model=model,
                hidden_size=hidden_size,
                vocab_size=vocab_size,
                head=head,
                scored_share=share,
                tiles=tiles,
                products=scheme.products - kept,
                launches_per_token=(scheme.launches - kept) * tiles / TOKENS,
                bytes_per_token=(of_logits + of_weight + of_hidden) / TOKENS,
                tile_bytes_per_token=of_logits / TOKENS,
                tile_mib=BF16 * height * width / 2**20,
            )
        )
    return rows


def _kept_tiles(scored: int, vocab_size: int) -> int:
    """How many tiles of this package the backward pass has no need to make again."""
    plan = Plan(torch.bfloat16, TILE_BYTES_ELSEWHERE, (True, True, False), "triton")
    numel = plan.kept_numel(scored, vocab_size)
    kept = torch.empty(numel, dtype=torch.bfloat16, device="meta")
    walk = Tiles(scored, vocab_size, plan, kept)
    return sum(tile.is_kept for tile in walk)
