"""TRL's own trainers, with and without what `dpo_triton.integrations.trl` puts in place."""

import copy
import math
import os
import socket
import subprocess
import sys

import pytest
import torch

pytest.importorskip("trl_runs")  # which skips where TRL, datasets or peft is missing

import trl
from packaging.version import Version
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl_runs import (
    HAS_HEAD,
    REF,
    TRAINERS,
    assert_same_runs,
    lora,
    make_model,
    make_pairs,
    make_tokenizer,
    run,
)

import dpo_triton.integrations.trl as adapter

# transformers' own code and TRL's defaults use the old name
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tensors are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


CASES = {
    "DPO sigmoid": REF,
    "DPO precomputed": REF | dict(precompute_ref_log_probs=True),
    "DPO ipo": REF | dict(loss_type="ipo"),
    "DPO aot": REF | dict(loss_type="aot"),
    "DPO apo_down": REF | dict(loss_type="apo_down"),
    "DPO mixture": REF | dict(loss_type=["hinge", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]),
    "DPO weighted": REF | dict(use_weighting=True),  # the one user of log_sum_sq_probs
    "DPO length-desensitised": REF | dict(ld_alpha=0.4),
    "DPO js-divergence": REF | dict(f_divergence_type="js_divergence", label_smoothing=0.1),
    "DPO accumulated": REF | dict(gradient_accumulation_steps=2),
    "DPO tied": REF | dict(model=lambda: make_model(tie_word_embeddings=True)),
    "DPO evaluated": REF
    | dict(eval_dataset=lambda: make_pairs(3), eval_strategy="steps", eval_steps=1),
    "DPO LoRA": dict(peft_config=lora),  # the reference is the policy without its adapter
    "DPO bfloat16": REF | dict(bf16=True),
    "KTO kto": REF,
    "KTO apo_zero_unpaired": REF | dict(loss_type="apo_zero_unpaired"),
    "KTO LoRA": dict(peft_config=lora),
    "CPO sigmoid": {},
    "CPO SimPO": dict(loss_type="simpo", cpo_alpha=0.0, simpo_gamma=0.5),
    "CPO ipo accumulated": dict(loss_type="ipo", gradient_accumulation_steps=2),
    "CPO LoRA": dict(peft_config=lora),
    "ORPO": {},
    "ORPO LoRA": dict(beta=0.5, peft_config=lora),
}
# Autocast rounds each product to 8 bits, and TRL's head the logits' gradient as well.
TOLERANCE = {"DPO bfloat16": 5e-2}
runs_without = pytest.mark.skipif(
    Version(trl.__version__).release[:2] == (1, 15),
    reason="the head of TRL 1.15 needs a GPU, so there is nothing to compare with",
)


@runs_without
@pytest.mark.parametrize("case", CASES)
def test_trainers_do_the_same(case, tokenizer, tmp_path):
    kind = case.split()[0]
    theirs = run(kind, tokenizer, tmp_path, **CASES[case])
    with adapter.fused():
        ours = run(kind, tokenizer, tmp_path, **CASES[case])
    assert_same_runs(ours, theirs, TOLERANCE.get(case, 1e-5))


@runs_without
def test_the_reference_that_dpo_loads_itself(tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    options = dict(model=lambda: LlamaForCausalLM.from_pretrained(tmp_path / "model"))
    theirs = run("DPO", tokenizer, tmp_path, **options)
    with adapter.fused():
        ours = run("DPO", tokenizer, tmp_path, **options)
    assert ours.logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert_same_runs(ours, theirs)


@pytest.mark.parametrize("kind", TRAINERS)
def test_trainers_call_ours(kind, tokenizer, tmp_path, monkeypatch):
    """Otherwise a run with the adapter is one without, and the same."""
    name = "fused_linear_token_logprob" if HAS_HEAD else "fused_token_logprob"
    name = name if kind in ("DPO", "KTO") else "fused_seq_logprob"
    function, calls = getattr(adapter, name), []
    monkeypatch.setattr(adapter, name, lambda *a, **k: calls.append(a) or function(*a, **k))
    with adapter.fused():
        run(kind, tokenizer, tmp_path, max_steps=2, **(REF if kind in ("DPO", "KTO") else {}))
    # KTO: the answers, and those of the other prompts; each by the policy and the reference
    assert len(calls) == {"DPO": 2 * 2, "KTO": 4 * 2}.get(kind, 2)


RANK = """
import sys
import torch
import trl_runs as t
import dpo_triton.integrations.trl as adapter
torch.set_num_threads(1)
with adapter.fused():
    run = t.run("DPO", t.make_tokenizer(), sys.argv[1], per_device_train_batch_size=1, **t.REF)
torch.save((run.logs, run.moved), sys.argv[2])
"""


@runs_without
def test_two_processes_of_gloo_train_as_one(tokenizer, tmp_path):
    """DistributedDataParallel, a pair a process, beside TRL's own with both pairs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join(sys.path)
    where = dict(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        WORLD_SIZE="2",
        PYTHONPATH=path,
        OMP_NUM_THREADS="1",
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path), str(tmp_path / f"{rank}.pt")],
            env=os.environ | where | dict(RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        theirs = run("DPO", tokenizer, tmp_path, **REF)
        for rank in ranks:
            output, _ = rank.communicate(timeout=120)
            assert rank.returncode == 0, output
    finally:
        for rank in ranks:
            rank.kill()
    for rank in range(2):
        ours = copy.copy(theirs)
        ours.logs, ours.moved = torch.load(tmp_path / f"{rank}.pt")
        ours.logs = ours.logs if rank == 0 else theirs.logs  # only the first process logs
        assert_same_runs(ours, theirs)
