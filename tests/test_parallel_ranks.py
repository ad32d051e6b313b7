"""Ranks of a sharded vocabulary: what each takes and sends, and how all end when one fails."""

from typing import Any

import parallel_cases as cases
import pytest
import torch
from parallel_cases import Case, of_ranks
from processes import run_processes

from benchmarks.common.batches import Shape
from benchmarks.common.peers import OURS
from benchmarks.parallel import model, ways
from dpo_triton import VocabShard, fused_seq_logprob

SIZE = 4
MISMATCHES = [
    "shape", "labels", "mask", "dtype", "temperature", "stats", "overlap", "gap",
]  # fmt: skip
OWN_ERRORS = {"width": "ValueError", "labels' dtype": "TypeError", "reduction": "ValueError"}
# 256 rows of 50257 in bf16 are 25 MiB, as is a head of 256 columns, whose products take few rows.
PEAKS = {
    "logits": (4, 64, 0, 50257),
    "trained": (4, 16, 256, 50257),
    "frozen": (4, 16, 256, 50257),
}


# Of the benchmark: shards of one width, as its model has them.
BENCHMARK = Shape(4, 8, 4 * 5000, hidden_size=16)


@pytest.fixture(scope="module")
def device() -> torch.device:
    """Where there is a GPU too: gloo exchanges no CUDA tensors as shards do, and NCCL takes a GPU
    for each rank."""
    return torch.device("cpu")


@pytest.fixture(scope="module")
def results(seed: int, device: torch.device) -> list[dict[str, Any]]:
    """By rank, what each case returned there. Processes are started once."""
    every = {}
    for kind in (*MISMATCHES, *OWN_ERRORS):
        every[f"mismatch, {kind}"] = Case(cases.mismatch_case, dict(kind=kind, wrong_rank=2))
    every["out of vocabulary"] = Case(cases.out_of_vocabulary_case, {})
    for stage in ("forward", "backward"):
        options = dict(stage=stage, wrong_rank=1)
        every[f"failing {stage}"] = Case(cases.failing_stage_case, options)
    for kind, shape in PEAKS.items():
        for is_sharded in (False, True):
            options = dict(shape=shape, kind=kind, is_sharded=is_sharded)
            every[f"peak, {kind}, {is_sharded}"] = Case(cases.peak_case, options)
    every["create_graph"] = Case(cases.create_graph_case, {})
    every["missing"] = Case(cases.missing_rank_case, dict(wrong_rank=0, timeout_s=1.5))
    for case in every.values():
        case.options["device"] = device
    every["benchmark"] = Case(ways.measure, dict(shape=BENCHMARK, seed=0))
    return run_processes(cases.run, SIZE, every, seed)


@pytest.mark.parametrize("name", ways.WAYS)
def test_the_benchmarks_model_has_the_bytes_that_are_sent(results, name):
    ranks = of_ranks(results, "benchmark")
    num_scored = ranks[0][name]["num_scored"]
    step = model.Step(num_scored, BENCHMARK.hidden_size, BENCHMARK.vocab_size)
    cost = model.cost(name, step, SIZE)
    num_tokens = BENCHMARK.batch * BENCHMARK.seq_len
    for rank in ranks:
        assert torch.equal(rank[name]["values"], ranks[0][name]["values"])
        assert rank[name]["error"] < 0.05
        assert rank[name]["calls"] == cost.collectives
        sent, sent_back = rank[name]["forward"], rank[name]["backward"]
        if name == OURS:
            assert sent == cost.forward_bytes + (SIZE - 1) * 4  # a status
            assert sent_back == cost.backward_bytes
        else:  # they reduce the gradient of all hidden states
            assert sent == cost.forward_bytes
            assert sent_back == pytest.approx(cost.backward_bytes * num_tokens / num_scored)


@pytest.mark.parametrize("kind", PEAKS)
def test_a_rank_takes_its_share_of_memory(results, kind):
    whole = of_ranks(results, f"peak, {kind}, False")[0]
    sharded = of_ranks(results, f"peak, {kind}, True")
    if whole is None:
        pytest.skip("the kernel keeps no record of the peak")
    for rank in sharded:
        assert rank <= whole / SIZE + 8


@pytest.mark.parametrize("kind", MISMATCHES)
def test_ranks_that_disagree_all_say_who(results, kind):
    for failed in of_ranks(results, f"mismatch, {kind}"):
        assert failed["kind"] == "ValueError", failed
        assert "rank 2" in failed["message"] or "ranks 0, 1, 3" in failed["message"]
        assert failed["seconds"] < 5


@pytest.mark.parametrize("kind", OWN_ERRORS)
def test_a_rank_that_fails_stops_all(results, kind):
    failures = of_ranks(results, f"mismatch, {kind}")
    assert failures[2]["kind"] == OWN_ERRORS[kind]
    for rank in (0, 1, 3):
        assert failures[rank]["kind"] == "RuntimeError"
        assert "rank 2 failed" in failures[rank]["message"]
        assert failures[2]["message"][:60] in failures[rank]["message"]
        assert failures[rank]["seconds"] < 5


@pytest.mark.parametrize("stage", ["forward", "backward"])
def test_a_rank_that_fails_in_a_pass_stops_all(results, stage):
    failures = of_ranks(results, f"failing {stage}")
    assert failures[1]["kind"] == "MemoryError"
    for rank in (0, 2, 3):
        assert failures[rank]["kind"] == "RuntimeError"
        assert "rank 1 failed" in failures[rank]["message"]
        assert failures[rank]["seconds"] < 5


def test_a_label_outside_of_the_vocabulary(results):
    for failed in of_ranks(results, "out of vocabulary"):
        assert failed["kind"] == "IndexError"
        assert "[0, 32)" in failed["message"]


def test_a_rank_that_never_comes_ends_by_the_timeout(results):
    failures = of_ranks(results, "missing")
    assert failures[0] is None
    for failed in failures[1:]:
        assert failed["seconds"] < 10


def test_no_graph_of_a_sharded_heads_gradient(results):
    for failed in of_ranks(results, "create_graph"):
        assert failed["kind"] == "RuntimeError"
        assert "create_graph" in failed["message"]


def test_compiled_whole_it_raises():
    logits, labels, _ = cases.inputs(2, 3, 5, torch.float32)
    function = torch.compile(fused_seq_logprob, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"torch.compiler.disable"):
        function(logits, labels, vocab_shard=VocabShard(0, 5))


def test_without_a_process_group():
    logits, labels, _ = cases.inputs(2, 3, 5, torch.float32)
    with pytest.raises(RuntimeError, match="init_process_group"):
        fused_seq_logprob(logits, labels, vocab_shard=VocabShard(0, 5))
    with pytest.raises(TypeError, match="VocabShard"):
        fused_seq_logprob(logits, labels, vocab_shard=(0, 5))
