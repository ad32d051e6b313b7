"""The head that takes the place of TRL's: against float64, beside TRL's, and what it refuses."""

import importlib.metadata

import pytest
import torch

pytest.importorskip("trl_runs")  # which skips where TRL, datasets or peft is missing

import trl
from batches import assert_close
from packaging.version import Version
from torch import Tensor
from trl.trainer import utils
from trl_runs import HAS_HEAD, VOCAB_SIZE, make_model

import dpo_triton.integrations.trl as adapter


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


def test_a_next_version_whose_head_lost_two_parameters(monkeypatch):
    """It has no chunk_size and no outputs; what is left goes by name."""

    class ChunkedLogProbFunction(torch.autograd.Function):
        @staticmethod
        def forward(  # TRL's names after 1.16
            ctx,
            hidden,
            weight,
            bias,
            targets,
            temperature,
            final_logit_softcapping=None,
            logit_scale=1.0,
        ):
            return hidden

    if not HAS_HEAD:
        pytest.skip("has no head")
    kernels = importlib.import_module("trl.kernels.chunked_logprob")
    monkeypatch.setattr(kernels, "ChunkedLogProbFunction", ChunkedLogProbFunction)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.17.0.dev0")
    hidden, weight, bias, targets = make_rows()
    expected = adapter.chunked_log_probs(hidden, weight, bias, targets, 1.3, 1000, 4.0, 0.7)
    with pytest.warns(UserWarning, match=r"1\.17\.0\.dev0 was not tested.*taken for 1\.16\.0"):
        undo = adapter.enable(untested="warn")
    got = kernels.ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 1.3, 4.0, 0.7)
    undo()
    assert kernels.ChunkedLogProbFunction is ChunkedLogProbFunction
    for ours, true in zip(got, expected, strict=True):
        assert torch.equal(ours, true)
