"""What the compiled loops promise alone: threads, forks, code that is kept; and large logits."""

import math
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from batches import Batch, fused, make_batch, max_error, value_and_grad

pytest.importorskip("numba")
if torch.cuda.is_available():
    pytest.skip("tensors are on a GPU", allow_module_level=True)

LOWEST = torch.finfo(torch.float32).min


@pytest.fixture
def threads():
    """Sets the number of PyTorch's threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_number_of_threads(dtype, threads):
    """Also where threads have few rows each, and fewer rows than threads."""
    batch = make_batch((3, 3, 70001), dtype)
    found = []
    for n in (1, 2, 3, 16):
        threads(n)
        found.append(value_and_grad(fused("cpu"), batch))
    for value, grad in found[1:]:
        assert torch.equal(value, found[0][0])
        assert torch.equal(grad, found[0][1])


def test_several_python_threads_at_once(threads):
    threads(2)
    batches = [make_batch((2, 3, 50000 + 17 * k), torch.bfloat16) for k in range(6)]
    expected = [value_and_grad(fused("cpu"), batch) for batch in batches]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            found = list(pool.map(lambda batch: value_and_grad(fused("cpu"), batch), batches))
            for (value, grad), (exact_value, exact_grad) in zip(found, expected, strict=True):
                assert torch.equal(value, exact_value)
                assert torch.equal(grad, exact_grad)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork(threads):
    """The parent's threads are not there: a child that waited for them would wait for ever."""
    threads(2)
    batch = make_batch((2, 3, 70001), torch.float32)
    expected = fused("cpu")(*batch)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(2)  # of its own: OpenMP's are left behind as well
        os._exit(0 if torch.equal(fused("cpu")(*batch), expected) else 1)
    killer = threading.Timer(60, os.kill, (child, 9))
    killer.start()
    _, status = os.waitpid(child, 0)
    killer.cancel()
    assert status == 0
    assert torch.equal(fused("cpu")(*batch), expected)


def test_an_error_in_a_thread_is_raised(threads):
    from dpo_triton._cpu_stages._threads import share_rows

    def loop(counter, step, num_rows):
        raise ZeroDivisionError

    threads(2)
    with pytest.raises(ZeroDivisionError):
        share_rows(loop, 64, 1 << 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_numbers_are_those_of_pytorch(dtype):
    """Every number of 16 bits is read, and float32 is rounded to nearest, ties to even."""
    import numpy as np
    from numba import njit

    from dpo_triton._cpu_stages._numbers import number, rounded
    from dpo_triton._cpu_stages._rows import ELEMENTS

    zero = ELEMENTS[dtype]

    @njit
    def read(x, out):
        for i in range(len(x)):
            out[i] = number(x[i])

    @njit
    def write(x, out):
        for i in range(len(x)):
            out[i] = rounded(x[i], out[i])

    every = torch.arange(1 << 16).to(torch.int32).to(torch.uint16).view(dtype)
    bits = every.view(torch.uint16).numpy().view(type(zero))
    found = np.empty(len(bits), np.float32)
    read(bits, found)
    assert max_error(torch.from_numpy(found), every.double()) == 0
    # Ties, their neighbours, and anything: overflow, subnormals, NaN.
    ties = every.float().view(torch.int32) + (1 << 15 if dtype == torch.bfloat16 else 1 << 12)
    anything = torch.randint(-(2**31), 2**31, (1 << 16,)).int()
    for x in (ties, ties - 1, ties + 1, anything):
        back = np.empty(len(x), type(zero))
        write(x.numpy().view(np.float32), back)
        result = torch.from_numpy(back.view(np.int16)).view(dtype)
        expected = x.view(torch.float32).to(dtype)
        assert torch.equal(result.isnan(), expected.isnan())
        finite = ~expected.isnan()
        assert torch.equal(result[finite].view(torch.int16), expected[finite].view(torch.int16))


def test_exponentials_of_float32():
    """Within two roundings, down to the smallest normal number or to the smallest of all; below
    that 0, and NaN stays."""
    import numpy as np
    from numba import njit

    from dpo_triton._cpu_stages._numbers import exp2, exp2_and_subnormals

    @njit
    def exponentials(x, out):
        for i in range(len(x)):
            out[0, i] = exp2(x[i])
            out[1, i] = exp2_and_subnormals(x[i])

    def found(x):
        out = np.empty((2, len(x)), np.float32)
        exponentials(x.numpy(), out)
        return torch.from_numpy(out)

    x = -torch.rand(200_000) * 150
    exact = x.double().exp2()
    error = (found(x) - exact).abs() / exact.clamp(min=2.0**-126)
    assert float(error[1].max()) <= 2.4e-7
    assert float(error[0][x > -126].max()) <= 2.4e-7
    special = torch.tensor([0.0, 1.0, -1.0, -152.0, -1e30, -math.inf, math.nan])
    for out in found(special):
        assert out[:-1].tolist() == [1.0, 2.0, 0.5, 0.0, 0.0, 0.0]
        assert math.isnan(out[-1])


FIRST_CALL = """
import sys, time
import torch
x, y = torch.randn(2, 3, 40), torch.zeros(2, 3, dtype=torch.long)
start = time.perf_counter()
import dpo_triton
assert "numba" not in sys.modules
dpo_triton.fused_seq_logprob(x, y)
print(time.perf_counter() - start)
assert "numba" in sys.modules
from dpo_triton._cpu_stages.partials import fold_rows
assert sum(fold_rows.stats.cache_hits.values()) == 1
"""


def test_numba_comes_with_the_first_call_and_code_is_kept():
    """Seconds are far below what compiling takes, on a busy machine too."""
    fused("cpu")(torch.randn(2, 3, 40), torch.zeros(2, 3, dtype=torch.long))
    done = subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 4


def test_what_is_kept_follows_the_files(tmp_path, monkeypatch):
    """Also those that a function is not in."""
    import numba

    from dpo_triton._cpu_stages import _compiled

    def double(x):
        return 2 * x

    def hits():
        dispatcher = _compiled.compiled(double)
        assert dispatcher(21) == 42
        return sum(dispatcher.stats.cache_hits.values())

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    assert [hits(), hits()] == [0, 1]
    monkeypatch.setattr(_compiled, "DIGEST", "another")
    assert [hits(), hits()] == [0, 1]


def test_tensors_elsewhere():
    from dpo_triton._backends import resolve_backend

    with pytest.raises(RuntimeError, match='backend="cpu" got tensors on meta'):
        resolve_backend("cpu", torch.device("meta"), torch.float32)


# Banned tokens and outliers. The truth of a row whose others are all alike needs no float64.


@pytest.mark.parametrize("host", ["cpu", "torch"])
@pytest.mark.parametrize("ban", [-1e9, -1e10, -1e20, LOWEST])
def test_banned_by_a_large_number(ban, host):
    batch = make_batch((2, 2, 6400), torch.float32)._replace(mask=None)
    batch.logits[..., :2048] = ban
    batch = batch._replace(labels=batch.labels.clamp(min=2048))
    value, grad = value_and_grad(fused(host), batch)
    exact = batch.logits.double()
    exact[..., :2048] = -math.inf
    exact_value = exact.log_softmax(-1).gather(-1, batch.labels[..., None])[..., 0]
    assert max_error(value, exact_value.mean(1)) <= 1e-5
    assert grad[..., :2048].count_nonzero() == 0
    assert grad.isfinite().all()


@pytest.mark.parametrize("host", ["cpu", "torch"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize("temperature", [1.0, 1e-6, 1e6])
def test_flat_rows_at_the_ends(temperature, dtype, host):
    """All alike is -log V, at any size of logits."""
    for x in (torch.finfo(dtype).min, torch.finfo(dtype).max, 3e4, -3e4):
        batch = Batch(torch.full((1, 1, 50), x, dtype=dtype), torch.tensor([[4]]), None)
        value, grad = value_and_grad(fused(host), batch, temperature=temperature)
        assert float(value) == pytest.approx(-math.log(50), rel=1e-6)
        share = torch.full((50,), -0.02 / temperature, dtype=torch.float64)
        share[4] = 0.98 / temperature
        tolerance = 2e-3 if dtype == torch.float16 else 1e-2 if dtype == torch.bfloat16 else 1e-5
        if dtype != torch.float16 or temperature == 1.0:  # else beyond its range
            torch.testing.assert_close(grad[0, 0].double(), share, rtol=tolerance, atol=0)


@pytest.mark.parametrize("host", ["cpu", "torch"])
def test_outliers_and_their_stats(host):
    logits = torch.tensor([[[0.0, 1e10, -3e38], [0.0, 1e10, 1e10], [3e38, -3e38, 3e38]]])
    labels = torch.tensor([[0, 1, 2]])
    stats = ("token_logps", "entropy", "mean_logit", "top1", "log_sum_sq_probs")
    logits.requires_grad_()
    tokens, found = fused(host, "fused_token_logprob")(logits, labels, stats=stats)
    ln2 = math.log(2.0)
    torch.testing.assert_close(tokens, torch.tensor([[-1e10, -ln2, -ln2]]))
    torch.testing.assert_close(found["entropy"], torch.tensor([[0.0, ln2, ln2]]))
    torch.testing.assert_close(found["mean_logit"], logits.detach().double().mean(-1).float())
    assert found["top1"].tolist() == [[0.0, 1.0, 0.0]]
    torch.testing.assert_close(found["log_sum_sq_probs"], torch.tensor([[0.0, -ln2, -ln2]]))
    tokens.sum().backward()
    expected = torch.tensor([[[1.0, -1.0, 0.0], [0.0, 0.5, -0.5], [-0.5, 0.0, 0.5]]])
    torch.testing.assert_close(logits.grad, expected)


def test_after_the_main_thread_has_ended_one_thread_does_it():
    """No thread can be started any more at the interpreter's end."""
    code = (
        "import atexit, torch; from dpo_triton import fused_seq_logprob; torch.set_num_threads(2)\n"
        "x, labels = torch.zeros(4, 6, 30000), torch.zeros(4, 6, dtype=torch.int64)\n"
        "atexit.register(lambda: print(fused_seq_logprob(x, labels, backend='cpu').tolist()))\n"
        "fused_seq_logprob(x, labels, backend='cpu')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("-10.308") == 4, done.stdout + done.stderr
