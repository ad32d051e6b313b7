"""The emulator itself: what instructions do, and that it catches what it is there to catch."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from batches import fused, make_batch, value_and_grad

from gpu_lab import driver, machine, ptx
from gpu_lab.driver import emulate
from gpu_lab.memory import SharedMemory

TARGETS = ["sm_80", "sm_90", "sm_100"]


def run_ptx(body, outputs=1, inputs=(), threads=32, shared=0, schedule="lockstep"):
    """Run a body of PTX by `threads`; %rd0 has the address of each thread's first output word."""
    out = torch.zeros(threads, outputs, dtype=torch.int32)
    tensors = [torch.as_tensor(x) for x in inputs]
    params = ",".join(f".param .u64 k_param_{i}" for i in range(1 + len(tensors)))
    text = f""".visible .entry k({params})
    .reqntid {threads}
    {{
    .reg .pred %p<9>;
    .reg .b16 %h<9>;
    .reg .b32 %r<20>;
    .reg .b64 %rd<20>;
    ld.param.b64 %rd0, [k_param_0];
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %rd1, %r0, {4 * outputs};
    add.s64 %rd0, %rd0, %rd1;
    {body}
    ret;
    }}"""
    machine.run(ptx.parse(text), (1,), [out, *tensors], shared, schedule)
    return out.numpy()


def constant(x):
    return f"0f{np.float32(x).view(np.uint32):08X}"


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("shl.b32 %r1, 3, 31;", 1 << 31),
        ("shl.b32 %r1, 3, 40;", 0),  # beyond the width: zeros
        ("shr.s32 %r1, -8, 40;", -1),  # ... or signs
        ("shr.u32 %r1, -8, 28;", 15),
        ("div.s32 %r1, -7, 2;", -3),  # towards zero
        ("rem.s32 %r1, -7, 2;", -1),
        ("div.u32 %r1, 7, 2;", 3),
        ("mul.hi.u32 %r1, -1, -1;", 0xFFFFFFFE),
        ("mad.lo.s32 %r1, 3, -4, 5;", -7),
        ("bfe.u32 %r1, 0xABCD, 4, 8;", 0xBC),
        ("bfe.s32 %r1, 0xABCD, 4, 8;", -0x44),
        ("bfe.s32 %r1, 16, 4, 1;", -1),
        ("prmt.b32 %r1, 0x44332211, 0x88776655, 0x7051;", 0x88116622),
        ("prmt.b32 %r1, 0x80, 0, 0x8888;", -1),  # a byte's sign, four times
        ("cvt.rni.s32.f32 %r1, 0f40200000;", 2),  # 2.5 to the even one
        ("cvt.rzi.s32.f32 %r1, 0fC0200000;", -2),
        ("cvt.rzi.u32.f32 %r1, 0fC0200000;", 0),  # out of range: the nearest
        ("cvt.rzi.s32.f32 %r1, 0f7FC00000;", 0),  # NaN
        ("cvt.rn.bf16x2.f32 %r1, 0f3F800000, 0f40000000;", 0x3F804000),  # the first is the upper
        ("mov.b32 %r1, {0x1234, 0x5678};", 0x56781234),
        ("setp.ltu.f32 %p1, 0f7FC00000, 0f00000000; selp.b32 %r1, 1, 0, %p1;", 1),
        ("setp.lt.f32 %p1, 0f7FC00000, 0f00000000; selp.b32 %r1, 1, 0, %p1;", 0),
        ("setp.ne.f32 %p1, 0f7FC00000, 0f00000000; selp.b32 %r1, 1, 0, %p1;", 0),
        ("setp.lo.u32 %p1, 1, -1; selp.b32 %r1, 1, 0, %p1;", 1),
        ("max.f32 %r1, 0f7FC00000, 0f3F800000;", 0x3F800000),  # the number wins
        ("max.NaN.f32 %r1, 0f7FC00000, 0f3F800000;", 0x7FC00000),
        ("ex2.approx.ftz.f32 %r1, 0fC3000000;", 0),  # 2 ** -128 is subnormal
        ("add.f32 %r1, 0f00000001, 0f00000001;", 2),  # ... which matters only with .ftz
        ("add.ftz.f32 %r1, 0f00000001, 0f00000001;", 0),
    ],
)  # fmt: skip
def test_instruction(instruction, expected):
    out = run_ptx(f"{instruction} st.global.b32 [%rd0], %r1;")
    assert (out.view(np.uint32) == np.uint32(expected & 0xFFFFFFFF)).all()


def test_fma_rounds_once():
    generator = np.random.default_rng()
    for _ in range(20):
        x, y = generator.standard_normal(2).astype(np.float32)
        z = np.float32(-np.float32(x) * np.float32(y))  # cancels: two roundings would give 0
        body = f"fma.rn.f32 %r1, {constant(x)}, {constant(y)}, {constant(z)};"
        out = run_ptx(f"{body} st.global.b32 [%rd0], %r1;").view(np.float32)
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        assert (out == np.float32(float(exact))).all()


def test_packed_and_mixed_arithmetic():
    body = f"""mov.b64 %rd2, {{{constant(1.5)}, {constant(2.5)}}};
    mul.f32x2 %rd3, %rd2, %rd2;
    mov.b64 {{%r1, %r2}}, %rd3;
    sub.rn.f32.bf16 %r3, 0x4040, {constant(0.5)};
    st.global.v2.b32 [%rd0], {{%r1, %r2}};
    st.global.b32 [%rd0 + 8], %r3;"""
    out = run_ptx(body, outputs=4).view(np.float32)
    assert (out[:, :3] == [2.25, 6.25, 2.5]).all()  # 0x4040 is 3.0 in bfloat16


def test_conversions_round_like_pytorch():
    values = torch.randn(4096) * torch.tensor([1e-6, 1e-3, 1.0, 1e3]).repeat(1024)
    for dtype in (torch.bfloat16, torch.float16):
        for target in TARGETS:
            out = torch.zeros(4096, dtype=dtype)
            back = torch.zeros(4096)
            with emulate(target):
                convert[(1,)](values, out, back, N=4096)
            assert torch.equal(out, values.to(dtype))
            assert torch.equal(back, values.to(dtype).float())


@triton.jit
def convert(x_ptr, out_ptr, back_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    narrow = tl.load(x_ptr + n).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + n, narrow)
    tl.store(back_ptr + n, narrow.to(tl.float32))


@triton.jit
def float64_math(x_ptr, out_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    x = tl.load(x_ptr + n)
    tl.store(out_ptr + n, tl.log2(x))
    tl.store(out_ptr + N + n, tl.exp2(x))
    tl.store(out_ptr + 2 * N + n, 1.0 / x)


@pytest.mark.parametrize("target", TARGETS)
def test_float64_library_functions(target):
    """Long programs of float64 instructions (their reciprocal has only half of its bits)."""
    x = torch.rand(256, dtype=torch.float64) * 50 + 1e-3
    out = torch.zeros(3, 256, dtype=torch.float64)
    with emulate(target):
        float64_math[(1,)](x, out, N=256)
    exact = torch.stack([x.log2(), x.exp2(), 1 / x])
    assert ((out - exact).abs() <= 1e-15 * exact.abs() + 1e-16).all()


@triton.jit
def sums(x_ptr, out_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    x = tl.load(x_ptr + tl.program_id(0) * N + n)
    tl.store(out_ptr + tl.program_id(0) * 2, tl.sum(x))
    tl.store(out_ptr + tl.program_id(0) * 2 + 1, tl.max(x))


@pytest.mark.parametrize("schedule", ["lockstep", "warps"])
@pytest.mark.parametrize("target", TARGETS)
def test_reductions_and_counts(target, schedule):
    """Shuffles, shared memory, barriers; and every byte that was loaded and stored."""
    x = torch.randn(70, 1024)  # more blocks than run together
    out = torch.full((70, 2), torch.nan)
    with emulate(target, schedule) as lab:
        sums[(70,)](x, out, N=1024, num_warps=8)
    assert torch.allclose(out[:, 0], x.sum(1), atol=1e-4)
    assert torch.equal(out[:, 1], x.amax(1))
    (launch,) = lab.launches
    assert (launch.num_blocks, launch.num_threads) == (70, 256)
    assert launch.bytes_loaded == 70 * 4096
    assert launch.bytes_stored == 70 * 8
    assert launch.lanes["load", 16] == 70 * 256
    assert launch.instructions["bar.sync"] > 0


@triton.jit
def transpose(x_ptr, out_ptr, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    tl.store(out_ptr + j * N + i, tl.load(x_ptr + i * N + j))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_transpose_through_shared_memory(target, dtype):
    x = torch.randn(64, 64).to(dtype)
    out = torch.zeros_like(x)
    for schedule in ("lockstep", "warps"):
        with emulate(target, schedule):
            transpose[(1,)](x, out, N=64)
        assert torch.equal(out, x.T)


# What it must catch


@pytest.fixture
def mutated(monkeypatch):
    """Compile as ever, and run what `change` makes of the PTX, or of a launch's arguments."""

    def mutate(change_text=None, change_arguments=None):
        monkeypatch.setattr(driver, "_drivers", {})  # kernels that were parsed before stay out
        parse, run = ptx.parse, machine.run
        if change_text is not None:
            monkeypatch.setattr(driver.ptx, "parse", lambda text: parse(change_text(text)))
        if change_arguments is not None:

            def run_changed(program, grid, arguments, *rest, **options):
                changed = change_arguments(program, list(arguments))
                return run(program, grid, changed, *rest, **options)

            monkeypatch.setattr(driver.machine, "run", run_changed)

    return mutate


@pytest.mark.parametrize("schedule", ["lockstep", "warps"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_missing_barrier_is_caught(target, schedule, mutated):
    batch = make_batch((2, 3, 1023), torch.bfloat16)._replace(mask=torch.ones(2, 3))
    for kernel in ("_partials_kernel", "_combine_kernel"):
        mutated(lambda text, k=kernel: text.replace("bar.sync", "// ", 1) if k in text else text)
        with emulate(target, schedule), pytest.raises(MemoryError, match=r"race|before anything"):
            value_and_grad(fused("triton"), batch)


@pytest.mark.parametrize("gap", [0, 1], ids=["at once", "one after the other"])
def test_warps_may_write_copies_of_one_value(gap):
    """As Triton 3.9 has them do after a reduction; other values are a race."""

    def write(*values):
        shared = SharedMemory(1, 16)
        stores = [[0, 1]] if gap == 0 else [[0], [1]]
        for warps in stores:
            at = np.full(len(warps), 4)
            words = [np.array([values[warp] for warp in warps], np.uint32)]
            shared.store(0 * at, np.array(warps), at, words, "st")

    write(7, 7)
    with pytest.raises(MemoryError, match="race: two warps write the same bytes"):
        write(7, 8)


@pytest.mark.parametrize("shape", [(1, 2, 1023), (1, 2, 6401)])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", ["_partials_kernel", "_grad_kernel"])
def test_a_mask_too_wide_is_caught(kernel, target, shape, mutated):
    """One column more: the last row's is outside of the tensor, an access to a padded row's too."""
    vocab_size = shape[-1]

    def widen(program, arguments):
        if program.name != kernel:
            return arguments
        return [a + 1 if type(a) is int and a == vocab_size else a for a in arguments]

    mutated(change_arguments=widen)
    for padding in (0, 7):
        batch = make_batch((*shape[:-1], vocab_size + padding), torch.bfloat16)
        batch = batch._replace(
            logits=batch.logits[..., :vocab_size],
            labels=batch.labels % vocab_size,
            mask=torch.ones(shape[:-1]),
        )
        with emulate(target), pytest.raises(MemoryError, match="outside of the launch's tensors"):
            value_and_grad(fused("triton"), batch)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", ["_partials_kernel", "_grad_kernel"])
def test_a_false_alignment_is_caught(kernel, target, mutated):
    """Logits that start one element later than the compiled code was promised."""

    def misalign(program, arguments):
        if program.name == kernel:
            logits = arguments[0]
            moved = torch.empty(logits.numel() + 1, dtype=logits.dtype)[1:]
            arguments[0] = moved.view(logits.shape).copy_(logits)
        return arguments

    mutated(change_arguments=misalign)
    batch = make_batch((2, 2, 6400), torch.bfloat16)._replace(mask=torch.ones(2, 2))
    with emulate(target), pytest.raises(MemoryError, match="misaligned load of 16 bytes"):
        value_and_grad(fused("triton"), batch)


@pytest.mark.parametrize("target", TARGETS)
def test_reading_a_row_that_is_not_scored_is_caught(target, mutated):
    """The mask that says so is taken away: NaN comes out."""

    def score_all(program, arguments):
        if program.name == "_partials_kernel":
            arguments[2] = torch.ones_like(arguments[2])
        return arguments

    batch = make_batch((2, 3, 1023), torch.bfloat16)
    batch.mask[:, 1], batch.mask[:, 2] = 0, 1
    batch.logits[:, 1] = torch.nan
    with emulate(target):
        assert fused("triton")(*batch).isfinite().all()
    mutated(change_arguments=score_all)
    with emulate(target):
        assert fused("triton")(*batch).isnan().all()


def test_memory_of_others_is_caught():
    step = "add.s64 %rd0, %rd0, {}; ld.global.b32 %r1, [%rd0];"
    run_ptx(step.format(0))
    with pytest.raises(MemoryError, match="outside"):
        run_ptx(step.format(4))  # the last thread's word is beyond the end
    with pytest.raises(MemoryError, match="misaligned"):
        run_ptx(step.format(2))


SHARED = """shl.b32 %r1, %r0, 2;
    mov.b32 %r2, global_smem;
    add.s32 %r1, %r1, %r2;
    xor.b32 %r3, %r1, 128;"""  # the same lane of the other warp


@pytest.mark.parametrize("schedule", ["lockstep", "warps"])
def test_shared_memory_is_checked(schedule):
    options = dict(threads=64, shared=256, schedule=schedule)
    store, load = "st.shared.b32 [%r1], %r0;", "ld.shared.b32 %r4, [%r3];"
    keep = "st.global.b32 [%rd0], %r4;"
    out = run_ptx(f"{SHARED} {store} bar.sync 0; {load} {keep}", **options)
    assert (out[:, 0] == np.arange(64) ^ 32).all()
    with pytest.raises(MemoryError, match=r"without a barrier|before anything"):
        run_ptx(f"{SHARED} {store} {load}", **options)
    # Together: read, then overwritten. Apart: the first warp overwrites before the other reads.
    with pytest.raises(MemoryError, match=r"has read is overwritten|write is read without"):
        run_ptx(f"{SHARED} {store} bar.sync 0; {load} {store}", **options)
    with pytest.raises(MemoryError, match="two warps write"):
        run_ptx(f"{SHARED} and.b32 %r1, %r1, 127; {store}", **options)
    with pytest.raises(MemoryError, match="before anything"):
        run_ptx(f"{SHARED} {load}", **options)
    with pytest.raises(MemoryError, match="outside of the 252 bytes"):
        run_ptx(f"{SHARED} {store}", **{**options, "shared": 252})


def test_threads_that_do_not_meet_are_caught():
    half = "setp.lt.u32 %p1, %r0, 32; @%p1 bra $skip; bar.sync 0; $skip:\n"
    with pytest.raises(RuntimeError, match="without the barrier"):
        run_ptx(half, threads=64)
    shuffle = "setp.lt.u32 %p1, %r0, 16; @%p1 shfl.sync.bfly.b32 %r1, %r0, 16, 31, -1;"
    with pytest.raises(RuntimeError, match="does not take part"):
        run_ptx(shuffle)


def test_unwritten_registers_are_nan():
    out = run_ptx("add.f32 %r1, %r9, 0f3F800000; st.global.b32 [%rd0], %r1;").view(np.float32)
    assert np.isnan(out).all()


@pytest.mark.parametrize(
    "instruction",
    ["frob.b32 %r1, %r0;", "add.rz.f32 %r1, %r1, %r1;", "bar.sync 1;", "ld.local.b32 %r1, [%rd0];",
     "mul.bf16x2 %r1, %r0, %r0;", "atom.global.exch.b32 %r1, [%rd0], %r0;"],
)  # fmt: skip
def test_an_unknown_instruction_fails_loudly(instruction):
    with pytest.raises(NotImplementedError, match="unknown"):
        run_ptx(instruction)


def test_what_is_not_ptx_fails_loudly():
    with pytest.raises(SyntaxError, match=r"no .entry"):
        ptx.parse("")
    with pytest.raises(SyntaxError, match="not declared"):
        run_ptx("mov.u32 %q1, 0;")
