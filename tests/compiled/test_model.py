"""The time model: chains of dependent instructions, short launches, and published times."""

import pytest
import torch
import triton
import triton.language as tl

from gpu_lab import published
from gpu_lab.clock import LATENCY
from gpu_lab.devices import DEVICES, H100, RTX_4090
from gpu_lab.driver import emulate
from gpu_lab.model import LAUNCH_SECONDS, launch_seconds, whole
from gpu_lab.sass import LIMITS


# Each of `n` loads gives the address of the next.
@triton.jit
def follow_kernel(links_ptr, out_ptr, n):
    i = 0
    for _ in range(n):
        i = tl.load(links_ptr + i)
    tl.store(out_ptr, i)


@triton.jit
def pair_kernel(x_ptr, out_ptr):
    tl.store(out_ptr, tl.load(x_ptr) + tl.load(x_ptr + 1))


# `n` loads, each of which a float64 sum waits for.
@triton.jit
def sum_kernel(x_ptr, out_ptr, n, N: tl.constexpr):
    total = tl.zeros([N], tl.float64)
    for k in range(n):
        total += tl.load(x_ptr + k * N + tl.arange(0, N))
    tl.store(out_ptr + tl.arange(0, N), total)


def counted(kernel, *args, **constants):
    with emulate("sm_90", follows_chains=True) as lab:
        kernel[(1,)](*args, **constants, num_warps=1)
    return lab.launches[0]


def test_dependent_loads_follow_one_another():
    links = torch.arange(1, 18, dtype=torch.int32)
    for n in (4, 16):
        chain = counted(follow_kernel, links, torch.empty(1, dtype=torch.int32), n).longest_chain
        assert chain["global"] == n


def test_loads_that_nothing_waits_for_go_together():
    assert counted(pair_kernel, torch.ones(2), torch.empty(1)).longest_chain["global"] == 1


def test_a_sum_that_waits_for_its_load_holds_the_next_one_back():
    """Issue is in order."""
    x, out = torch.ones(16, 32), torch.empty(32, dtype=torch.float64)
    chain = counted(sum_kernel, x, out, 16, N=32).longest_chain
    assert chain["global"] == 16
    assert chain["float64"] <= 17
    assert (out == 16).all()


def test_chains_are_followed_on_request_only():
    with emulate("sm_90") as lab:
        follow_kernel[(1,)](torch.ones(2, dtype=torch.int32), torch.empty(1, dtype=torch.int32), 1)
    assert lab.launches[0].longest_chain == {}


def parts(device, num_blocks, num_bytes=0.0):
    x, out = torch.ones(16, 32), torch.empty(32, dtype=torch.float64)
    counts = counted(sum_kernel, x, out, 16, N=32)
    return launch_seconds(
        device, counts, num_blocks=num_blocks, blocks_per_multiprocessor=16, num_bytes=num_bytes
    )


def test_a_launch_waits_for_what_takes_longest():
    one = parts(H100, 1)
    assert one["launch"] == LAUNCH_SECONDS
    assert whole(one) == LAUNCH_SECONDS + one["dependent instructions"]  # nothing fills the card
    assert one["dependent instructions"] > LATENCY["global"] / H100.clock_hz
    # As many blocks as multiprocessors take no longer, one more doubles what the busiest has.
    assert parts(H100, 132)["float64"] == one["float64"]
    assert parts(H100, 133)["float64"] == pytest.approx(2 * one["float64"])
    assert parts(H100, 132 * 16 + 1)["dependent instructions"] == pytest.approx(
        2 * one["dependent instructions"]
    )
    assert parts(H100, 1, 3.35e9)["memory"] == pytest.approx(1e-3 / 0.9)


def test_float64_is_slow_where_there_are_two_lanes():
    ratio = parts(RTX_4090, 1000)["float64"] / parts(H100, 1000)["float64"]
    assert ratio == pytest.approx(64 / 2 * 8 / 8 * 1.98 / 2.52)  # 8 blocks on the busiest of both


def test_every_device_has_limits_and_a_target():
    for device in DEVICES:
        assert device.target in LIMITS or device.target == "gfx942"
    assert len({device.name for device in DEVICES}) == len(DEVICES)


def test_published_times_of_large_kernels():
    """The small ones hold what lies between two events: the model gives less than they say."""
    checks = published.checks()
    assert checks[0].modelled_us == pytest.approx(checks[0].published_us, rel=0.05)
    for check, one in zip(checks[1:], published.TIMES, strict=True):
        ratio = check.modelled_us / check.published_us
        assert ratio < 1.05, check
        assert ratio > 0.75 or one.rows * one.columns < 2**24, check
