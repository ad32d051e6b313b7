"""Files of pairs, tokenised once into a folder."""

import datetime
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..precompute import tokenizer_fingerprint
from ._formats import Pair, parse_pair
from ._reading import read_texts
from ._store import TokenRows, TokenWriter, made_from
from ._tokenising import PairTokenizer

FORMAT = 1
BATCH = 1000  # pairs that are tokenised at once
PROBE = "a b"


def tokenise_files(
    paths: Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    tokenizer: Any,
    *,
    max_length: int,
    vocab_size: int | None = None,
    limit: int | None = None,
    skip_bad_rows: bool = False,
    date: datetime.date | None = None,
    progress: bool = True,
) -> TokenRows:
    """Pairs of files as tokens, from or to a folder.

    Rows are read, tokenised and written a thousand at a time: memory does not grow with their
    number. The folder holds hashes of the files and of what decides the tokens; where all of them
    are the same it is opened, so that a run that is resumed has the tokens it began with, whatever
    date its chat template would print by now. Else it is written anew.

    Args:
        paths: files of pairs, see `parse_pair` and `read_texts` for their forms.
        folder: for the tokens, 5 bytes each, and 50 bytes a row.
        tokenizer, max_length, vocab_size, date: see `PairTokenizer`.
        limit: pairs that are read of each file; None: all.
        skip_bad_rows: leave out rows that cannot be used, and count them in the report; else the
            first one is an error.
        progress: show a progress bar over the bytes of the files.

    Returns:
        TokenRows with a report of what was cut, empty and left out.

    Raises:
        ValueError: a row that cannot be used, by file and line; no pair at all.
        OSError: a file or folder that cannot be read or written.
        ModuleNotFoundError: with progress, tqdm is not installed.
    """
    files = [Path(path) for path in paths]
    source = dict(
        format=FORMAT,
        files=[file_hash(path) for path in files],
        tokenizer=tokenizer_fingerprint(tokenizer),
        vocabulary=len(tokenizer.get_vocab()),  # added tokens too
        probe=[int(i) for i in tokenizer(PROBE).input_ids],
        max_length=max_length,
        vocab_size=vocab_size,
        limit=limit,
        skip_bad_rows=skip_bad_rows,
    )
    folder = Path(folder)
    if made_from(folder) != source:
        encode = PairTokenizer(tokenizer, max_length=max_length, vocab_size=vocab_size, date=date)
        _write(files, folder, encode, limit, skip_bad_rows, progress, source)
    return TokenRows(folder)


def _write(
    files: Sequence[Path],
    folder: Path,
    encode: PairTokenizer,
    limit: int | None,
    skip_bad_rows: bool,
    progress: bool,
    source: dict[str, Any],
) -> None:
    writer = TokenWriter(folder, [str(path) for path in files])
    try:
        for number, path in enumerate(files):
            read = _read(path, progress)
            left = limit
            # Bad rows do not count towards the limit: read on until it is reached.
            while left is None or left > 0:
                batch = list(itertools.islice(read, BATCH if left is None else min(BATCH, left)))
                if not batch:
                    break
                pairs = [pair for pair in batch if isinstance(pair, Pair)]
                results = iter(encode(pairs))
                for pair in batch:
                    result = next(results) if isinstance(pair, Pair) else pair
                    if isinstance(result, ValueError) and not skip_bad_rows:
                        raise result
                    if isinstance(result, ValueError):
                        writer.leave_out(str(result))
                    else:
                        writer.add(number, result)
                        left = None if left is None else left - 1
        if writer.report.pairs == 0:
            bad = f": {writer.report.bad_reasons[0]}" if writer.report.bad else ""
            raise ValueError(f"no pairs in {', '.join(map(str, files))}{bad}")
        writer.finish(source)
    except BaseException:
        writer.discard()
        raise


def _read(path: Path, progress: bool) -> Iterator[Pair | ValueError]:
    """Each row's pair, or what is wrong with it."""
    with open(path, "rb") as file, _bar(progress, path) as bar:
        for source, text in read_texts(file, str(path)):
            bar.update(file.tell() - bar.n)
            try:
                yield parse_pair(source, text)
            except ValueError as error:
                yield error


def _bar(progress: bool, path: Path) -> Any:
    try:
        from tqdm import tqdm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("tokenise_files needs tqdm: pip install tqdm") from error
    size = path.stat().st_size
    return tqdm(total=size, unit="B", unit_scale=True, desc=path.name, disable=not progress)


def file_hash(path: str | os.PathLike[str]) -> str:
    """BLAKE2 of a file's content, 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
