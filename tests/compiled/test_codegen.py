"""What the compiler makes of the kernels, in the configurations that the launchers choose."""

import re

import pytest
import torch
import triton
from batches import fused, make_batch, value_and_grad

from gpu_lab import codegen, driver
from gpu_lab.driver import emulate

TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
STATS = ("lengths", "token_logps", "entropy", "mean_logit", "top1", "log_sum_sq_probs")
OPTIONS = {
    "plain": {},
    "softcap": dict(softcap=20.0),
    "entropy": dict(stats=("entropy",)),
    "stats": dict(stats=STATS),
    "stats, softcap": dict(stats=STATS, softcap=20.0),
    "shift": dict(shift=True),
    "packed": dict(shift=True, cu_seqlens=torch.tensor([0, 2, 3])),
}
# Rows that are aligned, rows of a padded head, rows that are not.
LAYOUTS = {"128256": (128256, 128256), "padded": (50304, 50257), "50257": (50257, 50257)}


def run(vocab_size, dtype, width=None, *, batch=(1, 3), mask=True, **options):
    """Forward and backward on logits whose rows are `width` apart."""
    shape = (3,) if "cu_seqlens" in options else batch
    wide = torch.zeros(*shape, width or vocab_size, dtype=dtype)
    logits = wide[..., :vocab_size].requires_grad_()
    labels = torch.zeros(shape, dtype=torch.int64)
    weights = torch.ones(shape) if mask else None
    value = fused("triton")(logits, labels, weights, **options)
    (value if isinstance(value, torch.Tensor) else value[0]).sum().backward()


# Everything once; what takes most registers, and what takes none beyond the loop's, everywhere.
BF16, F32 = torch.bfloat16, torch.float32
CASES = [("sm_100", "128256", BF16, name) for name in OPTIONS] + [
    (target, layout, dtype, name)
    for target in TARGETS
    for layout, dtype in (("128256", BF16), ("128256", F32), ("padded", BF16), ("50257", BF16))
    for name in ("plain", "stats, softcap" if dtype == F32 else "stats")
    if (target, layout, dtype) != ("sm_100", "128256", BF16)
    if layout == "128256" or target != "sm_80"
]


def least_occupancy(target, options, kernel_name):
    """Half of the warps, but for one compiler: with stats, Triton 3.9 and its assembler take up to
    96 registers for Blackwell, and would spill with 64 (docs/versions.md)."""
    takes_more = triton.__version__.startswith("3.9.") and target == "sm_100"
    with_stats = options in ("entropy", "stats") and kernel_name == "_partials_kernel"
    return 0.3 if takes_more and with_stats else 0.5


@pytest.mark.parametrize(("target", "layout", "dtype", "options"), CASES)
def test_no_spills_half_of_the_warps_and_wide_accesses(target, dtype, layout, options):
    width, vocab_size = LAYOUTS[layout]
    with emulate(target, schedule=None) as lab:
        run(vocab_size, dtype, width, **OPTIONS[options])
    assert len(lab.launched) == 4
    for kernel in lab.launched:
        code = codegen.inspect_kernel(kernel)
        assert code.spills == 0, kernel.name
        assert code.stack_bytes == 0, kernel.name
        assert code.occupancy >= least_occupancy(target, options, kernel.name), (
            kernel.name,
            code.registers,
            code.occupancy_limit,
        )
        if kernel.name in ("_partials_kernel", "_grad_kernel") and layout != "50257":
            assert code.access_bits["load"][128] > 0, kernel.name
        if kernel.name == "_grad_kernel" and layout == "128256":
            assert code.access_bits["store"][128] > 0


@pytest.mark.parametrize("vocab_size", [6400, 128256, 131072])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_executed_instructions(target, vocab_size):
    """Warp instructions of the PTX by 32 a logit, exponentials a logit, and bytes; all by count."""
    batch = make_batch((1, 3, vocab_size), torch.bfloat16)._replace(mask=torch.ones(1, 3))
    with emulate(target) as lab:
        value_and_grad(fused("triton"), batch)
    forward, _, _, backward = lab.launches
    logits = 3 * vocab_size

    def a_logit(launch, prefix=""):
        executed = launch.instructions.items()
        return 32 * sum(n for opcode, n in executed if opcode.startswith(prefix)) / logits

    # MiniMind's 6400 are half a split: what a program does once weighs more.
    assert a_logit(forward) <= (7.5 if vocab_size > 100_000 else 10.0)
    assert a_logit(backward) <= (7.5 if vocab_size > 100_000 else 9.5)
    # Sums stay in threads until the split's end: two warps, two numbers, and both over warps.
    num_warps = forward.num_blocks * forward.num_threads // 32
    shuffles = sum(n for opcode, n in forward.instructions.items() if opcode.startswith("shfl"))
    assert shuffles <= 12 * num_warps
    assert a_logit(backward, "shfl") == 0
    assert a_logit(forward, "ex2") <= (1.07 if vocab_size > 100_000 else 1.1)
    assert a_logit(backward, "ex2") <= (1.01 if vocab_size > 100_000 else 1.05)
    in_sixteens = [16 * launch.lanes["load", 16] / (2 * logits) for launch in (forward, backward)]
    assert in_sixteens == [1.0, 1.0]
    assert 16 * backward.lanes["store", 16] == 2 * logits
    # Least traffic: a logit is read once forward, read and written once backward. What belongs to a
    # token is read by each of a program's threads, from the cache: not counted here.
    assert sum(n for (kind, size), n in backward.lanes.items() if kind == "store") == logits / 8


def test_what_tokens_cost():
    """Warp instructions of the kernels that read no logits: a block of tokens of which none is
    scored does next to nothing, and float64 is what adds a sequence's lanes alone."""
    mask = torch.zeros(2, 4096)
    mask[1] = 1.0
    counted = {}
    for name, b in (("unscored", 0), ("scored", 1)):
        batch = make_batch((1, 4096, 2), torch.bfloat16)._replace(mask=mask[b : b + 1])
        with emulate("sm_90") as lab:
            fused("triton")(*batch)
        counted[name] = {launch.kernel: launch.instructions for launch in lab.launches}
    warps = 4096 // 32
    scored, unscored = (counted[name]["_combine_kernel"] for name in ("scored", "unscored"))
    assert unscored.total() <= 60 * warps
    assert scored.total() <= 900 * warps
    in_float64 = [
        sum(n for opcode, n in instructions.items() if "f64" in opcode)
        for instructions in (scored, counted["scored"]["_sequences_kernel"])
    ]
    assert in_float64[0] == 0
    assert in_float64[1] <= 100
    assert counted["scored"]["_sequences_kernel"].total() <= 80 * warps


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_new_batch_compiles_nothing_new(target, monkeypatch):
    """Only dtype, features and divisibility by 16 do."""
    monkeypatch.setattr(driver, "_drivers", {})  # as in a new process
    with emulate(target, schedule=None) as lab:
        run(6400, torch.bfloat16)
        run(6401, torch.bfloat16)
        run(6401, torch.bfloat16, batch=(2, 16))  # rows are not aligned, sequences are
        run(6400, torch.bfloat16, stats=("entropy",))
        before = len(lab.kernels)
        for vocab_size in (32, 128256, 151936, 3, 50257, 151937):
            for batch in ((1, 1), (2, 16), (3, 7), (1, 17), (5, 1)):
                run(vocab_size, torch.bfloat16, batch=batch)
        for number in (1, 2, 16, 0.7):
            run(6400, torch.bfloat16, temperature=number)
            run(6416, torch.bfloat16, logit_scale=number)
            run(6432, torch.bfloat16, ignore_index=int(number))
        run(128256, torch.bfloat16, batch=(2, 9), stats=("entropy",))
        assert len(lab.kernels) == before, [k.name for k in lab.kernels[before:]]
        run(6400, torch.float16)  # and a feature or a dtype does
        assert len(lab.kernels) > before


def test_no_float_atomics():
    """Additions in an order of chance would give other bits in every run."""
    with emulate("sm_90", schedule=None) as lab:
        for dtype in (torch.bfloat16, torch.float32):
            for options in OPTIONS.values():
                run(6416, dtype, **options)
    assert len(lab.launched) == 4 * 2 * len(OPTIONS)
    for kernel in lab.launched:
        text = kernel.asm["ptx"].read_text()
        assert re.search(r"\s(atom|red)\.", text) is None
