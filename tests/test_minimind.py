"""MiniMind's DPO loss: each version against its formula in float64."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batches import assert_close
from torch import Tensor

from dpo_triton.integrations import minimind

VERSIONS = ["v1", "v2", "v3", "v4"]
VOCAB_SIZE = 6400  # MiniMind's: not a multiple of the kernels' tiles


def statement(
    version: str, ref_logits: Tensor, logits: Tensor, labels: Tensor, mask: Tensor, beta: float
) -> Tensor:
    """MiniMind's formula, row by row, in float64 on the CPU; empty rows are 0."""

    def value(row_logits: Tensor, y: Tensor, m: Tensor) -> Tensor:
        p = row_logits.double().log_softmax(-1)[torch.arange(len(y)), y]
        total = p[m != 0] @ m[m != 0].double()
        divisor = {"v1": len(m), "v4": 1}.get(version, float(m.sum()))
        return total / divisor if (m != 0).any() else total

    half = len(labels) // 2
    logratios = [
        value(x, y, m) - value(r, y, m).detach()
        for x, r, y, m in zip(logits, ref_logits, labels, mask, strict=True)
    ]
    margins = torch.stack(logratios[:half]) - torch.stack(logratios[half:])
    return F.softplus(-beta * margins).mean()


def loss_and_grad(function: Any, ref_logits: Tensor, logits: Tensor, *args: Any, scale: float = 1):
    logits = logits.detach().clone().requires_grad_()
    loss = function(ref_logits, logits, *args)
    (loss * scale).backward()
    return loss.detach(), logits.grad


def make_pairs(
    rows: int, seq_len: int, dtype: torch.dtype = torch.float32, device: Any = "cpu", vocab: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ref_logits, logits, labels, mask: right padding with id 0, turns of an assistant with holes,
    the last row empty, as a prompt longer than the maximum makes it."""
    shape = (rows, seq_len, vocab or VOCAB_SIZE)
    ref_logits = torch.randn(shape, device=device) * 3
    logits = ref_logits + torch.randn(shape, device=device) / 2
    labels = torch.randint(0, shape[-1], shape[:2], device=device)
    turns = torch.rand(rows, -(-seq_len // 4), device=device) > 0.5  # four tokens a turn
    turns[:, 0] = True
    mask = turns.repeat_interleave(4, 1)[:, :seq_len].long()
    lengths = torch.randint(4, seq_len + 1, (rows, 1), device=device)
    is_padding = torch.arange(seq_len, device=device) >= lengths
    labels[is_padding] = mask[is_padding] = 0
    mask[-1] = 0
    return ref_logits.to(dtype), logits.to(dtype), labels, mask


def of_tokens(version: str) -> Any:
    """The drop-in functions, called as `train_dpo.py` calls its own."""
    loss = getattr(minimind, f"dpo_loss_{version}")

    def function(ref_logits: Tensor, logits: Tensor, labels: Tensor, mask: Tensor, beta: float):
        with torch.no_grad():
            ref_log_probs = minimind.logits_to_log_probs(ref_logits, labels)
        return loss(ref_log_probs, minimind.logits_to_log_probs(logits, labels), mask, beta=beta)

    return function


def fused(version: str, backend: str) -> Any:
    return lambda *args: minimind.fused_dpo_loss(*args, version=version, backend=backend)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("version", "dtype"),
    [*((v, torch.float32) for v in VERSIONS), ("v3", torch.bfloat16), ("v3", torch.float16)],
    ids=str,
)
def test_fused_loss_is_the_formula(version, dtype, backend, device):
    pairs = make_pairs(4, 9, dtype, device)  # 9: a turn that the end cuts
    loss, grad = loss_and_grad(fused(version, backend), *pairs, 0.15)
    exact, exact_grad = loss_and_grad(
        lambda *a: statement(version, *a), *(x.cpu() for x in pairs), 0.15
    )
    assert loss.dtype == torch.float32
    assert_close(loss[None], exact[None], 1e-5)  # margins of 100 nats and more in float32
    assert_close(grad, exact_grad, 2e-5 * float(exact_grad.abs().max()))
    assert (grad[pairs[3] == 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_drop_in_functions_are_the_formula(version, dtype, device):
    if dtype == torch.float64:
        device = "cpu"  # Triton, which a GPU's tensors go to, has no float64
    pairs = make_pairs(4, 30, dtype, device)
    loss, grad = loss_and_grad(of_tokens(version), *pairs, 0.1)
    exact, exact_grad = loss_and_grad(
        lambda *a: statement(version, *a), *(x.cpu() for x in pairs), 0.1
    )
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(loss[None], exact[None], 1e-5)
    assert_close(grad, exact_grad, 2e-5 * float(exact_grad.abs().max()))


def test_versions_differ_and_the_length_normalised_one_is_the_default():
    pairs = make_pairs(4, 30)
    losses = {v: float(minimind.fused_dpo_loss(*pairs, 0.1, version=v)) for v in VERSIONS}
    assert losses["v2"] == losses["v3"]
    assert len(set(losses.values())) == 3
    assert float(minimind.fused_dpo_loss(*pairs, 0.1)) == losses["v3"]
    assert minimind.dpo_loss is minimind.dpo_loss_v3
    assert minimind.logits_to_probs is minimind.logits_to_log_probs


def test_names_and_orders_are_minimind_s():
    ref_logits, logits, labels, mask = make_pairs(4, 30)
    ref = minimind.logits_to_log_probs(logits=ref_logits, labels=labels)
    policy = minimind.logits_to_log_probs(logits=logits, labels=labels)
    for version in ("v1", "v2"):
        loss = getattr(minimind, f"dpo_loss_{version}")
        assert loss(ref_probs=ref, probs=policy, mask=mask, beta=0.1) == loss(
            ref, policy, mask, 0.1
        )
    for version in ("v3", "v4"):
        loss = getattr(minimind, f"dpo_loss_{version}")
        assert loss(ref_log_probs=ref, policy_log_probs=policy, mask=mask, beta=0.1) == loss(
            ref, policy, mask, 0.1
        )
        assert loss(policy, ref, mask, 0.1) != loss(ref, policy, mask, 0.1)


@pytest.mark.parametrize("version", VERSIONS)
def test_policy_equal_to_reference_is_ln_2(version, device):
    ref_logits, _, labels, mask = make_pairs(4, 9, torch.bfloat16, device)
    for function in (fused(version, "auto"), of_tokens(version)):
        assert function(ref_logits, ref_logits, labels, mask, 0.1) == torch.tensor(math.log(2))


@pytest.mark.parametrize("version", VERSIONS)
def test_empty_rows_count_as_0_and_stop_no_gradient(version, device):
    """MiniMind's v2 gives NaN for one empty row; here its pair still trains by the other row."""
    pairs = make_pairs(4, 9, device=device)
    for function in (fused(version, "auto"), of_tokens(version)):
        loss, grad = loss_and_grad(function, *pairs, 0.1)
        assert loss.isfinite()
        assert grad.isfinite().all()
        assert (grad[1] != 0).any()  # the chosen row of the pair whose rejected one is empty
        nothing = torch.zeros_like(pairs[3])
        loss, grad = loss_and_grad(function, *pairs[:3], nothing, 0.1)
        assert loss == torch.tensor(math.log(2))
        assert (grad == 0).all()


def test_what_the_mask_leaves_out_is_not_read(backend, device):
    pairs = make_pairs(4, 9, device=device)
    clean = loss_and_grad(fused("v3", backend), *pairs, 0.1)
    ref_logits, logits, labels, mask = (x.clone() for x in pairs)
    ref_logits[mask == 0] = logits[mask == 0] = math.nan
    labels[mask == 0] = -7
    poisoned = loss_and_grad(fused("v3", backend), ref_logits, logits, labels, mask, 0.1)
    assert all(map(torch.equal, clean, poisoned))
    log_probs = torch.randn(4, 9)
    policy = log_probs.clone()
    policy[mask.cpu() == 0] = math.nan
    policy.requires_grad_()
    minimind.dpo_loss(log_probs, policy, mask.cpu(), 0.1).backward()
    assert policy.grad.isfinite().all()


@pytest.mark.parametrize("version", VERSIONS)
def test_long_rows(version, device):
    """T = 1023, as max_length 1024 makes it: sums of thousands of nats."""
    pairs = make_pairs(2, 1023, device=device, vocab=500)
    loss, grad = loss_and_grad(of_tokens(version), *pairs, 0.001)
    exact, exact_grad = loss_and_grad(
        lambda *a: statement(version, *a), *(x.cpu() for x in pairs), 0.001
    )
    assert_close(loss[None], exact[None], 2e-6)
    assert_close(grad, exact_grad, 1e-5 * float(exact_grad.abs().max()))
    assert_close(fused(version, "auto")(*pairs, 0.001)[None], exact[None], 2e-6)


@pytest.mark.parametrize("version", VERSIONS)
def test_gradient_for_a_scaler_s_upstream_factor(version, device):
    pairs = make_pairs(4, 9, torch.float16, device)
    _, grad = loss_and_grad(fused(version, "auto"), *pairs, 0.1, scale=65536.0)
    _, exact = loss_and_grad(
        lambda *a: statement(version, *a), *(x.cpu() for x in pairs), 0.1, scale=65536.0
    )
    assert grad.dtype == torch.float16
    assert grad.isfinite().all()
    assert_close(grad, exact, 2e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("which", ["drop-in", "fused"])
def test_a_step_of_train_dpo_under_autocast(which, dtype, device):
    """Its training step in small: autocast, a reference without grad, a scaler, accumulation."""
    embed = torch.nn.Embedding(VOCAB_SIZE, 16, device=device)
    head = torch.nn.Linear(16, VOCAB_SIZE, bias=False, device=device)
    ref_head = torch.nn.Linear(16, VOCAB_SIZE, bias=False, device=device).requires_grad_(False)
    _, _, y, mask = make_pairs(4, 30, device=device)
    x = torch.randint(0, VOCAB_SIZE, y.shape, device=device)
    scaler = torch.amp.GradScaler(device.type, init_scale=65536.0, enabled=dtype == torch.float16)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    function = of_tokens("v3") if which == "drop-in" else fused("v3", "auto")
    with torch.autocast(device.type, dtype=dtype):
        with torch.no_grad():
            ref_logits = ref_head(embed(x))
        logits = head(embed(x))
        assert logits.dtype == dtype
        loss = function(ref_logits, logits, y, mask, 0.1) / 2
    logits.retain_grad()
    scaler.scale(loss).backward()
    exact, exact_grad = loss_and_grad(
        lambda *a: statement("v3", *a),
        *(tensor.cpu() for tensor in (ref_logits, logits, y, mask)),
        0.1,
        scale=scaler.get_scale() / 2,
    )
    assert_close(2 * loss.detach()[None], exact[None], 1e-5)
    assert_close(logits.grad, exact_grad, 2e-5 * float(exact_grad.abs().max()))
    before = head.weight.detach().clone()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert not torch.equal(head.weight, before)  # a step with inf or NaN would have been skipped


def test_gradient_in_place(device):
    ref_logits, logits, labels, mask = make_pairs(4, 9, torch.bfloat16, device)
    _, grad = loss_and_grad(fused("v3", "auto"), ref_logits, logits, labels, mask, 0.1)
    leaf = logits.clone().requires_grad_()
    policy = leaf * 1
    minimind.fused_dpo_loss(ref_logits, policy, labels, mask, 0.1, inplace_backward=True).backward()
    assert torch.equal(leaf.grad, grad)


def test_no_gradient_reaches_the_reference():
    ref_logits, logits, labels, mask = make_pairs(2, 9)
    ref_logits.requires_grad_()
    logits.requires_grad_()
    minimind.fused_dpo_loss(ref_logits, logits, labels, mask, 0.1).backward()
    of_tokens("v3")(ref_logits, logits, labels, mask, 0.1).backward()
    assert ref_logits.grad is None


def test_no_pairs_is_0():
    for function in (fused("v1", "torch"), of_tokens("v1")):
        loss, grad = loss_and_grad(function, *(x[:0] for x in make_pairs(2, 9)), 0.1)
        assert loss == 0
        assert grad.shape == (0, 9, VOCAB_SIZE)


def test_mistakes_get_an_error():
    ref_logits, logits, labels, mask = make_pairs(4, 9)
    log_probs = minimind.logits_to_log_probs(logits, labels)
    with pytest.raises(ValueError, match=r"same even number of rows.* got 3"):
        minimind.fused_dpo_loss(ref_logits[:3], logits[:3], labels[:3], mask[:3], 0.1)
    with pytest.raises(ValueError, match="same even number of rows"):
        minimind.dpo_loss(log_probs[:3], log_probs[:3], mask[:3], 0.1)
    with pytest.raises(ValueError, match=r"must both be \(2B, T\).*logits_to_log_probs"):
        minimind.dpo_loss(ref_logits, logits, mask, 0.1)
    with pytest.raises(ValueError, match=r"must both be \(2B, T\)"):
        minimind.dpo_loss(log_probs, log_probs, mask[:, 1:], 0.1)
    with pytest.raises(ValueError, match=r"version must be .*got 'v5'"):
        minimind.fused_dpo_loss(ref_logits, logits, labels, mask, 0.1, version="v5")
