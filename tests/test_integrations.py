"""What frameworks call for log-probabilities: signatures, values and gradients in float64, and the
installed framework's own function where there is one.

The semantics are written down anew in each `statement`, from the frameworks' sources.
"""

import importlib
import inspect
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from batches import assert_close
from torch import Tensor

from dpo_triton.integrations import llama_factory, ms_swift, open_instruct, openrlhf, torchtune

NAMES = ["llama_factory", "ms_swift", "open_instruct", "openrlhf", "torchtune"]


def make_labels(rows: int, seq_len: int, vocab_size: int, pad: int = -100) -> Tensor:
    """A prompt, an answer with a hole and padding; the last row has no answer."""
    labels = torch.randint(0, vocab_size, (rows, seq_len))
    start = torch.randint(0, seq_len // 3, (rows, 1))
    end = torch.randint(seq_len // 2, seq_len + 1, (rows, 1))
    position = torch.arange(seq_len)
    labels[(position < start) | (position >= end) | (position == seq_len // 2 - 1)] = pad
    labels[-1] = pad
    return labels


def make_logits(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape) * 3).to(dtype)


def exact_token_logps(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """float64 log-probability of each label; where the label is negative: of token 0."""
    log_p = (logits.double() / temperature).log_softmax(-1)
    return log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]


def assert_same(
    device: torch.device, ours: Any, statement: Any, logits: Tensor, *args: Any, **options: Any
) -> None:
    """Values and gradients of the first result, and the other results, against float64: ours on the
    device, but for float64, which Triton has not."""
    where = torch.device("cpu") if logits.dtype == torch.float64 else device
    own_args = [x.to(where) if isinstance(x, Tensor) else x for x in args]
    results, grads, upstream = [], [], None
    for function, inputs, others in (
        (statement, logits.double().clone(), args),
        (ours, logits.clone().to(where), own_args),
    ):
        inputs.requires_grad_()
        result = function(inputs, *others, **options)
        result = result if isinstance(result, tuple) else (result,)
        upstream = torch.randn_like(result[0]) if upstream is None else upstream
        result[0].backward(upstream.to(result[0]))
        results.append([x.detach().cpu() for x in result])
        grads.append(inputs.grad.cpu())
    for exact, got in zip(*results, strict=True):
        assert got.shape == exact.shape
        if exact.is_floating_point():
            expected = torch.float64 if logits.dtype == torch.float64 else torch.float32
            assert got.dtype == expected
            assert_close(got, exact, 1e-6 * (1 + float(exact.abs().max())))
        else:
            assert got.dtype == exact.dtype
            assert torch.equal(got, exact)
    assert_close(grads[1], grads[0], 5e-6 * float(grads[0].abs().max()))


def signature(function: Any) -> str:
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters)


def test_signatures_are_the_frameworks():
    assert (
        signature(llama_factory.get_batch_logps)
        == "logits, labels, label_pad_token_id=-100, ld_alpha=None"
    )
    assert signature(openrlhf.log_probs_from_logits) == "logits, labels, temperature=1.0"
    assert (
        signature(torchtune.get_batch_log_probs)
        == "logits, labels, label_pad_token_id=-100, return_average_logprobs=False"
    )
    assert signature(torchtune.logits_to_logprobs) == "logits, sequences, temperature=1.0"
    assert (
        signature(ms_swift.get_per_token_logps)
        == "self, logits, labels, label_pad_token_id=-100, reduction='mean'"
    )
    assert signature(open_instruct.calculate_per_token_logps) == "logits, labels"


def test_importing_imports_no_framework_and_patches_nothing():
    code = f"""
import sys, dpo_triton
assert not any(name.startswith("dpo_triton.integrations") for name in sys.modules)
from dpo_triton.integrations import {", ".join(NAMES)}, _patching
frameworks = {{"llamafactory", "swift", "open_instruct", "openrlhf", "torchtune", "trl"}}
assert not frameworks & {{name.partition(".")[0] for name in sys.modules}}
assert not _patching._held
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def llama_factory_statement(
    logits: Tensor, labels: Tensor, label_pad_token_id: int = -100, ld_alpha: float | None = None
) -> tuple[Tensor, Tensor]:
    """Row by row: sums over next tokens; past the shorter answer's length, times ld_alpha."""
    token_logps = exact_token_logps(logits[:, :-1], labels[:, 1:])
    scored = [(row[1:] != label_pad_token_id).nonzero()[:, 0].tolist() for row in labels]
    half = len(labels) // 2
    logps = []
    for b, positions in enumerate(scored):
        total = token_logps[b, :1].sum() * 0
        shorter = min(len(positions), len(scored[(b + half) % len(scored)]))
        for t in positions:
            is_beyond = ld_alpha is not None and t >= positions[0] + shorter
            total = total + token_logps[b, t] * (ld_alpha if is_beyond else 1)
        logps.append(total)
    return torch.stack(logps), torch.tensor([len(positions) for positions in scored])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ld_alpha", [None, 0.3, 0.0, 1.0])
def test_llama_factory(ld_alpha, dtype, device):
    logits = make_logits(6, 14, 130, dtype=dtype)
    for pad in (-100, 7):  # 7: a token of the vocabulary
        labels = make_labels(6, 14, 130, pad)
        options = dict(label_pad_token_id=pad, ld_alpha=ld_alpha)
        assert_same(
            device,
            llama_factory.get_batch_logps,
            llama_factory_statement,
            logits,
            labels,
            **options,
        )
        logps, lengths = llama_factory.get_batch_logps(logits, labels, **options)
        assert logps[-1] == lengths[-1] == 0


def test_llama_factory_whatever_the_default_dtype():
    logits, labels = make_logits(2, 14, 130), make_labels(2, 14, 130)
    labels[1] = -100
    expected, _ = llama_factory.get_batch_logps(logits, labels, ld_alpha=0.3)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        got, _ = llama_factory.get_batch_logps(logits, labels, ld_alpha=0.3)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(got, expected)


def test_llama_factory_lists_rows_that_are_not_pairs():
    with pytest.raises(ValueError, match=r"even number of rows with ld_alpha.* got 3"):
        llama_factory.get_batch_logps(make_logits(3, 5, 9), make_labels(3, 5, 9), ld_alpha=0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(2, 5, 130), (7, 130)], ids=str)  # padded, packed
def test_openrlhf(shape, temperature, dtype, device):
    labels = torch.randint(0, shape[-1], shape[:-1])
    logits = make_logits(*shape, dtype=dtype)
    before = logits.clone()
    assert_same(
        device,
        openrlhf.log_probs_from_logits,
        exact_token_logps,
        logits,
        labels,
        temperature=temperature,
    )
    assert torch.equal(logits, before)


def test_openrlhf_gives_0_for_an_ignored_label():
    labels = torch.tensor([[3, -100, 4]])
    log_probs = openrlhf.log_probs_from_logits(make_logits(1, 3, 9), labels)
    assert (log_probs == 0).tolist() == [[False, True, False]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("average", [False, True])
def test_torchtune(average, dtype, device):
    def statement(logits: Tensor, labels: Tensor, label_pad_token_id: int, average: bool) -> Tensor:
        token_logps = exact_token_logps(logits[:, :-1], labels[:, 1:])
        is_scored = labels[:, 1:] != label_pad_token_id
        total = (token_logps * is_scored).sum(1)
        return total / is_scored.sum(1).clamp(min=1) if average else total

    for pad in (-100, 7):
        labels = make_labels(4, 14, 130, pad)
        logits = make_logits(4, 14, 130, dtype=dtype)
        assert_same(device, torchtune.get_batch_log_probs, statement, logits, labels, pad, average)
        assert torchtune.get_batch_log_probs(logits, labels, pad, average)[-1] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchtune_logits_to_logprobs(dtype, device):
    sequences = torch.randint(0, 130, (3, 5))
    logits = make_logits(3, 5, 130, dtype=dtype)
    for temperature in (1.0, 1.7):
        assert_same(
            device, torchtune.logits_to_logprobs, exact_token_logps, logits, sequences, temperature
        )
    sequences[1, 2] = -100
    with pytest.raises(IndexError, match=r"labels\[1, 2\] is -100"):
        torchtune.logits_to_logprobs(logits, sequences)


def trainer(sequence_parallel_size: int = 1) -> Any:
    return SimpleNamespace(template=SimpleNamespace(sequence_parallel_size=sequence_parallel_size))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ms_swift(reduction, dtype, device):
    def statement(logits: Tensor, labels: Tensor, label_pad_token_id: int, reduction: str):
        is_scored = labels != label_pad_token_id
        reduced = getattr(logits, reduction)(-1) * is_scored
        return exact_token_logps(logits, labels) * is_scored, reduced, is_scored

    for pad in (-100, 7):
        labels = make_labels(4, 14, 130, pad)
        logits = make_logits(4, 14, 130, dtype=dtype)
        assert_same(
            device,
            lambda *args: ms_swift.get_per_token_logps(trainer(), *args),
            statement,
            logits,
            labels,
            pad,
            reduction,
        )


def test_ms_swift_refuses_what_it_cannot_do():
    logits, labels = make_logits(2, 5, 9), make_labels(2, 5, 9)
    with pytest.raises(NotImplementedError, match="sequence_parallel_size 1, got 2"):
        ms_swift.get_per_token_logps(trainer(2), logits, labels)
    with pytest.raises(ValueError, match=r"reduction must be .* got 'none'"):
        ms_swift.get_per_token_logps(trainer(), logits, labels, reduction="none")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_open_instruct(dtype, device):
    def statement(logits: Tensor, labels: Tensor) -> Tensor:
        token_logps = exact_token_logps(logits[:, :-1], labels[:, 1:]) * (labels[:, 1:] != -100)
        return torch.cat([token_logps, torch.zeros(len(labels), 1)], 1)

    for seq_len in (14, 1):  # 1: nothing is predicted
        labels = make_labels(4, 14, 130)[:, :seq_len]
        logits = make_logits(4, seq_len, 130, dtype=dtype)
        assert_same(device, open_instruct.calculate_per_token_logps, statement, logits, labels)
    empty = open_instruct.calculate_per_token_logps(make_logits(2, 0, 9), labels[:2, :0])
    assert empty.shape == (2, 0)


@pytest.mark.parametrize("name", NAMES)
def test_enabling_without_the_framework_names_the_tested_versions(name, monkeypatch):
    module = importlib.import_module(f"dpo_triton.integrations.{name}")
    distribution = module._integration.distribution

    def no_distribution(name: str) -> str:
        assert name == distribution
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", no_distribution)
    with pytest.raises(ModuleNotFoundError, match=module._integration.tested[-1]):
        module.enable()
    with pytest.raises(ModuleNotFoundError), module.fused():
        pass


CASES = {
    "get_batch_logps": [{}, dict(ld_alpha=0.3)],
    "log_probs_from_logits": [{}, dict(temperature=0.7)],
    "get_batch_log_probs": [{}, dict(return_average_logprobs=True)],
    "logits_to_logprobs": [{}, dict(temperature=0.7)],
    "get_per_token_logps": [{}, dict(reduction="sum")],
    "calculate_per_token_logps": [{}],
}


@pytest.mark.parametrize("name", NAMES)
def test_the_installed_framework_s_own_function(name):
    """Enabled, the framework has ours; undone, its own; both say the same."""
    module = importlib.import_module(f"dpo_triton.integrations.{name}")
    integration = module._integration
    owners = []
    try:
        importlib.metadata.version(integration.distribution)
        for replacement in integration.replacements:
            module_name, _, class_name = replacement.owner.partition(":")
            owner = importlib.import_module(module_name)
            owners.append(getattr(owner, class_name) if class_name else owner)
    except ImportError as error:
        pytest.skip(f"{integration.framework}: {error}")
    for owner, (_, function_name, ours) in zip(owners, integration.replacements, strict=True):
        theirs = vars(owner)[function_name]
        labels = make_labels(4, 14, 130)
        if function_name in ("log_probs_from_logits", "logits_to_logprobs"):
            labels = torch.randint(0, 130, labels.shape)
        elif "average" in str(inspect.signature(theirs)):
            labels[-1, -1] = 3  # theirs divides by a count of 0 plus 1e-8
        before = (trainer(),) if name == "ms_swift" else ()
        for options in CASES[function_name]:
            logits = make_logits(4, 14, 130, dtype=torch.float64)
            expected = theirs(*before, logits.clone(), labels, **options)
            with module.fused():
                assert vars(owner)[function_name].__wrapped__ is ours
                got = vars(owner)[function_name](*before, logits, labels, **options)
            assert vars(owner)[function_name] is theirs
            torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7, check_dtype=False)
