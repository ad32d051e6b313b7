"""Run what matters on the oldest, pinned and newest supported versions: `make test-versions`.

Each combination has an environment of its own in .venv-versions/, with a Python from PATH or pyenv.
It takes torch as the package index has it, a CUDA build on Linux of several gigabytes, which runs
without a GPU too. What came of it goes to docs/versions.csv.
"""

import argparse
import csv
import datetime
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "versions.csv"
ENVIRONMENTS = ROOT / ".venv-versions"


KEY = ("name", "python", "numpy", "tests", "machine")


class Combination(NamedTuple):
    python: str
    torch: str
    triton: str
    numpy: str


COMBINATIONS = {
    "oldest": Combination("3.10", "2.11.0", "3.6.0", "1.26.4"),
    "pinned": Combination("3.11", "2.13.0", "3.7.1", "2.4.6"),
    "newest": Combination("3.13", "2.15.0", "3.9.0", "2.5.5"),
}
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "mpmath", "numba", "tqdm", "matplotlib")
# Values, gradients and edges on both backends, torch.compile, compiled kernels, and the self-check.
TESTS = (
    "tests/test_values.py",
    "tests/test_edges.py",
    "tests/test_precision.py",
    "tests/test_invariance.py",
    "tests/test_stats.py",
    "tests/test_autograd.py",
    "tests/test_compile.py",
    "tests/test_linear_values.py",
    "tests/test_linear_edges.py",
    "tests/test_linear_compile.py",
    "tests/test_losses.py",
    "tests/test_losses_extremes.py",
    "tests/test_losses_errors.py",
    "tests/test_dpo_loss.py",
    "tests/test_dpo_loss_edges.py",
    "tests/test_dpo_loss_weights.py",
    "tests/test_dpo_loss_errors.py",
    "tests/test_dpo_mixtures.py",
    "tests/test_linear_dpo_loss.py",
    "tests/test_info.py",
    "tests/compiled",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"out of {', '.join(COMBINATIONS)}; all if none")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files or folders to run")
    parser.add_argument("--processes", default="auto", help="of pytest-xdist; 0 for none")
    arguments = parser.parse_args()
    failed = 0
    for name in arguments.names or COMBINATIONS:
        python = environment(name, COMBINATIONS[name])
        row = run(name, COMBINATIONS[name], python, arguments.tests, arguments.processes)
        write(row)
        print(row)
        failed += int(row["failed"])
    return 1 if failed else 0


def environment(name: str, versions: Combination) -> Path:
    """The combination's Python, in an environment that is made once."""
    folder = ENVIRONMENTS / name
    python, done = folder / "bin" / "python", folder / "-".join(versions)
    if not done.exists():
        subprocess.run([find_python(versions.python), "-m", "venv", "--clear", folder], check=True)
        pinned = [f"{package}=={getattr(versions, package)}" for package in versions._fields[1:]]
        install = [python, "-m", "pip", "install", "--quiet", *pinned, *TOOLS]
        # A range of another machine's would be no answer to what these versions do.
        subprocess.run(install, check=True, env={**os.environ, "PIP_CONSTRAINT": os.devnull})
        done.touch()
    return python


def find_python(version: str) -> str:
    """python3.10 from PATH or pyenv.

    Raises:
        FileNotFoundError: neither has it.
    """
    home = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    of_pyenv = sorted(home.glob(f"versions/{version}.*/bin/python"))
    if of_pyenv:
        return str(of_pyenv[-1])
    found = shutil.which(f"python{version}")
    if found is None:
        raise FileNotFoundError(
            f"Python {version} is neither on PATH nor in {home}; install it, with "
            f"`pyenv install {version}` for one, or name other combinations"
        )
    return found


def run(
    name: str, versions: Combination, python: Path, tests: Sequence[str], processes: str
) -> dict[str, str]:
    """A row of the results: counts out of pytest's own report."""
    report = ENVIRONMENTS / f"{name}.xml"
    report.unlink(missing_ok=True)
    spread = ["--numprocesses", processes, "--dist", "loadfile"]
    command = [python, "-m", "pytest", "-q", *spread, f"--junit-xml={report}", *tests]
    subprocess.run(command, cwd=ROOT, check=False)
    suite = ElementTree.parse(report).getroot()[0]
    counts = {count: int(suite.attrib[count]) for count in ("tests", "failures", "errors")}
    skipped = int(suite.attrib["skipped"])
    failed = counts["failures"] + counts["errors"]
    return {
        "name": name,
        **versions._asdict(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "tests": "all" if tests is TESTS else " ".join(tests),
        "machine": f"{platform.system()} {platform.machine()}, {accelerator(python)}",
        "passed": str(counts["tests"] - failed - skipped),
        "failed": str(failed),
        "skipped": str(skipped),
    }


def accelerator(python: Path) -> str:
    name = "torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'"
    command = [python, "-c", f"import torch; print({name})"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def write(row: dict[str, str]) -> None:
    """In place of the last row of the same tests and machine, in the order of COMBINATIONS."""
    rows = []
    if RESULTS.exists():
        with RESULTS.open(newline="") as file:
            rows = list(csv.DictReader(file))
    rows = [old for old in rows if any(old[name] != row[name] for name in KEY)] + [row]
    rows.sort(key=lambda row: ([*COMBINATIONS].index(row["name"]), row["machine"]))
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
