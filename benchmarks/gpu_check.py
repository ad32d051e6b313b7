"""What a machine with a GPU can show, in nine minutes and one folder; `--help` has the options.

It needs no network and nothing but torch: what is not installed is named and left out. Steps come
in the order of what matters most. Each has a log of its own, and the summary is written anew after
each step, so that a run that is stopped loses nothing.
"""

import argparse
import contextlib
import importlib.util
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

if not __package__:  # a script: the checkout's packages, and none of benchmarks/ at the top level
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.common.command import ROOT, version
from benchmarks.common.report import file_stem

SANITIZER = "compute-sanitizer"
SANITIZED = (
    "garbage or in_place or every_dtype"  # tests of tests/test_gpu.py: one of each stage and layout
)
# Two vocabularies: torch.compile, among the peers, starts anew for each.
VOCAB_OPTIONS = "--no-first-calls --sizes --dtype bfloat16 --vocab 6400 128256"
VERSIONS = ("torch", "triton", "numpy")
# Without them steps are left out or are less: tests are skipped, peers are not timed.
WANTED = (
    "pytest", "xdist", "hypothesis", "transformers", "peft", "accelerate", "tqdm", "matplotlib",
    "mpmath", "trl", "datasets", "liger_kernel",
)  # fmt: skip
GIB_PER_PROCESS = 4  # of GPU memory: a context and the largest tensors of a test
MARGIN_S = 2.0  # to end a step that is past its limit


class Step(NamedTuple):
    name: str
    command: list[str]
    weight: float  # its part of the time
    environment: tuple[tuple[str, str], ...] = ()
    missing: str = ""  # why it is left out


class Outcome(NamedTuple):
    step: str
    outcome: str  # "ok", "FAILED, ...", "left out: ...", "running"
    seconds: float = 0.0
    last_line: str = ""  # of its log

    @property
    def is_failure(self) -> bool:
        return self.outcome.startswith("FAILED")


class Machine(NamedTuple):
    name: str  # of the GPU
    memory_gib: float
    num_cpus: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps; return the exit status."""
    args = parse_args(argv)
    machine = find_machine()
    folder = (
        args.output or ROOT / "out" / f"gpu-check-{file_stem(machine.name if machine else 'none')}"
    )
    steps = plan(machine or Machine("none", GIB_PER_PROCESS, os.cpu_count() or 1), folder)
    if args.only:
        unknown = set(args.only) - {step.name for step in steps}
        if unknown:
            names = ", ".join(step.name for step in steps)
            print(f"--only takes {names}; got {', '.join(sorted(unknown))}", file=sys.stderr)
            return 2
        steps = [step for step in steps if step.name in args.only]
    budget_s = 60 * args.minutes
    if args.list:
        print(plan_text(steps, budget_s))
        return 0
    if machine is None:
        print("no GPU here: `make test` and `make bench-kernels` are what this machine can show")
        return 1
    outcomes = run_all(steps, folder, budget_s, heading(machine))
    print(f"\n{summary(heading(machine), outcomes)}\n\nall of it: {folder}")
    return int(any(outcome.is_failure for outcome in outcomes))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, help="folder of the results; default out/gpu-check-<machine>"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for all steps together")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="names, as --list shows them")
    parser.add_argument("--list", action="store_true", help="show the steps and their limits")
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error(f"--minutes must be positive, got {args.minutes}")
    return args


def find_machine() -> Machine | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return Machine(properties.name, properties.total_memory / 2**30, os.cpu_count() or 1)


def plan(machine: Machine, folder: Path) -> list[Step]:
    """All steps. A weight is the seconds that a step has of nine minutes, if all before it take
    theirs."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "--tb=short", "--durations=10", "-rfEs"]
    no_pytest = "" if has("pytest") else "pytest is not installed"
    processes = int(max(1, min(machine.num_cpus - 2, machine.memory_gib // GIB_PER_PROCESS)))
    parallel = ["-n", str(processes), "--dist", "loadfile"] if has("xdist") else []
    plots = [] if has("matplotlib") else ["--no-plot"]
    no_tqdm = "" if has("tqdm") else "tqdm is not installed"

    def benchmark(name: str, weight: float, *options: str) -> Step:
        script = f"benchmarks/bench_{name}.py"
        missing = no_tqdm if (ROOT / script).exists() else f"{script} is not there"
        command = [python, script, "--output", str(folder), *options]
        return Step(f"bench_{name}", command, weight, missing=missing)

    def sanitizer(tool: str, weight: float) -> Step:
        program = find_sanitizer()
        missing = no_pytest if program else f"{SANITIZER} is not on PATH, nor in /usr/local/cuda"
        command = [program or SANITIZER, "--tool", tool, "--error-exitcode", "3", *pytest]
        command += ["tests/test_gpu.py", "-k", SANITIZED]
        # Each tensor is an allocation of its own there, so that a stray access hits no other one.
        return Step(tool, command, weight, (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),), missing)

    return [
        Step("self-check", [python, "-m", "dpo_triton.info"], 45),
        Step("gpu-tests", [*pytest, "tests/test_gpu.py", "-m", "gpu"], 65, missing=no_pytest),
        Step("suite", [*pytest, *parallel, "-m", "not gpu"], 120, missing=no_pytest),
        sanitizer("memcheck", 45),
        benchmark("host", 35, *plots),
        benchmark("kernels", 50, *plots),
        benchmark("vocab", 70, *plots, *VOCAB_OPTIONS.split()),
        benchmark("linear", 70, *plots),
        sanitizer("racecheck", 40),
    ]


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def find_sanitizer() -> str | None:
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    return shutil.which(SANITIZER, path=path)


def limits(steps: Sequence[Step], budget_s: float) -> dict[str, float]:
    """Seconds of each step that runs, if all before it take theirs: its part of what is left."""
    total = sum(step.weight for step in steps if not step.missing)
    return {step.name: budget_s * step.weight / total for step in steps if not step.missing}


def plan_text(steps: Sequence[Step], budget_s: float) -> str:
    """Return the plan as lines: a step, its limit, and its command or why it is left out."""
    seconds = limits(steps, budget_s)
    width = max(len(step.name) for step in steps)
    lines = []
    for step in steps:
        limit = f"{seconds[step.name]:4.0f} s" if step.name in seconds else "     -"
        what = f"left out: {step.missing}" if step.missing else shlex.join(step.command)
        lines.append(f"{step.name:<{width}}  {limit}  {what}")
    return "\n".join(lines)


def run_all(steps: Sequence[Step], folder: Path, budget_s: float, title: str) -> list[Outcome]:
    """Run the steps within the budget, in their order; what one does not use the next ones have."""
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + budget_s
    outcomes: list[Outcome] = []

    def note(*more: Outcome) -> None:
        (folder / "summary.txt").write_text(summary(title, [*outcomes, *more]) + "\n")

    for i, step in enumerate(steps):
        if step.missing:
            outcomes.append(Outcome(step.name, f"left out: {step.missing}"))
        else:
            note(Outcome(step.name, "running"))
            limit_s = limits(steps[i:], end - time.monotonic())[step.name] - MARGIN_S
            print(f"{step.name}, at most {limit_s:.0f} s: {shlex.join(step.command)}", flush=True)
            outcomes.append(run(step, folder / f"{step.name}.log", limit_s))
        print(line(outcomes[-1]), flush=True)
        note()
    return outcomes


def run(step: Step, log: Path, limit_s: float) -> Outcome:
    """Run one step into its log; past the limit it is ended with all that it started."""
    if limit_s <= 0:
        return Outcome(step.name, "FAILED, no time was left for it")
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",  # what was printed is in the log when a step is ended
        **dict(step.environment),
    }
    environment.pop("TRITON_INTERPRET", None)  # kernels are compiled here
    start = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(limit_s)
            outcome = "ok" if status == 0 else f"FAILED, exit status {status}"
        except subprocess.TimeoutExpired:
            outcome = f"FAILED, more than {limit_s:.0f} s"
        finally:
            end_group(process)
    seconds = time.monotonic() - start
    lines = [text for text in log.read_text(errors="replace").splitlines() if text.strip()]
    if outcome != "ok":
        print(*lines[-40:], sep="\n", flush=True)
    last_line = lines[-1].rpartition("\r")[-1].strip("= ") if lines else ""
    return Outcome(step.name, outcome, seconds, last_line[:100])


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """End a process and those that it started, in its own process group, if any still run."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(MARGIN_S / 2)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def heading(machine: Machine) -> str:
    """Return the machine, versions, and what is missing."""
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{name} {version(name)}" for name in VERSIONS]
    missing = [name for name in WANTED if not has(name)]
    return (
        f"{machine.name}, {machine.memory_gib:.0f} GiB, {machine.num_cpus} CPU cores\n"
        f"{', '.join(versions)}\n"
        f"not installed: {', '.join(missing) or 'nothing that is wanted'}"
    )


def summary(title: str, outcomes: Sequence[Outcome]) -> str:
    return "\n".join([title, "", *map(line, outcomes)])


def line(outcome: Outcome) -> str:
    text = f"{outcome.step:<14}{outcome.seconds:6.1f} s  {outcome.outcome}"
    return f"{text}; {outcome.last_line}" if outcome.last_line else text


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the step ends too
    sys.exit(main())
