"""Rows of a file as text, one at a time: JSON lines or one JSON array, plain or gzip."""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ._formats import Pair, parse_pair

CHUNK = 1 << 20  # characters of a JSON array that are read at once
GZIP = b"\x1f\x8b"


def read_pairs(path: Path, limit: int | None = None) -> Iterator[Pair]:
    """Yield the first `limit` pairs of a file.

    Raises:
        ValueError: a row or a file that cannot be read, by file and line.
        OSError: no such file.
    """
    with open(path, "rb") as file:
        for number, (source, text) in enumerate(read_texts(file, str(path))):
            if number == limit:
                return
            yield parse_pair(source, text)


def read_texts(file: BinaryIO, name: str) -> Iterator[tuple[str, str | bytes]]:
    """Yield (source, JSON text) of each row; `source` is "name:line".

    What the file holds is seen from its content: gzip by its first two bytes, a JSON array by its
    first bracket; all else is JSON lines. A blank line is no row. At most one row is in memory, and
    of an array a megabyte.

    Args:
        file: open for reading bytes, at its beginning; `file.tell()` says how far one has come.
        name: of the file, for messages.

    Raises:
        ValueError: gzip that is cut or corrupt, an array that is no JSON, by file and line.
    """
    start = file.read(len(GZIP))
    file.seek(0)
    content: Any = gzip.GzipFile(fileobj=file) if start == GZIP else file
    reader = io.BufferedReader(content)
    try:
        try:
            is_array = reader.peek(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
            yield from (_elements if is_array else _lines)(reader, name)
        finally:
            reader.detach()  # the file is the caller's to close
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{name}: the gzip file is cut or corrupt ({error}); copy it anew"
        ) from error


def _lines(reader: "io.BufferedReader[Any]", name: str) -> Iterator[tuple[str, bytes]]:
    number = 0
    try:
        for number, line in enumerate(reader, start=1):
            if line.strip():
                yield f"{name}:{number}", line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{name}:{number + 1}: the gzip file is cut or corrupt here ({error}); copy it anew"
        ) from error


def _elements(reader: "io.BufferedReader[Any]", name: str) -> Iterator[tuple[str, str]]:
    """Of a JSON array: decode an element, and read on where it does not end in the buffer."""
    file = io.TextIOWrapper(reader, encoding="utf-8-sig")
    decoder = json.JSONDecoder()
    try:
        buffer, line = "", 1
        while "[" not in buffer:
            buffer += file.read(CHUNK)
        at = buffer.index("[") + 1
        line += buffer.count("\n", 0, at)
        while True:
            begin = len(buffer) - len(buffer[at:].lstrip(" \t\r\n,"))
            line += buffer.count("\n", at, begin)
            at = begin
            if buffer[at : at + 1] == "]":
                return
            try:
                _, end = decoder.raw_decode(buffer, at)
            except ValueError as error:
                more = file.read(max(CHUNK, len(buffer)))
                if not more:
                    raise ValueError(
                        f"{name}:{line}: the array must be JSON to its closing bracket: {error}"
                    ) from error
                buffer, at = buffer[at:] + more, 0
                continue
            yield f"{name}:{line}", buffer[at:end]
            line += buffer.count("\n", at, end)
            at = end
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}:{line}: the file must be UTF-8: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{name}:{line}: the row is nested too deep for JSON") from error
    finally:
        file.detach()
