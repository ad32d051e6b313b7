"""Vocabularies in shards over real processes: the same bits on every rank, and those of float64."""

import importlib.util
import os
from typing import Any

import parallel_cases as cases
import pytest
import torch
import torch.nn.functional as F
from batches import assert_within_budget, max_error, rounding
from head_batches import TILE_V
from parallel_cases import Case, of_ranks
from processes import run_processes
from torch import Tensor

from dpo_triton import fused_linear_seq_logprob, reference
from dpo_triton._backends import resolve_backend
from dpo_triton._head._tiles import Plan

SIZE = 4
# On a CPU its interpreter runs the kernels.
HAS_TRITON = importlib.util.find_spec("triton") and os.environ.get("TRITON_INTERPRET") == "1"
BF16 = torch.bfloat16
# 8 tokens in 4 sequences keep it fast; 50257 is odd, and so are these shards.
WIDE = (4, 8, 50257)
UNEQUAL = [0, 20001, 20002, 45003, 50257]
STATS = ("lengths", "token_logps", "entropy", "mean_logit", "top1", "log_sum_sq_probs")
SMALL = (3, 5, 203)
SMALL_BOUNDS = [0, 90, 91, 150, 203]
# Of the head: tiles of 4096, the last shard narrower than one, and a second tile of one column.
WIDE_HEAD = (3, 6, 24, 50257)
SMALL_HEAD = (3, 6, 16, 203)

LOGITS = {
    "wide": dict(shape=WIDE, dtype=BF16, bounds=UNEQUAL, stats=STATS),
    "wide, sum, shift": dict(shape=WIDE, dtype=BF16, bounds=UNEQUAL, reduction="sum", shift=True),
    "float32": dict(shape=SMALL, dtype=torch.float32, bounds=SMALL_BOUNDS, stats=STATS),
    "float64": dict(
        shape=SMALL, dtype=torch.float64, bounds=SMALL_BOUNDS, stats=STATS, backend="torch"
    ),
    "tokens": dict(
        shape=SMALL, dtype=torch.float32, bounds=SMALL_BOUNDS, function="fused_token_logprob"
    ),
    "ties": dict(shape=SMALL, dtype=BF16, bounds=SMALL_BOUNDS, stats=("top1",), is_rounded=True),
    "ranks out of order": dict(
        shape=SMALL, dtype=torch.float32, bounds=SMALL_BOUNDS, order=[2, 0, 3, 1], stats=STATS
    ),
    "shards without targets": dict(
        shape=SMALL, dtype=torch.float32, bounds=SMALL_BOUNDS, targets_below=80
    ),
    "padded": dict(shape=SMALL, dtype=torch.float32, bounds=SMALL_BOUNDS, padding=13, stats=STATS),
    "padded, in place": dict(
        shape=SMALL, dtype=torch.float32, bounds=SMALL_BOUNDS, padding=13, inplace_backward=True
    ),
    "packed, shift": dict(
        shape=SMALL, dtype=torch.float32, bounds=SMALL_BOUNDS, is_packed=True, shift=True
    ),
    "softcap": dict(
        shape=SMALL,
        dtype=torch.float32,
        bounds=SMALL_BOUNDS,
        softcap=5.0,
        temperature=0.7,
        logit_scale=1.3,
        stats=STATS,
    ),
}
HEADS = {
    "wide": dict(shape=WIDE_HEAD, dtype=BF16, bounds=UNEQUAL),
    "small tiles": dict(
        shape=WIDE_HEAD, dtype=torch.float32, bounds=UNEQUAL, tile_bytes=2**15, stats=STATS
    ),
    "padded, shift": dict(
        shape=SMALL_HEAD, dtype=torch.float32, bounds=SMALL_BOUNDS, padding=7, shift=True
    ),
    "ranks out of order": dict(
        shape=SMALL_HEAD, dtype=torch.float32, bounds=SMALL_BOUNDS, order=[3, 2, 0, 1]
    ),
    "softcap": dict(
        shape=SMALL_HEAD,
        dtype=torch.float32,
        bounds=SMALL_BOUNDS,
        softcap=4.0,
        logit_scale=1.5,
        temperature=0.8,
    ),
    "float64": dict(shape=SMALL_HEAD, dtype=torch.float64, bounds=SMALL_BOUNDS, backend="torch"),
    "autocast": dict(
        shape=SMALL_HEAD, dtype=torch.float32, bounds=SMALL_BOUNDS, under_autocast=True
    ),
}
# Shards that end where tiles do.
ALIGNED_BOUNDS = [0, TILE_V, 2 * TILE_V, 3 * TILE_V, 3 * TILE_V + 77]
ALIGNED = dict(shape=(3, 6, 24, ALIGNED_BOUNDS[-1]), bounds=ALIGNED_BOUNDS)


@pytest.fixture(scope="module")
def device() -> torch.device:
    """Where there is a GPU too: gloo exchanges no CUDA tensors as shards do, and NCCL takes a GPU
    for each rank."""
    return torch.device("cpu")


@pytest.fixture(scope="module")
def results(seed: int, device: torch.device) -> list[dict[str, Any]]:
    """By rank, what each case returned there. Processes are started once."""
    every = {
        f"logits, {name}": Case(cases.logits_case, dict(case)) for name, case in LOGITS.items()
    }
    for name, case in HEADS.items():
        for is_trained in (True, False):
            options = {**case, "is_trained": is_trained}
            every[f"head, {name}, {is_trained}"] = Case(cases.head_case, options)
    for dtype in (BF16, torch.float32):
        for is_trained in (True, False):
            options = {**ALIGNED, "dtype": dtype, "is_trained": is_trained}
            every[f"aligned, {dtype}, {is_trained}"] = Case(cases.head_case, options)
    if HAS_TRITON:
        every["splits"] = Case(cases.splits_case, dict(stats=STATS))
    for case in every.values():
        case.options["device"] = device
    return run_processes(cases.run, SIZE, every, seed)


def assert_same_everywhere(ranks: list[dict[str, Any]]) -> None:
    for other in ranks[1:]:
        assert torch.equal(other["value"], ranks[0]["value"])
        assert other["stats"].keys() == ranks[0]["stats"].keys()
        for name, stat in other["stats"].items():
            assert torch.equal(stat, ranks[0]["stats"][name]), name


def drop_padding(grads: list[Tensor], bounds: list[int], order: Any, dim: int) -> Tensor:
    """The whole vocabulary's gradient, from those of the ranks; that of padding is 0."""
    parts: list[Tensor] = [torch.empty(0)] * len(grads)
    for rank, grad in enumerate(grads):
        number = rank if order is None else order[rank]
        width = bounds[number + 1] - bounds[number]
        parts[number] = grad.narrow(dim, 0, width)
        assert (grad.narrow(dim, width, grad.shape[dim] - width) == 0).all()
    return torch.cat(parts, dim)


def compare(case: dict[str, Any], value: Tensor, stats: Any, run: Any, what: str) -> None:
    """value and stats with those of `run` in float64, by the error of `run` in float32."""
    exact, exact_stats = run(torch.float64)
    rough, rough_stats = run(torch.float32)
    assert_within_budget(value, rough, exact, what)
    for name, stat in stats.items():
        assert_within_budget(stat, rough_stats[name], exact_stats[name], f"{what}, {name}")


@pytest.mark.parametrize("name", LOGITS)
def test_logits_in_shards(results, seed, name, device):
    case = dict(LOGITS[name])
    ranks = of_ranks(results, f"logits, {name}")
    assert_same_everywhere(ranks)

    torch.manual_seed(seed)
    shape, dtype, bounds = case.pop("shape"), case.pop("dtype"), case.pop("bounds")
    order, is_packed = case.pop("order", None), case.pop("is_packed", False)
    logits, labels, mask = cases.inputs(*shape, dtype)
    if "targets_below" in case:
        labels %= case.pop("targets_below")
        assert labels.max() < bounds[1]
    if case.pop("is_rounded", False):
        logits = logits.round()
    if is_packed:
        case["cu_seqlens"] = torch.arange(shape[0] + 1) * shape[1]
        logits, labels, mask = logits.flatten(0, 1), labels.flatten(), mask.flatten()
    for option in ("padding", "inplace_backward", "backend"):
        case.pop(option, None)
    function = getattr(reference, case.pop("function", "fused_seq_logprob").removeprefix("fused_"))
    grads = {}

    def run(of_dtype: torch.dtype) -> tuple[Tensor, Any]:
        where = "cpu" if of_dtype == torch.float64 else device
        leaf = logits.to(where, of_dtype).requires_grad_()
        options = {k: v.to(where) if isinstance(v, Tensor) else v for k, v in case.items()}
        value = function(leaf, labels.to(where), mask.to(where), **options)
        value, stats = value if "stats" in case else (value, {})
        grads[of_dtype] = torch.autograd.grad(value, leaf, cases.upstream_of(value))[0].cpu()
        return value.detach().cpu(), {name: stat.cpu() for name, stat in stats.items()}

    compare(case, ranks[0]["value"], ranks[0]["stats"], run, name)
    grad = drop_padding([rank["grad"] for rank in ranks], bounds, order, -1)
    assert grad.dtype == dtype
    assert_within_budget(grad, grads[torch.float32], grads[torch.float64], name)


@pytest.mark.parametrize("is_trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", HEADS)
def test_head_in_shards(results, seed, name, is_trained, device):
    """Beside the whole head without a group, whose own error is the allowance for products."""
    case = dict(HEADS[name])
    ranks = of_ranks(results, f"head, {name}, {is_trained}")
    assert_same_everywhere(ranks)

    torch.manual_seed(seed)
    shape, dtype, bounds = case.pop("shape"), case.pop("dtype"), case.pop("bounds")
    order = case.pop("order", None)
    case.pop("padding", 0)
    tensors = cases.head(*shape, dtype)
    under_autocast = case.pop("under_autocast", False)
    product_dtype = BF16 if under_autocast else dtype
    exact = differentiate(_double(tensors, product_dtype), case, is_trained, whole=False)
    with torch.autocast(device.type, BF16, enabled=under_autocast):
        whole = differentiate(
            cases.Head(*(x.to(device) for x in tensors)), case, is_trained, whole=True
        )

    # The wider of twice our own error on one rank, and of roundings of float32. On a CPU each
    # rank's product for hidden is rounded to the products' dtype before they are added.
    def check(result: Tensor, one_rank: Tensor, truth: Tensor, what: str) -> None:
        error = max(max_error(one_rank, truth), 3 * rounding(truth, torch.float32))
        allowed = 2 * error + rounding(truth, result.dtype)
        if what == "hidden":
            allowed += (SIZE - 1) * rounding(truth, product_dtype)
        assert max_error(result, truth) <= allowed, f"{name}, {what}"

    check(ranks[0]["value"], whole["value"], exact["value"], "value")
    for stat, result in ranks[0]["stats"].items():
        check(result, whole["stats"][stat], exact["stats"][stat], stat)
    hidden_grads = [rank["grads"][0] for rank in ranks]
    for other in hidden_grads[1:]:
        assert torch.equal(other, hidden_grads[0])
    found = [hidden_grads[0]]
    if is_trained:
        found += [
            drop_padding([rank["grads"][i] for rank in ranks], bounds, order, 0) for i in (1, 2)
        ]
    for what, ours, one_rank, truth in zip(
        ("hidden", "weight", "bias"), found, whole["grads"], exact["grads"], strict=False
    ):
        assert ours.dtype == one_rank.dtype
        check(ours, one_rank, truth, what)


def _double(tensors: cases.Head, dtype: torch.dtype) -> cases.Head:
    """float64 of what the products see."""
    return cases.Head(*(x.to(dtype).double() for x in tensors[:3]), *tensors[3:])


def differentiate(
    tensors: cases.Head, options: dict[str, Any], is_trained: bool, whole: bool
) -> dict[str, Any]:
    """Value, stats and gradients of the whole head, on the CPU: by our own path, or by the
    reference."""
    hidden, weight, bias = (x.clone() for x in tensors[:3])
    asked = [hidden, weight, bias] if is_trained else [hidden]
    for x in asked:
        x.requires_grad_()
    options = {k: v for k, v in options.items() if whole or k not in ("tile_bytes", "backend")}
    if whole:
        value = fused_linear_seq_logprob(hidden, weight, *tensors[3:], bias=bias, **options)
    else:
        value = reference.seq_logprob(F.linear(hidden, weight, bias), *tensors[3:], **options)
    value, stats = value if "stats" in options else (value, {})
    grads = torch.autograd.grad(value, asked, cases.upstream_of(value))
    return dict(
        value=value.detach().cpu(),
        stats={name: stat.cpu() for name, stat in stats.items()},
        grads=[grad.cpu() for grad in grads],
    )


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("is_trained", [True, False], ids=["trained", "frozen"])
def test_shards_that_end_where_tiles_do_have_the_bits_of_the_whole(
    results, seed, dtype, is_trained, device
):
    ranks = of_ranks(results, f"aligned, {dtype}, {is_trained}")
    torch.manual_seed(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as there: a product's order of sums may depend on it
    try:
        tensors = cases.head(*ALIGNED["shape"], dtype, device)
        whole = differentiate(tensors, {}, is_trained, whole=True)
    finally:
        torch.set_num_threads(threads)
    for rank in ranks:
        assert torch.equal(rank["value"], whole["value"])
    if is_trained:
        for i in (1, 2):
            of_ranks_ = torch.cat([rank["grads"][i] for rank in ranks])
            assert torch.equal(of_ranks_, whole["grads"][i])


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_shards_that_end_where_splits_do_have_the_bits_of_the_whole(results):
    ranks = of_ranks(results, "splits")
    assert_same_everywhere(ranks)
    assert torch.equal(ranks[0]["value"], ranks[0]["whole_value"])
    for name, stat in ranks[0]["whole_stats"].items():
        assert torch.equal(stat, ranks[0]["stats"][name]), name
    assert torch.equal(torch.cat([rank["grad"] for rank in ranks], -1), ranks[0]["whole_grad"])


@pytest.mark.parametrize("name", LOGITS)
def test_bytes_for_logits(results, seed, name, device):
    """8 bytes per scored token and split for the partials, 4 for the target, 4 per split for each
    stat; nothing in the backward pass."""
    case = LOGITS[name]
    torch.manual_seed(seed)
    mask = cases.inputs(*case["shape"], torch.float32).mask
    if case.get("shift"):
        mask = mask[:, 1:]
    num_scored, stats = int(mask.count_nonzero()), len(set(case.get("stats", ())) & set(STATS[2:]))
    word = 8 if case["dtype"] == torch.float64 else 4
    stages = resolve_backend(case.get("backend", "auto"), device, case["dtype"])
    for rank, result in enumerate(of_ranks(results, f"logits, {name}")):
        splits = stages.num_splits(width_of(case, rank))
        numbers = num_scored * ((2 + stats) * splits + 1) + 1
        assert result["sent"] == (1024, word * numbers, 0)
        assert result["sent_back"] == (0, 0, 0)


def width_of(case: dict[str, Any], rank: int) -> int:
    """Columns of a rank's shard."""
    number = case.get("order", range(SIZE))[rank]
    return int(case["bounds"][number + 1] - case["bounds"][number])


@pytest.mark.parametrize("is_trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", HEADS)
def test_bytes_for_hidden_states(results, seed, name, is_trained, device):
    """Of K splits 8 K + 4 bytes a scored token, which is at most 12 a split; once back, H numbers
    a scored token."""
    case = HEADS[name]
    torch.manual_seed(seed)
    mask = cases.head(*case["shape"], torch.float32).mask
    if case.get("shift"):
        mask = mask[:, 1:]
    num_scored, stats = int(mask.count_nonzero()), len(set(case.get("stats", ())) & set(STATS[2:]))
    word = 8 if case["dtype"] == torch.float64 else 4
    stages = resolve_backend(case.get("backend", "auto"), device, case["dtype"])
    plan = Plan(case["dtype"], 1, (True, is_trained, False), stages.name)
    for rank, result in enumerate(of_ranks(results, f"head, {name}, {is_trained}")):
        splits = plan.num_splits(width_of(case, rank))
        numbers = num_scored * ((2 + stats) * splits + 1) + 1
        assert result["sent"] == (1024, word * numbers, 0)
        assert result["sent_back"] == (1024, 0, word * num_scored * case["shape"][2])
        if stats == 0 and word == 4:
            assert result["sent"][1] - 4 <= 12 * splits * num_scored
