"""TRL's own trainers on a CPU, with and without what `dpo_triton.integrations.trl` puts in place.

A run is a few steps of a tiny Llama from a fixed seed. The optimiser is plain SGD: its steps are
the gradients, where Adam's first step is their sign, rounding errors of a zero gradient included.
"""

import copy
import gc
import importlib.metadata
import inspect
import math
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")
pytest.importorskip("datasets")  # trl itself imports without it
pytest.importorskip("peft")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import trl
from batches import assert_close
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer import utils

import dpo_triton.integrations.trl as adapter

# transformers' own code and TRL's defaults use the old name
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
HAS_HEAD = Version(trl.__version__) >= Version("1.15")  # trainers without logits
VOCAB_SIZE = 4133  # past a tile of the head, and no multiple of anything


@pytest.fixture(scope="module", autouse=True)
def tiny_and_many():
    """The tensors are too small for threads, and each trainer collects garbage."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token: w0, w1, ..."""
    words = ["<pad>", "<eos>", "<unk>"] + [f"w{i}" for i in range(VOCAB_SIZE - 3)]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<eos>",
        unk_token="<unk>",
    )


def make_model(tie_word_embeddings: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,  # logits that differ
        tie_word_embeddings=tie_word_embeddings,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def make_pairs(num_pairs: int = 8) -> Dataset:
    """Prompts and answers of different lengths."""
    draw = random.Random(3)

    def text(shortest: int, longest: int) -> str:
        words = draw.choices(range(VOCAB_SIZE - 3), k=draw.randint(shortest, longest))
        return " ".join(f"w{i}" for i in words)

    return Dataset.from_list(
        [
            dict(prompt=text(3, 9), chosen=" " + text(1, 7), rejected=" " + text(1, 12))
            for _ in range(num_pairs)
        ]
    )


def make_labelled() -> Dataset:
    """An answer a row, wanted or not; neighbours differ, since KTO pairs each with the next."""
    rows = []
    for pair in make_pairs():
        rows.append(dict(prompt=pair["prompt"], completion=pair["chosen"], label=True))
        rows.append(dict(prompt=pair["prompt"], completion=pair["rejected"], label=False))
    return Dataset.from_list(rows)


DATA = {"DPO": make_pairs, "KTO": make_labelled, "CPO": make_pairs, "ORPO": make_pairs}
TRAINERS = {
    "DPO": (trl.DPOTrainer, trl.DPOConfig),
    "KTO": (trl.KTOTrainer, trl.KTOConfig),
    "CPO": (CPOTrainer, CPOConfig),
    "ORPO": (ORPOTrainer, ORPOConfig),
}


class Run:
    """A training run: what it logged, and how far each parameter that trains went."""

    def __init__(self, trainer: Any) -> None:
        start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        of_the_machine = ("runtime", "per_second", "total_flos")  # the last counts padding
        self.logs = [
            {name: value for name, value in row.items() if not name.endswith(of_the_machine)}
            for row in trainer.state.log_history
        ]
        self.end = dict(trainer.model.named_parameters())
        self.moved = {
            name: p.detach() - start[name]
            for name, p in trainer.model.named_parameters()
            if p.requires_grad
        }


def run(kind: str, tokenizer: Any, folder: Any, **options: Any) -> Run:
    """Train; of the options a function makes an argument of the trainer, others are its config's.

    Each run makes its own: a trainer changes its model.
    """
    trainer_class, config_class = TRAINERS[kind]
    torch.manual_seed(11)  # of an adapter's weights
    made = dict(model=make_model) | {k: v for k, v in options.items() if callable(v)}
    config = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4 if kind == "KTO" else 2,
        max_steps=3,
        learning_rate=0.3,
        lr_scheduler_type="constant",
        optim="sgd",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=5,
    ) | {k: v for k, v in options.items() if k not in made}
    trainer = trainer_class(
        args=config_class(**config),
        train_dataset=DATA[kind](),
        processing_class=tokenizer,
        **{name: make() for name, make in made.items()},
    )
    return Run(trainer)


def assert_same_runs(ours: Run, theirs: Run, tolerance: float = 1e-5) -> None:
    """Logs to the tolerance, relative beyond 1; moves to that part of the longest in a tensor, and
    three roundings, one a step, of the parameter."""
    assert len(ours.logs) == len(theirs.logs) >= 3
    for mine, other in zip(ours.logs, theirs.logs, strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            assert mine[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
    assert ours.moved.keys() == theirs.moved.keys()
    assert max(float(moved.abs().max()) for moved in theirs.moved.values()) > 1e-3
    for name, moved in theirs.moved.items():
        error = float((ours.moved[name] - moved).abs().max())
        rounding = 3 * 2.0**-24 * float(theirs.end[name].detach().abs().max())
        assert error <= tolerance * float(moved.abs().max()) + rounding, name


def reference_model() -> LlamaForCausalLM:
    """Not the policy, so that rewards are not 0 at the first step."""
    model = make_model()
    draw = torch.Generator().manual_seed(13)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=draw))
    return model


def lora() -> LoraConfig:
    return LoraConfig(
        r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )


REF = dict(ref_model=reference_model)
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
import test_trl as t
torch.set_num_threads(1)
with t.adapter.fused():
    run = t.run("DPO", t.make_tokenizer(), sys.argv[1], per_device_train_batch_size=1, **t.REF)
torch.save((run.logs, run.moved), sys.argv[2])
"""


@runs_without
def test_two_processes_of_gloo_train_as_one(tokenizer, tmp_path):
    """DistributedDataParallel, a pair a process, beside TRL's own with both pairs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
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


def make_rows(
    num_rows: int = 11, hidden_size: int = 8, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = torch.randn(num_rows, hidden_size, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCAB_SIZE, hidden_size, dtype=dtype, requires_grad=True)
    bias = torch.randn(VOCAB_SIZE, dtype=dtype, requires_grad=True)
    return hidden, weight, bias, torch.randint(0, VOCAB_SIZE, (num_rows,))


EVERY = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("has_bias", [False, True])
def test_head_against_float64(has_bias, softcap, dtype):
    hidden, weight, bias, targets = make_rows(dtype=dtype)
    bias = bias if has_bias else None
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    z = exact[0] @ exact[1].t() + (exact[2] if has_bias else 0.0)
    z = 0.7 * z if softcap is None else softcap * torch.tanh(0.7 * z / softcap)
    log_p = (z / 1.3).log_softmax(-1)
    targets[:4] = z[:4].argmax(-1)  # some are the largest
    rows = torch.arange(len(targets))
    expected = [
        log_p[rows, targets],
        -(log_p.exp() * log_p).sum(-1),
        (2 * log_p).logsumexp(-1),
        (z / 1.3).mean(-1),
        z.argmax(-1) == targets,
    ]
    got = adapter.chunked_log_probs(hidden, weight, bias, targets, 1.3, 1000, softcap, 0.7, EVERY)
    for ours, true in zip(got, expected, strict=True):
        if true.dtype == torch.bool:
            assert torch.equal(ours, true)
        else:
            assert ours.dtype == dtype
            assert_close(
                ours.detach(), true.detach(), 2e-6 * (1 + float(true.detach().abs().max()))
            )
    upstream = torch.randn(len(targets))
    grads = torch.autograd.grad(got[0], inputs, upstream.to(dtype))
    for ours, true in zip(
        grads, torch.autograd.grad(expected[0], exact, upstream.double()), strict=True
    ):
        assert_close(ours, true, 5e-6 * float(true.abs().max()))


@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "mean_logits"), EVERY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.skipif(
    Version(trl.__version__) < Version("1.16"), reason="needs a GPU or is not there"
)
def test_head_beside_trl_s_own(dtype, outputs):
    """The same fields, dtypes and None; -100 is 0 or False; and only scored rows are multiplied."""
    input_ids = torch.randint(3, VOCAB_SIZE, (3, 9))
    labels = input_ids.masked_fill(torch.rand(3, 9) < 0.5, -100)
    labels[:, 3] = 5  # at least one a row
    function = adapter.fused_linear_token_logprob
    results, rows = [], []
    for is_ours in (False, True):
        model = make_model().to(dtype)
        utils.add_fused_lm_head(model, temperature=0.8, outputs=outputs)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                adapter,
                "fused_linear_token_logprob",
                lambda hidden, *a, **k: rows.append(hidden.shape[1]) or function(hidden, *a, **k),
            )
            undo = adapter.enable() if is_ours else lambda: None
            result = model(input_ids=input_ids, labels=labels, fused_lm_head=True)
            undo()
        results.append(result)
    theirs, ours = results
    assert rows == [int((labels[:, 1:] != -100).sum())]
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert ours[name].requires_grad == value.requires_grad, name
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5)
    assert (ours.log_probs[labels[:, 1:] == -100] == 0).all()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_batch_without_scored_rows_still_has_a_gradient(frozen):
    hidden, weight, bias, targets = make_rows(0)
    weight.requires_grad_(not frozen)
    logps, *stats = adapter.chunked_log_probs(hidden, weight, bias, targets, 1.0, 1000)
    assert logps.shape == stats[0].shape == (0,)
    logps.sum().backward()
    assert hidden.grad.shape == hidden.shape
    assert frozen or torch.equal(weight.grad, torch.zeros_like(weight))


def test_a_tie_is_top1_for_the_first_token_only():
    hidden, weight = torch.ones(2, 1), torch.zeros(VOCAB_SIZE, 1)
    weight[[70, 4100]] = 1.0  # in two tiles
    is_top1 = adapter.chunked_log_probs(hidden, weight, None, torch.tensor([70, 4100]), 1.0, 9)[-1]
    assert is_top1.tolist() == [True, False]


def test_autocast_and_a_head_in_another_dtype():
    hidden, weight, _, targets = make_rows()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = adapter.chunked_log_probs(hidden, weight, None, targets, 1.0, 1000)[0]
    # cast_lm_head_to_fp32: float32 hidden states of a bfloat16 model
    half = weight.detach().bfloat16().requires_grad_()
    wide = adapter.chunked_log_probs(hidden, half, None, targets, 1.0, 1000)[0]
    exact = adapter.chunked_log_probs(hidden, half.float(), None, targets, 1.0, 1000)[0]
    assert mixed.dtype == wide.dtype == torch.float32
    assert torch.equal(wide, exact)
    torch.testing.assert_close(mixed, exact, rtol=2e-2, atol=2e-2)
    wide.sum().backward()
    assert half.grad.dtype == torch.bfloat16


def test_a_loss_on_the_entropy_is_refused():
    hidden, weight, bias, targets = make_rows()
    logps, entropy, *_ = adapter.chunked_log_probs(hidden, weight, bias, targets, 1.0, 1000)
    logps.sum().backward(retain_graph=True)
    (logps - 0.0 * entropy).sum().backward(retain_graph=True)  # a coefficient that is 0 now
    with pytest.raises(NotImplementedError, match="entropy_coef=0"):
        (logps - entropy).sum().backward()


def test_a_partitioned_head_that_trains_is_refused():
    hidden, weight, bias, targets = make_rows()
    weight.ds_id = 3
    with pytest.raises(NotImplementedError, match="ZeRO-3"):
        adapter.chunked_log_probs(hidden, weight, bias, targets, 1.0, 1000)
    with torch.no_grad():
        adapter.chunked_log_probs(hidden, weight, bias, targets, 1.0, 1000)
    weight.requires_grad_(False)
    adapter.chunked_log_probs(hidden, weight, bias, targets, 1.0, 1000)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("is_encoder_decoder", [False, True])
def test_get_batch_logps_beside_trl_s_own(is_encoder_decoder, average):
    logits = torch.randn(3, 9, 130, dtype=torch.float64)
    labels = torch.randint(0, 130, (3, 9)).masked_fill(torch.rand(3, 9) < 0.4, -100)
    labels[:, 4] = 7
    for trainer in (CPOTrainer, ORPOTrainer):
        arguments = (average, is_encoder_decoder)
        theirs = trainer.get_batch_logps(logits, labels.clone(), *arguments)
        with adapter.fused():
            ours = trainer.get_batch_logps(logits, labels, *arguments)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    labels[1] = -100  # theirs: the mean is NaN
    assert adapter.get_batch_logps(logits, labels, average, is_encoder_decoder)[1] == 0


@pytest.mark.parametrize("shape", [(2, 5, 130), (7, 130), (2, 3, 4, 130)], ids=str)
def test_selective_log_softmax_beside_trl_s_own(shape):
    full = torch.randn(*shape[:-2], shape[-2] + 1, shape[-1], dtype=torch.float64)
    logits = full[..., :-1, :].requires_grad_()  # a slice, as the trainers make it
    theirs = utils.selective_log_softmax
    has_options = "row_mask" in inspect.signature(theirs).parameters
    mask = torch.rand(shape[:-1]) < 0.5
    cases: list[dict[str, Any]] = [{}]
    if has_options:
        cases = [{}, dict(temperature=0.7), dict(row_mask=mask), dict(row_mask=mask.long())]
    for num_labels in (None, 3):
        index = torch.randint(0, 130, shape[:-1] if num_labels is None else (*shape[:-1], 3))
        for options in cases:
            if num_labels is not None and "row_mask" in options:
                options = dict(row_mask=options["row_mask"][..., None].expand(index.shape))
            expected = theirs(logits, index, **options)
            with adapter.fused():
                got = utils.selective_log_softmax(logits, index, **options)
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
            upstream = torch.randn_like(got)
            torch.testing.assert_close(
                torch.autograd.grad(got, logits, upstream),
                torch.autograd.grad(expected, logits, upstream),
            )


def test_selective_log_softmax_lists_a_negative_label():
    with pytest.raises(IndexError, match="-100"):
        adapter.selective_log_softmax(torch.randn(1, 3, 9), torch.tensor([[3, -100, 4]]))


def held() -> dict[str, dict[str, Any]]:
    """What every module of TRL, and the trainers' classes, hold."""
    names = [name for name in sys.modules if name.partition(".")[0] == "trl"]
    places = [sys.modules[name] for name in names] + [CPOTrainer, ORPOTrainer]
    return {str(place): dict(vars(place)) for place in places}


def test_undo_restores():
    before = held()
    undo = adapter.enable()
    during = held()
    assert utils.selective_log_softmax.__name__.endswith("selective_log_softmax")
    changed = {
        (place, name)
        for place, names in before.items()
        for name, value in names.items()
        if during[place][name] is not value
    }
    assert not [place for place, name in changed if "chunked_divergence" in place]
    assert {name for _, name in changed} >= {"get_batch_logps", "selective_log_softmax"}
    undo()
    assert held() == before
    undo()
    with pytest.raises(KeyError), adapter.fused():
        raise KeyError
    assert held() == before


def test_an_unknown_version_is_refused(monkeypatch):
    before = held()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.17.0")
    with pytest.raises(RuntimeError, match=r"TRL 1\.17\.0 was not tested.*1\.15\.0, 1\.16\.0"):
        adapter.enable()
    assert held() == before
