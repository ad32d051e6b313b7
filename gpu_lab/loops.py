"""Loops of a program in machine code, found in its control flow rather than in its layout.

Compilers move rare blocks out of line and put latches before headers, so the lines between a label
and a branch back to it are not a loop. Here a loop is a natural one: a header that dominates a
branch back to it, and every block that reaches that branch without passing the header.
"""

import heapq
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Instruction(NamedTuple):
    opcode: str  # with its suffixes: "LDG.E.128", "v_exp_f32_e32"
    operands: str
    target: int | None  # index of the instruction that it may branch to
    falls_through: bool  # whether the next instruction may follow it


class Loop(NamedTuple):
    body: list[Instruction]
    hot: list[Instruction]  # of the blocks that every iteration passes: no branch skips them
    shortest: list[Instruction]  # of the way round the loop with the fewest instructions


class _Block(NamedTuple):
    first: int
    end: int  # one past the last instruction
    successors: list[int]


def streaming_loop(
    program: Sequence[Instruction], reads_memory: Callable[[Instruction], bool]
) -> Loop | None:
    """Return the largest loop that reads global memory and holds no smaller loop that does.

    So of a loop over rows around a loop over the tiles of a row, it is the latter; None where no
    loop reads memory.
    """
    blocks = _basic_blocks(program)
    dominators = _dominators(blocks)
    latches = _latches(blocks, dominators)
    bodies = {header: _body(header, tails, blocks) for header, tails in latches.items()}
    reading = {
        header: body
        for header, body in bodies.items()
        if any(map(reads_memory, _instructions(program, blocks, body)))
    }
    innermost = {
        header: body
        for header, body in reading.items()
        if not any(inner < body for inner in reading.values())
    }
    if not innermost:
        return None
    header = max(innermost, key=lambda h: len(_instructions(program, blocks, innermost[h])))
    body = innermost[header]
    always = set.intersection(*(dominators[tail] for tail in latches[header])) & body
    return Loop(
        _instructions(program, blocks, body),
        _instructions(program, blocks, always),
        _instructions(program, blocks, _shortest_way(header, latches[header], blocks, body)),
    )


def _shortest_way(header: int, tails: list[int], blocks: list[_Block], body: set[int]) -> set[int]:
    """Return the blocks from header to the first latch reached, by Dijkstra's algorithm."""
    waiting = [(blocks[header].end - blocks[header].first, header, {header})]
    seen: set[int] = set()
    while waiting:
        length, b, way = heapq.heappop(waiting)
        if b in tails:
            return way
        if b not in seen:
            seen.add(b)
            for successor in body.intersection(blocks[b].successors) - seen:
                size = blocks[successor].end - blocks[successor].first
                heapq.heappush(waiting, (length + size, successor, way | {successor}))
    raise AssertionError("a loop's body holds a way to its latch")


def _instructions(
    program: Sequence[Instruction], blocks: list[_Block], chosen: set[int]
) -> list[Instruction]:
    return [i for b in sorted(chosen) for i in program[blocks[b].first : blocks[b].end]]


def _basic_blocks(program: Sequence[Instruction]) -> list[_Block]:
    starts = {0}
    for i, instruction in enumerate(program):
        if instruction.target is not None:
            starts.add(instruction.target)
        if instruction.target is not None or not instruction.falls_through:
            starts.add(i + 1)
    firsts = sorted(i for i in starts if i < len(program))
    index = {first: b for b, first in enumerate(firsts)}
    blocks = []
    for first, end in zip(firsts, [*firsts[1:], len(program)], strict=True):
        last = program[end - 1]
        follows = [end] if last.falls_through else []
        if last.target is not None:
            follows.append(last.target)
        blocks.append(_Block(first, end, [index[i] for i in follows if i < len(program)]))
    return blocks


def _predecessors(blocks: list[_Block], reachable: set[int]) -> dict[int, list[int]]:
    predecessors: dict[int, list[int]] = {b: [] for b in reachable}
    for b in reachable:
        for successor in blocks[b].successors:
            predecessors[successor].append(b)
    return predecessors


def _reachable(blocks: list[_Block]) -> set[int]:
    seen: set[int] = set()
    waiting = [0] if blocks else []
    while waiting:
        b = waiting.pop()
        if b not in seen:
            seen.add(b)
            waiting += blocks[b].successors
    return seen


def _dominators(blocks: list[_Block]) -> dict[int, set[int]]:
    """Return, for each block that the entry reaches, the blocks on every path to it."""
    reachable = _reachable(blocks)
    predecessors = _predecessors(blocks, reachable)
    dominators = {b: set(reachable) for b in reachable}
    if reachable:
        dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for b in sorted(reachable - {0}):
            new = {b} | set.intersection(*(dominators[p] for p in predecessors[b]))
            changed |= new != dominators[b]
            dominators[b] = new
    return dominators


def _latches(blocks: list[_Block], dominators: dict[int, set[int]]) -> dict[int, list[int]]:
    """Return, for each loop header, the blocks that branch back to it."""
    latches: dict[int, list[int]] = {}
    for b, above in dominators.items():
        for successor in blocks[b].successors:
            if successor in above:
                latches.setdefault(successor, []).append(b)
    return latches


def _body(header: int, tails: list[int], blocks: list[_Block]) -> set[int]:
    predecessors = _predecessors(blocks, _reachable(blocks))
    body = {header}
    waiting = list(tails)
    while waiting:
        b = waiting.pop()
        if b not in body:
            body.add(b)
            waiting += predecessors[b]
    return body
