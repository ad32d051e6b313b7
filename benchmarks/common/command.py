"""What the benchmarks' commands share: options, facts of a run, refusals, files."""

import argparse
import importlib.metadata
import importlib.util
import secrets
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def parser(
    description: str, *, seed: int | None = None, device: bool = False, share: bool = False
) -> argparse.ArgumentParser:
    """A parser with the options of all benchmarks, and on demand those of some.

    Args:
        seed: the default one; None draws a fresh one in `check`.
    """
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    result.add_argument("--csv", type=Path, help="by default the machine's name in that folder")
    result.add_argument("--plot", type=Path, help="PNG; by default beside the CSV file")
    result.add_argument("--no-plot", action="store_true")
    by_default = "a fresh one" if seed is None else str(seed)
    result.add_argument("--seed", type=int, default=seed, help=f"by default {by_default}")
    if device:
        cuda = torch.cuda.is_available()
        result.add_argument("--device", default="cuda" if cuda else "cpu")
        result.add_argument("--backend", choices=["auto", "triton", "cpu", "torch"], default="auto")
    if share:
        result.add_argument("--share", type=float, nargs="+", help="of the rows scored, in (0, 1]")
    return result


def check(args: argparse.Namespace, complain: argparse.ArgumentParser) -> argparse.Namespace:
    """Draw a seed where none is given, and refuse what no benchmark can do."""
    if args.seed is None:
        args.seed = secrets.randbelow(2**31)
    if torch.device(getattr(args, "device", "cpu")).type not in ("cpu", "cuda"):
        complain.error(f"--device must be a cpu or cuda device, got {args.device}")
    if not all(0 < share <= 1 for share in getattr(args, "share", [])):
        complain.error("--share must be in (0, 1]")
    return args


def is_whole(args: argparse.Namespace, defaults: argparse.Namespace, *names: str) -> bool:
    """Whether these options are the defaults, so that the run's files may be published."""
    return all(getattr(args, name) == getattr(defaults, name) for name in names)


def output_paths(args: argparse.Namespace, name: str, whole: bool) -> tuple[Path, Path | None]:
    """Return where the CSV file and the plot go; git ignores the names that a partial run gets."""
    csv = args.csv or args.output / f"{name}{'' if whole else '.local'}.csv"
    return csv, None if args.no_plot else args.plot or csv.with_suffix(".png")


def require_bench_extra(args: argparse.Namespace, *packages: str) -> None:
    """Exit where these packages, or what a plot needs, are not installed."""
    needed = [*packages, *([] if args.no_plot else ["matplotlib"])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"{' and '.join(missing)} not found: pip install '.[bench]' in the repository"
            + (", or pass --no-plot" if missing == ["matplotlib"] else "")
        )


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions(*packages: str) -> dict[str, str]:
    return {name: version(name) for name in packages}


def command_line(script: str, argv: Sequence[str]) -> str:
    return shlex.join(["python", f"benchmarks/{script}.py", *argv])


def announce(facts: Mapping[str, object], descriptions: Mapping[str, str]) -> None:
    """Print what a whole run shares, and what its implementations are."""
    print(*(f"{name}: {value}" for name, value in facts.items()), "", sep="\n")
    print(*(f"{name}: {description}" for name, description in descriptions.items()), sep="\n")


def refuse(wrong: Sequence[str], consequence: str = "nothing is timed") -> int:
    """Print what is wrong; return the exit status."""
    print(f"wrong results, so {consequence}:", *wrong, sep="\n  ", file=sys.stderr)
    return 1


def print_not_run(not_run: Mapping[str, str], failures: Mapping[str, Sequence[str]] = {}) -> None:
    """Print who could not run, and what failed in which cases."""
    print()
    for name, reason in not_run.items():
        print(f"not run: {name}: {reason}")
    for what, where in failures.items():
        print(f"not run: {what}: {len(where)} times, at first with {where[0]}")
