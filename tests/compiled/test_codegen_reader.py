"""The reader of machine code sees in small kernels what is known to be there; no GPU is needed.

Run in a process without TRITON_INTERPRET=1: the interpreter and the compiler exclude each other.
"""

from functools import cache

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gpu_lab import amdgcn, sass
from gpu_lab.codegen import Codegen, inspect
from gpu_lab.devices import B200, H100, H200, MI300X
from gpu_lab.loops import Instruction, streaming_loop
from gpu_lab.model import modelled_time

TARGETS = {f"sm_{sm}": GPUTarget("cuda", sm, 32) for sm in (80, 90, 100)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
BLOCK = 2048


@triton.jit
def copy_kernel(src_ptr, dst_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(dst_ptr + i, tl.load(src_ptr + i, mask=i < n), mask=i < n)


# BLOCK values live in one warp's registers through a loop.
@triton.jit
def square_kernel(src_ptr, dst_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(src_ptr + i)
    shift = 0.0
    for _ in range(n):
        x = x * x + shift
        shift *= 0.5
    tl.store(dst_ptr + i, x)


# Sum of exp2 over a row; NUM_EXP2 a logit. RARE: one tile of the row changes the element y first.
@triton.jit
def sum_exp2_kernel(
    src_ptr,
    dst_ptr,
    n,
    y,
    NUM_EXP2: tl.constexpr,
    RARE: tl.constexpr,
    SUM_IN_LOOP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    total = 0.0 if SUM_IN_LOOP else tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(src_ptr + i).to(tl.float32)
        if RARE and (y >= start) & (y < start + BLOCK):
            x = tl.where(i == y, -float("inf"), x)
        e = tl.exp2(x)
        if NUM_EXP2 == 2:
            e += tl.exp2(0.5 * x)
        total += tl.sum(e) if SUM_IN_LOOP else e
    tl.store(dst_ptr, tl.sum(total) if not SUM_IN_LOOP else total)


def compiled(fn, signature, constexprs, target, *, divisible=(), num_warps=4):
    source = ASTSource(
        fn,
        signature | dict.fromkeys(constexprs, "constexpr"),
        constexprs,
        {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    return triton.compile(source, target=TARGETS[target], options=dict(num_warps=num_warps))


@cache
def copy_codegen(target: str, divisible: tuple[str, ...]) -> Codegen:
    signature = dict(src_ptr="*bf16", dst_ptr="*bf16", n="i32")
    kernel = compiled(copy_kernel, signature, dict(BLOCK=BLOCK), target, divisible=divisible)
    return inspect(kernel, TARGETS[target])


@cache
def sum_exp2_codegen(
    target: str, *, num_exp2: int = 1, rare: bool = False, sum_in_loop: bool = False
) -> Codegen:
    signature = dict(src_ptr="*bf16", dst_ptr="*fp32", n="i32", y="i32")
    constexprs = dict(NUM_EXP2=num_exp2, RARE=rare, SUM_IN_LOOP=sum_in_loop, BLOCK=BLOCK)
    kernel = compiled(
        sum_exp2_kernel, signature, constexprs, target, divisible=("src_ptr", "dst_ptr", "n")
    )
    return inspect(kernel, TARGETS[target])


@pytest.mark.parametrize("target", TARGETS)
def test_access_width_follows_divisibility(target):
    wide = copy_codegen(target, ("src_ptr", "dst_ptr", "n"))
    narrow = copy_codegen(target, ())
    assert set(wide.access_bits["load"]) == set(wide.access_bits["store"]) == {128}
    assert set(narrow.access_bits["load"]) == set(narrow.access_bits["store"]) == {16}
    threads = wide.num_warps * wide.warp_size
    for kernel in (wide, narrow):
        for counts in kernel.access_bits.values():
            assert sum(bits * n for bits, n in counts.items()) * threads == 16 * BLOCK


@pytest.mark.parametrize("target", TARGETS)
def test_a_kernel_without_a_loop_is_taken_whole(target):
    kernel = copy_codegen(target, ())
    assert not kernel.has_loop
    assert kernel.loop_instructions.total() == kernel.num_instructions
    assert kernel.hot_loop_instructions == kernel.loop_instructions


@pytest.mark.parametrize("target", TARGETS)
def test_spills(target):
    signature = dict(src_ptr="*fp32", dst_ptr="*fp32", n="i32")
    is_nvidia = TARGETS[target].backend == "cuda"
    block = 256 * 32 if is_nvidia else 512 * 64  # a thread has 255 registers, or 512
    kernel = compiled(
        square_kernel,
        signature,
        dict(BLOCK=block),
        target,
        divisible=("src_ptr", "dst_ptr"),
        num_warps=1,
    )
    spilling = inspect(kernel, TARGETS[target])
    assert spilling.spills > 10
    assert spilling.stack_bytes >= 40
    assert spilling.registers == (255 if is_nvidia else 512)
    frugal = copy_codegen(target, ())
    assert (frugal.spills, frugal.stack_bytes) == (0, 0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("num_exp2", [1, 2])
def test_exp2_per_logit(target, num_exp2):
    kernel = sum_exp2_codegen(target, num_exp2=num_exp2)
    assert kernel.has_loop
    logits = kernel.loop_load_bytes // 2
    assert logits % BLOCK == 0  # more than one tile where the compiler unrolled
    assert kernel.exp2_per_logit(logits) == num_exp2
    assert kernel.exp2_per_logit(logits, hot=True) == num_exp2
    assert kernel.pipe_cycles(logits)["mufu"] == 8.0 * num_exp2  # 4 lanes of 32 or 64 a cycle
    assert 2 < kernel.instructions_per_logit(logits) < 12


@pytest.mark.parametrize("target", TARGETS)
def test_hot_instructions_leave_out_a_rare_tile(target):
    rare = sum_exp2_codegen(target, rare=True)
    hot = rare.instructions_per_logit(BLOCK, hot=True)
    assert hot + 1.5 < rare.instructions_per_logit(BLOCK)  # a comparison and a select a logit
    assert hot < sum_exp2_codegen(target).instructions_per_logit(BLOCK) + 1.5
    assert rare.exp2_per_logit(BLOCK, hot=True) == 1


@pytest.mark.parametrize("target", TARGETS)
def test_barriers_in_loop(target):
    assert sum_exp2_codegen(target).barriers_in_loop == 0
    summing = sum_exp2_codegen(target, sum_in_loop=True)
    assert summing.barriers_in_loop >= 1
    assert summing.shared_bytes >= 4 * summing.num_warps


@pytest.mark.parametrize(
    ("target", "registers", "shared_bytes", "num_warps", "expected"),
    [
        ("sm_90", 32, 0, 4, (1.0, "warps")),  # 1024 registers a warp: all 64 warps
        ("sm_90", 64, 0, 8, (0.5, "registers")),  # 2048 a warp: 32 warps
        ("sm_90", 65, 0, 4, (28 / 64, "registers")),  # 2080 is 2304: 28.4 warps, 28 in fours
        ("sm_90", 168, 0, 8, (8 / 64, "registers")),  # 5376: 12 warps, one block of 8
        ("sm_90", 32, 100 << 10, 4, (8 / 64, "shared memory")),  # 228 KiB hold two of 101
        ("sm_90", 32, 0, 1, (0.5, "blocks")),  # 32 blocks of one warp
        ("sm_80", 32, 40 << 10, 8, (32 / 64, "shared memory")),  # 164 KiB hold four of 41
        ("sm_86", 40, 0, 8, (1.0, "warps")),  # 1280: 48 of 51 warps
        ("sm_86", 41, 0, 8, (40 / 48, "registers")),  # 1312 is 1536: 42, five blocks of 8
        ("sm_89", 32, 0, 1, (24 / 48, "blocks")),
        ("sm_100", 255, 0, 4, (8 / 64, "registers")),
        ("sm_120", 32, 49 << 10, 4, (8 / 48, "shared memory")),  # 100 KiB hold two of 50
    ],
)
def test_occupancy(target, registers, shared_bytes, num_warps, expected):
    found = sass.occupancy(
        target, registers=registers, shared_bytes=shared_bytes, num_warps=num_warps
    )
    assert found == expected


@pytest.mark.parametrize(
    ("target", "waves_by_registers", "shared_bytes", "num_warps", "expected"),
    [
        ("gfx942", 8, 0, 4, (1.0, "warps")),
        ("gfx942", 5, 0, 8, (16 / 32, "registers")),  # 20 waves hold two blocks of 8
        ("gfx942", 8, 32 << 10, 4, (8 / 32, "shared memory")),
        ("gfx950", 8, 32 << 10, 4, (20 / 32, "shared memory")),
    ],
)
def test_occupancy_amd(target, waves_by_registers, shared_bytes, num_warps, expected):
    found = amdgcn.occupancy(
        target,
        waves_by_registers=waves_by_registers,
        shared_bytes=shared_bytes,
        num_warps=num_warps,
    )
    assert found == expected


def test_what_does_not_fit_or_is_not_known_raises():
    with pytest.raises(ValueError, match="too many for its registers"):
        sass.occupancy("sm_90", registers=255, shared_bytes=0, num_warps=32)
    with pytest.raises(ValueError, match="sm_75"):
        sass.occupancy("sm_75", registers=32, shared_bytes=0, num_warps=4)
    with pytest.raises(ValueError, match="gfx1100"):
        amdgcn.occupancy("gfx1100", waves_by_registers=8, shared_bytes=0, num_warps=4)
    with pytest.raises(ValueError, match="HGMMA"):
        sass.pipe_cycles("HGMMA.64x64x16.F32.BF16", "sm_90")
    kernel = compiled(
        copy_kernel,
        dict(src_ptr="*bf16", dst_ptr="*bf16", n="i32"),
        dict(BLOCK=BLOCK),
        "gfx942",
    )
    with pytest.raises(ValueError, match="looked for cubin"):
        inspect(kernel, TARGETS["sm_90"])
    with pytest.raises(ValueError, match="gfx1100"):
        inspect(kernel, GPUTarget("hip", "gfx1100", 32))
    with pytest.raises(ValueError, match="got xpu"):
        inspect(kernel, GPUTarget("xpu", "pvc", 32))
    with pytest.raises(ValueError, match="positive"):
        copy_codegen("sm_90", ()).instructions_per_logit(0)


def test_text_that_lacks_what_is_read_raises():
    section = '\t.section\t.text.kernel,"ax",@progbits\n'
    for listing in ("", section, section + "        /*0000*/       BRA `(.L_x_9) ;\n"):
        with pytest.raises(ValueError, match="nvdisasm: looked for"):
            sass.parse_listing(listing)
    with pytest.raises(ValueError, match="cuobjdump: looked for"):
        sass.parse_usage("Resource usage:\n")
    with pytest.raises(ValueError, match="vgpr_count"):
        amdgcn.parse("\ts_endpgm\n")


def instruction(opcode: str, target: int | None = None, *, falls_through: bool = True):
    return Instruction(opcode, "", target, falls_through)


def opcodes(instructions):
    return [i.opcode for i in instructions]


def test_streaming_loop_is_found_in_the_control_flow():
    """A loop over rows holds one over tiles, whose rare block lies after the end of both."""
    program = [
        instruction("rows"),  # 0
        instruction("load tile"),  # 1
        instruction("if rare", 7),  # 2
        instruction("add"),  # 3
        instruction("next tile", 1),  # 4
        instruction("next row", 0),  # 5
        instruction("exit", falls_through=False),  # 6
        instruction("rare"),  # 7
        instruction("back", 3, falls_through=False),  # 8
    ]
    loop = streaming_loop(program, lambda i: i.opcode.startswith("load"))
    assert loop is not None
    assert opcodes(loop.body) == ["load tile", "if rare", "add", "next tile", "rare", "back"]
    assert opcodes(loop.hot) == ["load tile", "if rare", "add", "next tile"]
    assert streaming_loop(program, lambda i: i.opcode == "exit") is None


def streaming(device=H100, *, num_bytes=2e9, instructions=4.0, pipes=None):
    return modelled_time(
        device,
        num_bytes=num_bytes,
        num_logits=1e9,
        instructions_per_logit=instructions,
        pipe_cycles_per_32_logits=pipes or {},
    )


def test_memory_bound_time_is_that_of_the_bytes():
    once, twice = streaming(), streaming(num_bytes=4e9)
    assert once.binding == twice.binding == "memory"
    assert twice.seconds == pytest.approx(2 * once.seconds)
    assert once.seconds == pytest.approx(2e9 / (0.9 * 3.35e12))
    assert streaming(B200).seconds < streaming(H200).seconds < streaming(H100).seconds


def test_binding_resource_flips():
    busy = streaming(instructions=40.0)
    assert busy.binding == "issue slots"
    assert busy.seconds == pytest.approx(1e9 / 32 * 40 / (132 * 4 * 1.98e9))
    assert busy.all_seconds["memory"] == streaming().seconds
    slow = streaming(pipes={"mufu": 80.0, "alu": 30.0})
    assert slow.binding == "special functions"
    assert slow.seconds == pytest.approx(2 * busy.seconds)
    assert set(slow.all_seconds) == {"memory", "issue slots", "special functions", "integer"}


def test_a_wave_of_64_fills_a_simd_for_four_cycles():
    """MI300X: at one vector instruction a logit, 304 * 64 lanes each take a logit a cycle."""
    cycles = 32 / 64 * amdgcn.pipe_cycles("v_fma_f32", "gfx942")["valu"]
    busy = streaming(MI300X, num_bytes=0, instructions=1.0, pipes={"valu": cycles})
    assert busy.binding == "vector ALU"
    assert busy.seconds == pytest.approx(1e9 / (304 * 64 * 2.1e9))


def test_modelled_time_refuses_nonsense():
    with pytest.raises(ValueError, match="pipes must be of"):
        streaming(pipes={"mufo": 1.0})
    with pytest.raises(ValueError, match="negative"):
        streaming(num_bytes=-1.0)
