"""What each PTX instruction does (PTX ISA 9.1, chapter 9), for those that Triton's kernels need.

An operation gets the machine, the instruction and the active threads (None: all of them).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .memory import NUMPY, UNSIGNED
from .ptx import Immediate, Instruction, Operand, Vector

if TYPE_CHECKING:
    from .machine import Machine

Active = np.ndarray | None
Operation = Callable[["Machine", Instruction, Active], None]
OPERATIONS: dict[str, Operation] = {}

SMALLEST_NORMAL = np.float32(2.0**-126)
WIDE = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
FLOATS = ("f16", "f32", "f64")


def operation(names: str, modifiers: str = "") -> Callable[[Operation], Operation]:
    """Register an operation; an instruction with a modifier that is not listed is an error."""
    known = set(modifiers.split())

    def register(function: Operation) -> Operation:
        def checked(m: Machine, i: Instruction, active: Active) -> None:
            if unknown := set(i.parts[1:-1]) - known:
                raise NotImplementedError(f"unknown .{min(unknown)} in: {i.text}")
            function(m, i, active)

        OPERATIONS.update(dict.fromkeys(names.split(), checked))
        return function

    return register


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 numbers become zeros of the same sign (.ftz)."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of bfloat16, to nearest even; NaN is 0x7fff as on a GPU."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z rounded once; in float64 with the 64 bits of an extended mantissa, not 106."""
    wide = np.float64 if x.dtype == np.float32 else np.longdouble
    return (x.astype(wide) * y.astype(wide) + z.astype(wide)).astype(x.dtype)


def elements(operand: Operand) -> tuple[Operand, ...]:
    return operand.elements if isinstance(operand, Vector) else (operand,)


# Arithmetic

ARITHMETIC = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": fma,
    "max": np.fmax, "min": np.fmin,
}  # fmt: skip


@operation("add sub mul fma max min", "rn ftz lo hi wide NaN f32")
def arithmetic(m: Machine, i: Instruction, active: Active) -> None:
    kind, function = i.type, ARITHMETIC[i.parts[0]]
    target, *sources = i.operands
    if kind == "f32x2" and i.parts[0] in ("add", "sub", "mul", "fma"):
        pairs = [split(m.read(source, "b64")) for source in sources]
        m.write(
            target, join([function(*half) for half in zip(*pairs, strict=True)], np.uint64), active
        )
        return
    if "f32" in i.parts[:-1] and i.parts[0] in (
        "add",
        "sub",
    ):  # a narrow first source, then float32
        first = (
            from_bfloat16(m.read(sources[0], "b16")) if kind == "bf16" else m.read(sources[0], kind)
        )
        m.write(target, function(first.astype(np.float32), m.read(sources[1], "f32")), active)
        return
    if kind not in NUMPY or "f32" in i.parts[:-1]:
        raise NotImplementedError(f"unknown instruction: {i.text}")
    if i.parts[0] == "mul" and kind not in FLOATS:
        m.write(target, product(m, i, *sources), active)
        return
    values = [m.read(source, kind) for source in sources]
    if "ftz" in i.parts:
        values = [flush(value) for value in values]
    if "NaN" in i.parts:
        function = {"max": np.maximum, "min": np.minimum}[i.parts[0]]
    result = function(*values[:2]) if i.parts[0] != "fma" else function(*values)
    for third in values[2:] if i.parts[0] in ("max", "min") else ():
        result = function(result, third)
    m.write(target, flush(result) if "ftz" in i.parts else result, active)


def product(m: Machine, i: Instruction, x: Operand, y: Operand) -> np.ndarray:
    kind = i.type
    if "lo" in i.parts:
        return m.read(x, kind) * m.read(y, kind)
    wide = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{2 * int(kind[1:]) // 8}")
    whole = m.read(x, kind).astype(wide) * m.read(y, kind).astype(wide)
    if "wide" in i.parts:
        return whole
    if "hi" in i.parts and kind in WIDE:
        return (whole >> wide.type(int(kind[1:]))).astype(m.read(x, kind).dtype)
    raise NotImplementedError(f"unknown instruction: {i.text}")


@operation("mad", "lo wide hi")
def multiply_add(m: Machine, i: Instruction, active: Active) -> None:
    target, x, y, z = i.operands
    addend = m.read(z, WIDE[i.type] if "wide" in i.parts else i.type)
    m.write(target, product(m, i, x, y) + addend, active)


@operation("div rem", "rn full approx ftz")
def divide(m: Machine, i: Instruction, active: Active) -> None:
    target, x, y = i.operands
    x, y = m.read(x, i.type), m.read(y, i.type)
    if i.type in FLOATS:
        result = x / y
    else:  # towards zero, as in C
        divisor = np.where(y == 0, y.dtype.type(1), y)
        remainder = np.fmod(x, divisor)
        result = (x - remainder) // divisor if i.parts[0] == "div" else remainder
        result = np.where(y == 0, ~x.dtype.type(0), result)
    m.write(target, flush(result) if "ftz" in i.parts else result, active)


def reciprocal(x: np.ndarray) -> np.ndarray:
    """rcp.approx.ftz.f64 gives the upper half of the bits only."""
    if x.dtype == np.float32:
        return np.float32(1) / x
    tiny = np.abs(x) < np.finfo(np.float64).tiny
    exact = 1.0 / np.where(tiny, np.copysign(0.0, x), x)
    return (exact.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)


UNARY = {
    "ex2": np.exp2, "lg2": np.log2, "rcp": reciprocal, "sqrt": np.sqrt, "tanh": np.tanh,
    "rsqrt": lambda x: x.dtype.type(1) / np.sqrt(x), "neg": np.negative, "abs": np.abs,
}  # fmt: skip


@operation("ex2 lg2 rcp sqrt rsqrt tanh neg abs", "approx rn ftz")
def unary(m: Machine, i: Instruction, active: Active) -> None:
    x = m.read(i.operands[1], i.type)
    ftz = "ftz" in i.parts and i.type == "f32"
    result = UNARY[i.parts[0]](flush(x) if ftz else x)
    m.write(i.operands[0], flush(result) if ftz else result, active)


# Bits and predicates

LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@operation("and or xor not")
def logic(m: Machine, i: Instruction, active: Active) -> None:
    target, *sources = i.operands
    if i.type == "pred":
        values = [m.read_predicate(source) for source in sources]
    else:
        values = [m.read(source, i.type) for source in sources]
    m.write(target, ~values[0] if i.parts[0] == "not" else LOGIC[i.parts[0]](*values), active)


@operation("shl shr")
def shift(m: Machine, i: Instruction, active: Active) -> None:
    target, x, distance = i.operands
    x, distance = m.read(x, i.type), m.read(distance, "u32")
    bits = 8 * x.dtype.itemsize
    function = np.left_shift if i.parts[0] == "shl" else np.right_shift
    shifted = function(x, np.minimum(distance, bits - 1).astype(x.dtype))
    beyond = np.right_shift(x, x.dtype.type(bits - 1)) if i.type[0] == "s" else np.zeros_like(x)
    m.write(target, np.where(distance >= bits, beyond, shifted).astype(x.dtype), active)


@operation("bfe")
def extract(m: Machine, i: Instruction, active: Active) -> None:
    """A field of bits, extended by its own sign for the signed types."""
    target, x, first, length = i.operands
    if not (isinstance(first, Immediate) and isinstance(length, Immediate) and length.bits > 0):
        raise NotImplementedError(f"unknown instruction: {i.text}")
    x = m.read(x, i.type)
    bits = 8 * x.dtype.itemsize
    above = x.dtype.type(bits - first.bits - length.bits)
    m.write(target, (x << above) >> x.dtype.type(bits - length.bits), active)


@operation("prmt")
def permute(m: Machine, i: Instruction, active: Active) -> None:
    """Each of four selectors picks one of eight bytes, or (its bit 3) repeats that byte's sign."""
    target, low, high, selector = i.operands
    both = join([m.read(low, "b32"), m.read(high, "b32")], np.uint64)
    selector, result = m.read(selector, "b32"), np.uint32(0)
    for k in range(4):
        pick = (selector >> np.uint32(4 * k)) & np.uint32(15)
        byte = (both >> ((pick & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        byte = np.where(pick & np.uint32(8), sign, byte).astype(np.uint32)
        result = result | (byte << np.uint32(8 * k))
    m.write(target, result, active)


COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
UNORDERED = {f"{name}u": name for name in COMPARE}  # true where either is NaN
UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


@operation("setp", " ".join([*COMPARE, *UNORDERED, *UNSIGNED_NAMES, "nan", "num", "ftz"]))
def compare(m: Machine, i: Instruction, active: Active) -> None:
    target, x, y = i.operands
    x, y, name = m.read(x, i.type), m.read(y, i.type), i.parts[1]
    if "ftz" in i.parts:
        x, y = flush(x), flush(y)
    either_nan = np.isnan(x) | np.isnan(y) if i.type in FLOATS else np.zeros((), np.bool_)
    if name in ("nan", "num"):
        result = either_nan if name == "nan" else ~either_nan
    elif name in UNORDERED:
        result = COMPARE[UNORDERED[name]](x, y) | either_nan
    else:
        result = COMPARE[UNSIGNED_NAMES.get(name, name)](x, y) & ~either_nan
    m.write(target, result, active)


@operation("selp")
def select(m: Machine, i: Instruction, active: Active) -> None:
    target, x, y, condition = i.operands
    chosen = np.where(m.read_predicate(condition), m.read(x, i.type), m.read(y, i.type))
    m.write(target, chosen, active)


# Moves and conversions


def join(words: list[np.ndarray], dtype: type) -> np.ndarray:
    """Words side by side in a wider one, the first in the low bits."""
    words = [np.asarray(word) for word in words]
    bits = 8 * words[0].dtype.itemsize
    unsigned = [word.view(UNSIGNED[word.dtype.itemsize]).astype(dtype) for word in words]
    result = unsigned[0]
    for k, word in enumerate(unsigned[1:], 1):
        result = result | (word << dtype(bits * k))
    return result


def split(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """64 bits to two float32, the low half first."""
    low = words.astype(np.uint32).view(np.float32)
    return low, (words >> np.uint64(32)).astype(np.uint32).view(np.float32)


@operation("mov")
def move(m: Machine, i: Instruction, active: Active) -> None:
    target, source = i.operands
    if isinstance(source, Vector):
        dtype = UNSIGNED[int(i.type[1:]) // 8]
        kind = f"b{int(i.type[1:]) // len(source.elements)}"
        m.write(target, join([m.read(e, kind) for e in source.elements], dtype), active)
    elif isinstance(target, Vector):
        whole = m.read(source, i.type)
        bits = int(i.type[1:]) // len(target.elements)
        for k, element in enumerate(target.elements):
            part = (whole >> whole.dtype.type(bits * k)).astype(UNSIGNED[bits // 8])
            m.write(element, part, active)
    elif i.type == "pred":
        m.write(target, m.read_predicate(source), active)
    else:
        m.write(target, m.read(source, i.type), active)


ROUND = {"rni": np.rint, "rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc}


@operation("cvt", "rn rz ftz sat rni rmi rpi rzi f16 f32 f64 bf16 bf16x2 f16x2 "
           "u8 u16 u32 u64 s8 s16 s32 s64")  # fmt: skip
def convert(m: Machine, i: Instruction, active: Active) -> None:
    to, source = i.parts[-2:]
    target, *operands = i.operands
    if "rz" in i.parts or ("sat" in i.parts and to in FLOATS):
        raise NotImplementedError(f"unknown instruction: {i.text}")
    if to in ("bf16x2", "f16x2"):  # the first source is the upper half
        narrow = to_bfloat16 if to == "bf16x2" else (lambda x: x.astype(np.float16))
        high, low = (narrow(m.read(o, "f32")) for o in operands)
        m.write(target, join([low, high], np.uint32), active)
        return
    if source == "bf16":
        x = from_bfloat16(m.read(operands[0], "b16"))
    else:
        x = m.read(operands[0], source)
    if "ftz" in i.parts:
        x = flush(x)
    rounding = next((ROUND[part] for part in i.parts if part in ROUND), None)
    if to == "bf16":
        result = to_bfloat16(x)
    elif to in FLOATS:
        result = (x if rounding is None else rounding(x)).astype(NUMPY[to])
    else:
        dtype = np.dtype(NUMPY[to])
        if source in (*FLOATS, "bf16"):  # out of range: the nearest integer; NaN: 0
            limits = np.iinfo(dtype)
            whole = np.nan_to_num(rounding(x).astype(np.float64), nan=0.0)
            clipped = np.clip(whole, float(limits.min), float(limits.max))
            result = np.where(
                clipped >= float(limits.max), dtype.type(limits.max), clipped.astype(dtype)
            )
        else:
            result = x.astype(dtype)
    m.write(target, result, active)


# Memory


CACHE_HINTS = "global shared cta v2 v4 v8 nc ca cg cs cv wb wt relaxed acquire release gpu sys " \
    "L1 L2 no_allocate evict_first evict_last evict_normal L2::cache_hint"  # fmt: skip


@operation("ld", f"param {CACHE_HINTS}")
def load(m: Machine, i: Instruction, active: Active) -> None:
    target, source = i.operands[:2]
    dtype = np.dtype(NUMPY[i.type])
    if i.parts[1] == "param":
        bits = m.parameter(source)
        m.write(target, bits.astype(UNSIGNED[dtype.itemsize]).view(dtype), active)
        return
    targets = elements(target)
    address = m.addresses(source, active)
    if i.parts[1] == "global":
        words = m.memory.load(address, dtype.itemsize, len(targets), i.text)
    elif i.parts[1] == "shared":
        block, warp = m.spread(m.block, active), m.spread(m.warp, active)
        words = m.shared.load(block, warp, address, dtype.itemsize, len(targets), i.text)
    else:
        raise NotImplementedError(f"unknown instruction: {i.text}")
    for element, word in zip(targets, m.gather(words, active), strict=True):
        m.write(element, word.view(dtype), active)


@operation("st", CACHE_HINTS)
def store(m: Machine, i: Instruction, active: Active) -> None:
    target, source = i.operands[:2]
    kind = f"b{i.type[1:]}"
    values = [np.ascontiguousarray(m.spread(m.read(e, kind), active)) for e in elements(source)]
    address = m.addresses(target, active)
    if i.parts[1] == "global":
        m.memory.store(address, values, i.text)
    elif i.parts[1] == "shared":
        m.shared.store(m.spread(m.block, active), m.spread(m.warp, active), address, values, i.text)
    else:
        raise NotImplementedError(f"unknown instruction: {i.text}")


@operation("red atom", "global relaxed acq_rel gpu sys add")
def reduce_in_memory(m: Machine, i: Instruction, active: Active) -> None:
    """Additions whose result nobody takes: what was there before depends on the order."""
    *result, target, source = i.operands
    if "add" not in i.parts or any(r != result[0] for r in result):
        raise NotImplementedError(f"unknown instruction: {i.text}")
    values = np.ascontiguousarray(m.spread(m.read(source, i.type), active))
    m.memory.add(m.addresses(target, active), values, i.text)


# Between the threads of a warp


@operation("shfl", "sync bfly idx up down")
def shuffle(m: Machine, i: Instruction, active: Active) -> None:
    """Read a register of another lane (PTX ISA 9.7.9.6): clamp and segment come packed."""
    target, *is_inside, source, distance, clamp, _ = i.operands
    assert isinstance(clamp, Immediate)
    segment, limit = (clamp.bits >> 8) & 31, clamp.bits & 31
    first = m.lane & segment
    last = first | (limit & ~segment)
    k = m.read(distance, "s32").astype(np.int64)
    other = {
        "bfly": m.lane ^ k,
        "idx": first | (k & ~segment & 31),
        "up": m.lane - k,
        "down": m.lane + k,
    }[i.parts[2]]
    inside = other >= first if i.parts[2] == "up" else other <= last
    other = np.where(inside, other, m.lane) + (np.arange(m.num_lanes) - m.lane)
    if active is not None and not active[other][active].all():
        raise RuntimeError(f"a lane reads from one that does not take part: {i.text}")
    value = np.broadcast_to(m.read(source, "b32"), m.num_lanes)
    m.write(target, value[other], active)
    for predicate in is_inside:
        m.write(predicate, inside, active)


REDUCE = {
    "add": np.add, "max": np.fmax, "min": np.fmin, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip


@operation("redux", "sync add max min and or xor NaN")
def reduce_warp(m: Machine, i: Instruction, active: Active) -> None:
    target, source, _ = i.operands
    warps = np.broadcast_to(m.read(source, i.type), m.num_lanes).reshape(-1, 32)
    takes_part = np.ones_like(warps, np.bool_) if active is None else active.reshape(-1, 32)
    if (takes_part.any(1) & ~takes_part.all(1)).any():
        raise RuntimeError(f"some lanes of a warp do not take part: {i.text}")
    function = REDUCE[i.parts[2]]
    if "NaN" in i.parts:
        function = {"max": np.maximum, "min": np.minimum}[i.parts[2]]
    reduced = function.reduce(warps, axis=1, dtype=warps.dtype)
    m.write(target, np.repeat(reduced, 32), active)


# Matrices of 8 rows of 16 bytes in shared memory; lane 8 q + r holds the address of row r of matrix
# q, and lane l gets (or gives) word l % 4 of row l // 4; transposed, column l // 4 of two rows.


def _matrix_words(m: Machine, i: Instruction, address: np.ndarray, q: int) -> list[np.ndarray]:
    first_lane = np.arange(m.num_lanes) - m.lane + 8 * q
    if "trans" not in i.parts:
        return [address[first_lane + m.lane // 4] + 4 * (m.lane % 4)]
    rows = [first_lane + 2 * (m.lane % 4) + k for k in range(2)]
    return [address[row] + 2 * (m.lane // 4) for row in rows]


@operation("ldmatrix stmatrix", "sync aligned m8n8 x1 x2 x4 trans shared cta")
def move_matrix(m: Machine, i: Instruction, active: Active) -> None:
    if active is not None and not np.array_equal(active, np.repeat(active[::32], 32)):
        raise RuntimeError(f"some lanes of a warp do not take part: {i.text}")
    is_load = i.parts[0] == "ldmatrix"
    registers, place = i.operands if is_load else i.operands[::-1]
    address = np.zeros(m.num_lanes, np.int64)
    address[slice(None) if active is None else active] = m.addresses(place, active)
    block, warp = m.spread(m.block, active), m.spread(m.warp, active)
    size = 2 if "trans" in i.parts else 4
    for q, register in enumerate(elements(registers)):
        places = [m.spread(where, active) for where in _matrix_words(m, i, address, q)]
        if is_load:
            words = [m.shared.load(block, warp, where, size, 1, i.text)[0] for where in places]
            m.write(register, join(m.gather(words, active), np.uint32), active)
            continue
        whole = m.spread(m.read(register, "b32"), active)
        for k, where in enumerate(places):
            word = (whole >> np.uint32(16 * k)).astype(UNSIGNED[size])
            m.shared.store(block, warp, where, [word], i.text)
