"""PTX, as Triton's compiler writes it, parsed into a program."""

import re
from typing import NamedTuple

# Bits of a register by the type of its declaration; a predicate is one truth value.
REGISTER_BITS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "f32": 32, "f64": 64}


class Register(NamedTuple):
    name: str
    bits: int


class Special(NamedTuple):
    """%tid.x and its kin."""

    name: str


class Immediate(NamedTuple):
    bits: int  # of an integer, two's complement of any width; of 0f and 0d constants, their pattern
    is_float: bool


class Not(NamedTuple):
    """A predicate read negated."""

    register: Register


class Address(NamedTuple):
    base: "Register | Immediate"
    offset: int


class Vector(NamedTuple):
    elements: tuple["Operand", ...]


class Name(NamedTuple):
    """A label, or a parameter of the kernel."""

    name: str


Operand = Register | Special | Immediate | Not | Address | Vector | Name


class Instruction(NamedTuple):
    text: str
    opcode: str  # "ld.global.v4.b32"
    parts: tuple[str, ...]  # ("ld", "global", "v4", "b32")
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool

    @property
    def type(self) -> str:
        return self.parts[-1]


class Program(NamedTuple):
    name: str
    param_types: tuple[str, ...]
    num_threads: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]  # label -> index of the instruction that follows it

    @property
    def block_starts(self) -> frozenset[int]:
        """Where threads that went apart may meet again: every target of a branch."""
        return frozenset(
            self.labels[i.operands[0].name] for i in self.instructions if i.parts[0] == "bra"
        )


def parse(ptx: str) -> Program:
    """Parse the one kernel in the text. SyntaxError names a statement that is not understood."""
    header = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*)", ptx, re.S)
    if header is None:
        raise SyntaxError("no .entry in this PTX")
    name, params, rest = header.groups()
    threads = re.search(r"\.reqntid\s+([\d, ]+)", rest)
    if threads is None:
        raise SyntaxError(f"{name} has no .reqntid: how many threads a block has is not known")
    num_threads = 1
    for extent in threads[1].split(","):
        num_threads *= int(extent)

    registers: dict[str, int] = {}  # "%r" or "%r17" -> bits
    labels: dict[str, int] = {}
    instructions: list[Instruction] = []
    for statement in _statements(rest):
        if statement.endswith(":"):
            labels[statement[:-1]] = len(instructions)
        elif statement.startswith(".reg"):
            _, kind, names = statement.split(None, 2)
            for register in names.split(","):
                registers[register.split("<")[0].strip()] = _bits(kind.lstrip("."))
        elif not statement.startswith("."):
            instructions.append(_instruction(statement, registers))
    param_types = tuple(re.findall(r"\.param\s+\.(\w+)", params))
    return Program(name, param_types, num_threads, tuple(instructions), labels)


def _statements(rest: str) -> list[str]:
    """Statements, labels and declarations of the body, one space between words."""
    body = rest[rest.index("{") + 1 :].split("\t.section", 1)[0]
    body = re.sub(r"//[^\n]*|/\*.*?\*/", "", body, flags=re.S)
    body = re.sub(r"^\s*\.(loc|file|pragma)\b[^\n]*$", "", body, flags=re.M)
    pieces = re.split(r";|(?<=:)\s*\n", body)
    # Inline assembly opens scopes of its own; a brace that starts a statement is one of those.
    cleaned = (re.sub(r"^(?:[{}]\s*)+", "", " ".join(piece.split())) for piece in pieces)
    return [statement for statement in cleaned if statement]


def _bits(kind: str) -> int:
    return REGISTER_BITS.get(kind) or int(re.sub(r"\D", "", kind))


def _instruction(statement: str, registers: dict[str, int]) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", statement)
    if match is None:
        raise SyntaxError(f"not an instruction: {statement}")
    negated, guard, opcode, rest = match.groups()
    operands = tuple(_operand(text, registers) for text in _split(rest))
    return Instruction(
        text=statement,
        opcode=opcode,
        parts=tuple(re.split(r"\.|::", opcode)),
        operands=operands,
        guard=_register(guard, registers) if guard else None,
        negated=bool(negated),
    )


def _split(operands: str) -> list[str]:
    """Split at the commas that are outside of braces and brackets, and at a `|` between results."""
    pieces, depth, piece = [], 0, ""
    for character in operands:
        depth += (character in "{[") - (character in "}]")
        if character in ",|" and depth == 0:
            pieces.append(piece)
            piece = ""
        else:
            piece += character
    return [p.strip() for p in [*pieces, piece] if p.strip()]


def _operand(text: str, registers: dict[str, int]) -> Operand:
    if text.startswith("{"):
        return Vector(tuple(_operand(element, registers) for element in _split(text.strip("{} "))))
    if text.startswith("["):
        base, _, offset = (part.strip() for part in text.strip("[] ").partition("+"))
        if base[0] != "%" and base != "global_smem":
            return Name(base)
        where = _operand(base, registers)
        assert isinstance(where, Register | Immediate)
        return Address(where, int(offset or "0", 0))
    if text.startswith("!"):
        return Not(_register(text[1:], registers))
    if text == "global_smem":  # shared memory starts at address 0
        return Immediate(0, False)
    if text[:2] in ("0f", "0F", "0d", "0D"):
        return Immediate(int(text[2:], 16), True)
    if re.fullmatch(r"-?(?:0x[0-9a-fA-F]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0), False)
    if text.startswith("%") and ("." in text or text in ("%laneid", "%warpid")):
        return Special(text)
    if text.startswith("%") or text in registers:
        return _register(text, registers)
    return Name(text)


def _register(name: str, registers: dict[str, int]) -> Register:
    bits = registers.get(name) or registers.get(re.sub(r"\d+$", "", name))
    if bits is None:
        raise SyntaxError(f"register {name} is not declared")
    return Register(name, bits)
