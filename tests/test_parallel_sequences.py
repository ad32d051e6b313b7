"""Sequences in shards, and DTensors, over real processes."""

from typing import Any

import parallel_cases
import pytest
import sequence_cases as cases
import torch
import torch.nn.functional as F
from batches import assert_within_budget
from parallel_cases import Case, of_ranks
from processes import run_processes
from torch import Tensor

from dpo_triton import fused_linear_seq_logprob, fused_seq_logprob, reference

SIZE = 4
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
# Ranks with 5, 1, no and 3 tokens of each sequence.
SHAPE, BOUNDS = (3, 9, 203), [0, 5, 6, 6, 9]
HEAD = (3, 9, 16, 203)
SEQUENCES = {
    "mean": dict(dtype=F32),
    "sum": dict(dtype=F32, reduction="sum"),
    "packed": dict(dtype=F32, is_packed=True),
    "bfloat16": dict(dtype=BF16, temperature=0.7),
    "float64": dict(dtype=F64, backend="torch"),
}
# 203 = 3 * 51 + 50: torch.chunk's last shard is narrower.
DTENSORS = (3, 5, 203)
ERRORS = ["batch", "reduction", "labels' dtype", "shift"]
MESHES = {"FSDP2": (4,), "HSDP": (2, 2)}


@pytest.fixture(scope="module")
def device() -> torch.device:
    """Where there is a GPU too: gloo exchanges no CUDA tensors as shards do, and NCCL takes a GPU
    for each rank."""
    return torch.device("cpu")


@pytest.fixture(scope="module")
def results(seed: int, device: torch.device) -> list[dict[str, Any]]:
    every = {}
    for name, case in SEQUENCES.items():
        options = {**case, "shape": SHAPE, "bounds": BOUNDS}
        every[f"sequences, {name}"] = Case(cases.sequence_case, options)
    for kind in ERRORS:
        options = dict(kind=kind, wrong_rank=1)
        every[f"error, {kind}"] = Case(cases.sequence_error_case, options)
    for is_trained in (True, False):
        options = dict(shape=HEAD, dtype=F32, bounds=BOUNDS, is_trained=is_trained)
        every[f"head, {is_trained}"] = Case(cases.sequence_head_case, options)
        options = dict(shape=HEAD, dtype=F32, is_trained=is_trained)
        every[f"tensor parallel, {is_trained}"] = Case(cases.tensor_parallel_case, options)
    every["both"] = Case(cases.both_case, dict(shape=HEAD, dtype=F32))
    every["both, failing"] = Case(cases.both_case, dict(shape=HEAD, dtype=F32, failing_rank=2))
    for are_dtensors in (True, False):
        options = dict(shape=DTENSORS, dtype=BF16, are_labels_dtensors=are_dtensors)
        every[f"logits, {are_dtensors}"] = Case(cases.dtensor_logits_case, options)
    for name, mesh_shape in MESHES.items():
        options = dict(shape=HEAD, dtype=F32, mesh_shape=mesh_shape)
        every[name] = Case(cases.data_parallel_case, options)
    every["frees"] = Case(cases.frees_the_whole_head_case, {})
    every["placements"] = Case(cases.placement_errors_case, {})
    for case in every.values():
        case.options["device"] = device
    return run_processes(parallel_cases.run, SIZE, every, seed)


def of_whole(
    leaves: list[Tensor], function: Any, dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Value and gradients of the whole in another dtype."""
    leaves = [x.to(dtype).requires_grad_() for x in leaves]
    value = function(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves, parallel_cases.upstream_of(value))


def assert_near(found: list[Tensor], leaves: list[Tensor], function: Any) -> None:
    """A value and the gradients of the leaves, within the budget."""
    exact_value, exact = of_whole(leaves, function, F64)
    rough_value, rough = of_whole(leaves, function, F32)
    pairs = zip(found, (rough_value, *rough), (exact_value, *exact), strict=False)
    for i, (ours, theirs, truth) in enumerate(pairs):
        assert_within_budget(ours, theirs, truth, f"result {i}")


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences_in_shards(results, seed, name, device):
    case = dict(SEQUENCES[name])
    ranks = of_ranks(results, f"sequences, {name}")
    torch.manual_seed(seed)
    logits, labels, mask = parallel_cases.inputs(*SHAPE, case.pop("dtype"))
    is_packed, backend = case.pop("is_packed", False), case.pop("backend", "auto")
    for rank in ranks:
        assert torch.equal(rank["value"], ranks[0]["value"])
        assert torch.equal(rank["stats"]["lengths"], ranks[0]["stats"]["lengths"])
    assert torch.allclose(ranks[0]["stats"]["lengths"].double(), mask.double().sum(1))
    assert ranks[0]["value"][1] == 0  # nothing is scored there

    def whole(parts: list[Tensor]) -> Tensor:
        return torch.cat([x.unflatten(0, (SHAPE[0], -1)) if is_packed else x for x in parts], 1)

    if is_packed:  # a rank without tokens has none to unflatten
        ranks = [rank for rank in ranks if rank["grad"].numel()]
    grad = whole([rank["grad"] for rank in ranks])
    assert grad.dtype == logits.dtype
    assert_near(
        [ranks[0]["value"], grad],
        [logits],
        lambda logits: reference.seq_logprob(logits, labels, mask, **case),
    )
    one_rank = fused_seq_logprob(
        *(x.to(device) for x in (logits, labels, mask)),
        stats=("token_logps",),
        backend=backend,
        **case,
    )[1]["token_logps"].cpu()
    assert torch.equal(whole([r["stats"]["token_logps"] for r in ranks]), one_rank)


@pytest.mark.parametrize("is_trained", [True, False], ids=["trained", "frozen"])
def test_head_with_sequences_in_shards(results, seed, is_trained):
    """The gradient of the head is the sum of what the ranks have."""
    ranks = of_ranks(results, f"head, {is_trained}")
    torch.manual_seed(seed)
    hidden, weight, bias, labels, mask = parallel_cases.head(*HEAD, F32)
    found = [ranks[0]["value"], torch.cat([rank["grads"][0] for rank in ranks], 1)]
    if is_trained:
        found.append(sum(rank["grads"][1] for rank in ranks))
    assert_near(
        found,
        [hidden, weight],
        lambda h, w: reference.seq_logprob(F.linear(h, w, bias.to(h.dtype)), labels, mask),
    )


def test_vocabulary_and_sequences_in_shards(results, seed):
    ranks = of_ranks(results, "both")
    torch.manual_seed(seed)
    hidden, weight, bias, labels, mask = parallel_cases.head(*HEAD, F32)
    for rank in ranks:
        assert torch.equal(rank["value"], ranks[0]["value"])
    parts = {}
    for rank in ranks:
        same = parts.setdefault(rank["place"], rank["grad"])
        assert torch.equal(same, rank["grad"])
    assert_near(
        [ranks[0]["value"], torch.cat([parts[0], parts[1]], 1)],
        [hidden],
        lambda h: reference.seq_logprob(
            F.linear(h, weight.to(h.dtype), bias.to(h.dtype)), labels, mask
        ),
    )


def test_a_failure_reaches_the_ranks_of_the_other_group(results):
    failures = of_ranks(results, "both, failing")
    assert [failed["kind"] for failed in failures].count("TypeError") == 1
    for failed in failures:
        assert failed["seconds"] < 10
    assert "rank 2 failed" in failures[3]["message"]  # of its vocabulary
    assert "rank 2 failed" in failures[0]["message"]  # of its sequences
    assert "rank 3 failed" in failures[1]["message"]  # whose vocabulary's error it was


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_of_sequences(results, kind):
    failures = of_ranks(results, f"error, {kind}")
    if kind == "shift":
        assert all("F.pad" in x["message"] or ".pad(" in x["message"] for x in failures)
        assert all(x["kind"] == "ValueError" for x in failures)
    elif kind == "labels' dtype":
        assert failures[1]["kind"] == "TypeError"
        assert all("rank 1 failed" in failures[r]["message"] for r in (0, 2, 3))
    else:
        assert all(x["kind"] == "ValueError" for x in failures)
        assert all("on rank 1" in x["message"] for x in failures)


@pytest.mark.parametrize("are_dtensors", [True, False], ids=["labels too", "plain labels"])
def test_logits_as_a_dtensor(results, seed, are_dtensors):
    ranks = of_ranks(results, f"logits, {are_dtensors}")
    torch.manual_seed(seed)
    logits, labels, mask = parallel_cases.inputs(*DTENSORS, BF16)
    for rank in ranks:
        assert torch.equal(rank["value"], ranks[0]["value"])
        assert_near(
            [rank["value"], rank["grad"]],
            [logits],
            lambda logits: reference.seq_logprob(logits, labels, mask),
        )


@pytest.mark.parametrize("is_trained", [True, False], ids=["trained", "frozen"])
def test_tensor_parallel_head(results, seed, is_trained):
    torch.manual_seed(seed)
    *leaves, labels, mask = parallel_cases.head(*HEAD, F32)
    for rank in of_ranks(results, f"tensor parallel, {is_trained}"):
        assert_near(
            [rank["value"], *rank["grads"]],
            leaves,
            lambda h, w, b: reference.seq_logprob(F.linear(h, w, b), labels, mask),
        )


@pytest.mark.parametrize("name", MESHES)
def test_data_parallel_head(results, seed, name, device):
    """The bits of one process for the values; the gradient of the weight is the ranks' average."""
    ranks = of_ranks(results, name)
    batch, *rest = HEAD
    torch.manual_seed(seed)
    hidden, weight, _, labels, mask = parallel_cases.head(batch * SIZE, *rest, F32)
    exact = weight.double().requires_grad_()
    reference.seq_logprob(F.linear(hidden.double(), exact), labels, mask).sum().backward()
    rough = weight.clone().requires_grad_()
    reference.seq_logprob(F.linear(hidden, rough), labels, mask).sum().backward()
    values = fused_linear_seq_logprob(*(x.to(device) for x in (hidden, weight, labels, mask))).cpu()
    assert torch.allclose(torch.cat([rank["value"] for rank in ranks]), values, rtol=1e-6)
    for rank in ranks:
        assert_within_budget(rank["weight_grad"], rough.grad / SIZE, exact.grad / SIZE, name)


def test_a_gathered_head_that_does_not_train_is_freed(results):
    assert all(of_ranks(results, "frees"))


def test_other_placements_are_errors(results):
    for failures in of_ranks(results, "placements"):
        for i, failed in enumerate(failures):
            assert failed is not None, i
            assert failed["kind"] == "ValueError", failed
            said = failed["message"]
            assert "FSDP2" in said or "vocab_shard" in said or "replicated DTensors" in said, said
