"""Fewer cases than all combinations: each value of a parameter meets each value of every other."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def pairwise(**values: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize a test by name; two values of two parameters are together in at least one case.

    A value may be a `pytest.param`: its case has its marks.
    """
    cases = [
        tuple(x if hasattr(x, "marks") else pytest.param(x) for x in case)
        for case in all_pairs(*values.values())
    ]
    parameters = [
        pytest.param(
            *(x.values[0] for x in case),
            marks=[mark for x in case for mark in x.marks],
            id="-".join(str(x.values[0]) for x in case),
        )
        for case in cases
    ]
    return pytest.mark.parametrize(tuple(values), parameters)


def all_pairs(*values: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Combinations of one value of each, the one with most new pairs first, until none is new."""
    combinations = list(itertools.product(*(range(len(x)) for x in values)))

    def pairs(combination: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(combination), 2))

    missing = set().union(*map(pairs, combinations))
    chosen = []
    while missing:
        best = max(combinations, key=lambda combination: len(pairs(combination) & missing))
        missing -= pairs(best)
        chosen.append(tuple(x[i] for x, i in zip(values, best, strict=True)))
    return chosen
