"""The docstrings of this project as reStructuredText.

A docstring has paragraphs in plain English with `code` in them, indented formulas and tables, and
sections: Args and Raises have items, "name, name: description", with further lines indented.
"""

import re
from collections.abc import Iterator
from itertools import groupby

SECTION = re.compile(r"(Args|Returns|Raises|Source):(?: (.*))?$")
HAS_ITEMS = ("Args", "Raises")


def to_restructured_text(lines: list[str]) -> list[str]:
    section = ""
    out = []
    for block in _blocks(lines):
        heading = SECTION.match(block[0])
        if heading:
            section, rest = heading[1], heading[2]
            out += [f"**{section}**", ""]
            body = [rest, *block[1:]] if rest else block[1:]
            out += _items(body) if section in HAS_ITEMS else [_prose(body), ""]
        elif all(line.startswith("    ") for line in block):
            # Formulas stand by themselves, further paragraphs of a section do not.
            out += [_prose(block), ""] if section in ("Returns", "Source") else _literal(block)
        else:
            section = ""
            out += _paragraphs(block)
    return out


def _blocks(lines: list[str]) -> list[list[str]]:
    """Runs of lines that are not empty."""
    return [list(run) for is_text, run in groupby(lines, lambda x: bool(x.strip())) if is_text]


def _paragraphs(block: list[str]) -> Iterator[str]:
    for is_indented, run in groupby(block, lambda line: line.startswith("    ")):
        lines = list(run)
        yield from _literal(lines) if is_indented else [_prose(lines), ""]


def _items(lines: list[str]) -> list[str]:
    """A definition list; an item begins at the least indentation and may wrap within its names."""
    items: list[list[str]] = []
    for line in lines:
        if line.startswith("     ") and items:
            items[-1].append(line)
        else:
            items.append([line])
    out = []
    for item in items:
        names, _, text = " ".join(line.strip() for line in item).partition(": ")
        out += [_escaped(names), f"    {_escaped(text)}", ""]
    return out


def _literal(block: list[str]) -> list[str]:
    return [".. code-block:: text", "", *block, ""]


def _prose(lines: list[str]) -> str:
    return _escaped(" ".join(line.strip() for line in lines))


def _escaped(text: str) -> str:
    """Outside of `code`, signs that would be markup."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*|_\\])", r"\\\1", part) for part in parts[::2]]
    return "``".join(parts)
