"""One run of a benchmark: options, facts, who takes part, refusals, files."""

import argparse
import importlib.metadata
import importlib.util
import secrets
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import goals, measure, report
from benchmarks.common.peers import P, collect

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# Options that take nothing from what is measured.
OF_THE_FILES = ("output", "csv", "no_plot", "seed", "device")

ParseArgs = Callable[[list[str]], argparse.Namespace]


def parser(
    description: str, *, seed: int | None = None, device: bool = False, share: bool = False
) -> argparse.ArgumentParser:
    """A parser with the options of all benchmarks, and on demand those of some.

    Args:
        seed: the default one; None draws a fresh one.
    """
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    result.add_argument("--csv", type=Path, help="by default the machine's name in that folder")
    result.add_argument("--no-plot", action="store_true")
    by_default = "a fresh one" if seed is None else str(seed)
    default = secrets.randbelow(2**31) if seed is None else seed
    result.add_argument("--seed", type=int, default=default, help=f"by default {by_default}")
    if device:
        cuda = torch.cuda.is_available()
        result.add_argument("--device", default="cuda" if cuda else "cpu")
        result.add_argument("--backend", choices=["auto", "triton", "cpu", "torch"], default="auto")
    if share:
        result.add_argument("--share", type=float, nargs="+", help="of the rows scored, in (0, 1]")
    return result


def check(
    args: argparse.Namespace, complain: argparse.ArgumentParser, **least: int
) -> argparse.Namespace:
    """Refuse what no benchmark can do.

    Args:
        least: of options that are a number or some.
    """
    if torch.device(getattr(args, "device", "cpu")).type not in ("cpu", "cuda"):
        complain.error(f"--device must be a cpu or cuda device, got {args.device}")
    if not all(0 < share <= 1 for share in getattr(args, "share", [])):
        complain.error("--share must be in (0, 1]")
    for name, lowest in least.items():
        given = getattr(args, name)
        if min(given if isinstance(given, list) else [given], default=lowest) < lowest:
            complain.error(f"--{name.replace('_', '-')} must be {lowest} or more, got {given}")
    return args


def is_whole(argv: list[str], parse_args: ParseArgs) -> bool:
    """Whether all is measured that is by default, so that the run's files may be published."""
    given, defaults = (vars(parse_args(options)) for options in (argv, []))
    return all(given[name] == defaults[name] for name in given if name not in OF_THE_FILES)


class Run:
    """One run of a benchmark, from its options to its files."""

    def __init__(
        self,
        script: str,
        parse_args: ParseArgs,
        argv: list[str] | None,
        *needed: str,
        device: torch.device | None = None,
    ) -> None:
        """Exit where packages that are needed, or what a plot needs, are not installed.

        Args:
            device: that is measured; by default the option of that name, or the CPU.
        """
        self.script, self.argv = script, sys.argv[1:] if argv is None else argv
        self.args = parse_args(self.argv)
        self.is_whole = is_whole(self.argv, parse_args)
        require(*needed, *([] if self.args.no_plot else ["matplotlib"]))
        self.device = device or torch.device(getattr(self.args, "device", "cpu"))
        if self.device.index is not None:
            torch.cuda.set_device(self.device)
        self.machine = measure.machine_name(self.device)
        self.descriptions: dict[str, str] = {}  # of who runs
        self.not_run: dict[str, str] = {}  # name -> reason
        self.failures: dict[str, list[str]] = {}  # what happened -> in which cases
        self.facts: dict[str, object] = {}  # that stand beside every row
        self.others = measure.OtherLoad()

    def collect(self, candidates: Iterable[P]) -> list[P]:
        """Return those that can run; the others go to `not_run`."""
        runnable, not_run = collect(candidates)
        self.descriptions |= {peer.name: peer.description for peer in runnable}
        self.not_run |= not_run
        return runnable

    def announce(self, *packages: str, **facts: object) -> None:
        """Print what the whole run shares, versions of packages too, and who runs."""
        self.facts = dict(
            machine=self.machine,
            **facts,
            **{name: version(name) for name in packages},
            seed=self.args.seed,
            command=shlex.join(["python", f"benchmarks/{self.script}.py", *self.argv]),
        )
        print(*(f"{name}: {fact}" for name, fact in self.facts.items()), "", sep="\n")
        print(*(f"{name}: {text}" for name, text in self.descriptions.items()), sep="\n")
        self.others = measure.OtherLoad()

    def refuse(self, wrong: Sequence[str], consequence: str = "nothing is timed") -> int:
        """Print what is wrong; return the exit status."""
        print(f"wrong results, so {consequence}:", *wrong, sep="\n  ", file=sys.stderr)
        return 1

    def conclude(self, notes: str = "") -> None:
        """Print who could not run, what failed in which cases, and how the figures are meant."""
        print()
        for name, reason in self.not_run.items():
            print(f"not run: {name}: {reason}")
        for what, where in self.failures.items():
            print(f"not run: {what}: {len(where)} times, at first with {where[0]}")
        print("", notes, sep="\n")
        print(f"other processes: {self.others.share():.0%} of the cores while this ran", end="\n\n")

    def judge(self, heading: str, judged: Sequence[goals.Goal], needed: str) -> None:
        print(goals.text(heading, judged, needed), end="\n\n")

    def paths(self, name: str) -> tuple[Path, Path | None]:
        """The CSV file and the plot beside it; git ignores the names that a partial run gets."""
        args = self.args
        csv = args.csv or args.output / f"{name}{'' if self.is_whole else '.local'}.csv"
        return csv, None if args.no_plot else csv.with_suffix(".png")

    def write(
        self,
        name: str,
        rows: Sequence[Any],
        plots: Mapping[str, Callable[[Path, Sequence[Any], str], None]] = {},
        others: Mapping[str, Sequence[Any]] = {},
    ) -> int:
        """Write the rows, other rows, and the plots; return the exit status.

        Args:
            name: of the files.
            plots: what follows the name -> what draws the rows, whose machine it is told, there.
            others: likewise rows of another kind, where there are any.
        """
        csv, png = self.paths(name)
        for suffix, some in {"": rows, **others}.items():
            if some:
                path = csv.with_name(f"{csv.stem}{suffix}.csv")
                report.write_csv(path, some, self.facts)
                print(f"rows: {path}")
        if png is not None:
            for suffix, draw in plots.items():
                path = png.with_name(f"{png.stem}{suffix}.png")
                draw(path, rows, self.machine)
                print(f"plot: {path}")
        return 0


def require(*packages: str) -> None:
    """Exit where one is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"{' and '.join(missing)} not found: pip install '.[bench,trl]' in the repository"
            + (", or pass --no-plot" if missing == ["matplotlib"] else "")
        )


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
