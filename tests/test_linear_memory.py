"""What the head costs: only scored rows are multiplied, no logits beyond the tiles, nothing kept
that the backward pass does not need."""

import gc
import weakref

import pytest
import torch
from batches import fused
from head_batches import ALL, FROZEN, TILE_V, make_head_batch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo_triton import fused_linear_seq_logprob
from dpo_triton._head import _autograd, _operators
from dpo_triton._head._tiles import Plan


class Costs(TorchDispatchMode):
    """Multiplications of the products, and the largest storage that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[int, int, int]] = []
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = tree_leaves((args, kwargs or {}))
        before = {x.untyped_storage().data_ptr() for x in inputs if isinstance(x, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        if name in ("mm", "addmm", "bmm", "baddbmm", "matmul"):
            a, b = args[-2:]
            self.products.append((*a.shape, b.shape[1]))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in before:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return result

    @property
    def multiplications(self) -> int:
        return sum(m * k * n for m, k, n in self.products)


@pytest.fixture(autouse=True)
def opened(monkeypatch):
    """An operator of torch.library is one call to a mode: here its body is called."""
    for name in ("linear_logprob", "linear_logprob_grad"):
        monkeypatch.setattr(_autograd, name, getattr(_operators, f"_{name}"))


def leaves_of(batch, trains):
    return [x.clone().requires_grad_(train) for x, train in zip(batch[:3], trains, strict=True)]


def costs_of(batch, trains, **options):
    """Of the forward and of the backward pass, on PyTorch's stages."""
    hidden, weight, bias = leaves_of(batch, trains)
    with Costs() as forward:
        value = fused_linear_seq_logprob(
            hidden, weight, *batch[3:], bias=bias, backend="torch", **options
        )
    with Costs() as backward:
        value.sum().backward()
    return forward, backward


# 3 tiles of columns; H is not a size of anything else.
SHAPE, WIDTH, VOCAB_SIZE = (2, 32, 24), 24, 2 * TILE_V + 100


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("trains", [ALL, FROZEN, (False, True, False)])
def test_only_scored_rows_are_multiplied(trains, shift):
    batch = make_head_batch(SHAPE, VOCAB_SIZE)
    scored = batch.mask != 0
    batch.labels[0, 5] = -100
    scored[0, 5] = False
    if shift:
        scored[:, 0] = False
    product = int(scored.sum()) * WIDTH * VOCAB_SIZE
    forward, backward = costs_of(batch, trains, shift=shift, tile_bytes=7 * TILE_V * 4)
    in_hidden = 1 + (trains == FROZEN)
    assert forward.multiplications == in_hidden * product
    # The tile again, then a product for each gradient.
    expected = 0 if trains == FROZEN else (1 + trains[0] + trains[1]) * product
    assert backward.multiplications == expected


def test_kept_tiles_are_not_multiplied_again():
    batch = make_head_batch(SHAPE, VOCAB_SIZE)._replace(mask=None)
    product = 64 * WIDTH * VOCAB_SIZE
    _, backward = costs_of(batch, ALL, tile_bytes=4 * 64 * TILE_V * 4)
    assert backward.multiplications == 2 * product
    _, backward = costs_of(batch, ALL, tile_bytes=2 * 64 * TILE_V * 4)  # one of three
    assert backward.multiplications == 3 * product - 64 * WIDTH * 100


@pytest.mark.parametrize("trains", [ALL, FROZEN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_logits_beyond_the_tiles(dtype, trains):
    """512 rows: 17 MB of float32 logits, of which a tile of 2^18 bytes is there at a time."""
    batch = make_head_batch((2, 256, 24), VOCAB_SIZE, dtype)
    tile_bytes = 2**18
    stage_buffer = 7 << 20  # of dpo_triton._torch_stages, one for all calls
    # PyTorch's stages have a 16-bit tile in float32 too, each row a little longer.
    tile = tile_bytes * (4 / dtype.itemsize if dtype.itemsize < 4 else 1) * 1.02
    largest = max(tile, batch.weight.nbytes, 4 * batch.hidden.numel())
    fused_linear_seq_logprob(*batch[:2], *batch[3:], backend="torch")  # makes the buffer
    for costs in costs_of(batch, trains, tile_bytes=tile_bytes):
        assert costs.largest <= largest
    assert 512 * VOCAB_SIZE * dtype.itemsize > stage_buffer > largest


@pytest.mark.parametrize("tile_bytes", [1, 10**5, 10**6, 10**8])
@pytest.mark.parametrize("num_tokens", [0, 1, 100, 10**5])
def test_tiles_fit_in_tile_bytes(num_tokens, tile_bytes):
    """Those that are kept and the one that is worked on, together; but for a tile of one row."""
    for vocab_size in (1, 37, TILE_V, 151936):
        for dtype in (torch.float32, torch.bfloat16):
            width = min(TILE_V, vocab_size)
            plan = Plan(dtype, tile_bytes, ALL, "torch")
            height = min(num_tokens, plan.rows_in(vocab_size))
            kept = plan.kept_numel(num_tokens, vocab_size)
            total = (kept + height * width) * dtype.itemsize
            assert total <= max(tile_bytes, width * dtype.itemsize)
            assert kept <= num_tokens * vocab_size


def saved_by(batch, trains, **options):
    """Bytes that the graph keeps, without the inputs."""
    hidden, weight, bias = leaves_of(batch, trains)
    inputs = {x.data_ptr() for x in (hidden, weight, bias, batch.labels)}
    seen = {}

    def pack(x):
        if x.data_ptr() not in inputs:
            seen[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        fused_linear_seq_logprob(hidden, weight, *batch[3:], bias=bias, **options)
    return sum(seen.values())


def test_what_the_graph_keeps():
    """A few numbers a token; of a frozen head the gradient of hidden, else the kept tiles."""
    batch = make_head_batch(SHAPE, VOCAB_SIZE)
    numbers = 64 * 4 * 6
    assert saved_by(batch, FROZEN) <= 4 * batch.hidden.numel() + numbers
    assert saved_by(batch, ALL, tile_bytes=1) <= numbers
    assert saved_by(batch, ALL, tile_bytes=10**6) <= 10**6 + numbers


def test_no_grad_keeps_nothing(backend, device):
    hidden, weight, bias, labels, mask = make_head_batch((2, 3, 16), 400, device=device)
    alive = weakref.ref(hidden)
    for x in (hidden, weight, bias):
        x.requires_grad_()
    with torch.no_grad():
        value = fused(backend, "fused_linear_seq_logprob")(hidden, weight, labels, mask, bias=bias)
    assert value.grad_fn is None
    del hidden, x
    gc.collect()
    assert alive() is None


def test_no_grad_multiplies_once_and_keeps_no_tile(monkeypatch):
    batch = make_head_batch(SHAPE, VOCAB_SIZE)._replace(mask=None)
    hidden, weight, bias = leaves_of(batch, ALL)
    made = []
    body = _autograd.linear_logprob
    monkeypatch.setattr(
        _autograd, "linear_logprob", lambda *inputs: made.append(body(*inputs)) or made[-1]
    )
    with torch.no_grad(), Costs() as costs:
        fused_linear_seq_logprob(hidden, weight, batch.labels, bias=bias, backend="torch")
    assert costs.multiplications == 64 * WIDTH * VOCAB_SIZE
    *_, kept, unit_grad = made[0]
    assert kept.numel() == unit_grad.numel() == 0
