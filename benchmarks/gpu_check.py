"""What a machine with a GPU can show, in under ten minutes, and one summary: `make gpu-check`."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SANITIZER = "compute-sanitizer"


class Step(NamedTuple):
    name: str
    command: list[str]  # empty: there is nothing to run
    limit_s: float
    environment: dict[str, str]


class Outcome(NamedTuple):
    step: str
    outcome: str
    seconds: float
    is_failure: bool


def main() -> int:
    """Run the steps; return the exit status."""
    import torch

    if not torch.cuda.is_available():
        print("no GPU here: `make test` and `make bench-kernels` are what this machine can show")
        return 1
    outcomes = [run(step) for step in steps()]
    print(f"\n{torch.cuda.get_device_name()}\n{summary(outcomes)}")
    return int(any(outcome.is_failure for outcome in outcomes))


def steps() -> list[Step]:
    """All of them, 9 minutes at most."""
    tests = [sys.executable, "-m", "pytest"]
    sanitizer = shutil.which(SANITIZER)
    sanitized: list[str] = []
    if sanitizer is not None:
        sanitized = [sanitizer, "--tool", "memcheck", "--error-exitcode", "3", *tests]
        sanitized += ["tests/test_gpu.py", "-k", "more_programs"]
    # Each tensor is an allocation of its own there, so that a stray access hits no other tensor.
    own_allocations = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    benchmarks = [[sys.executable, f"benchmarks/bench_{name}.py"] for name in ("kernels", "vocab")]
    return [
        Step("GPU tests", [*tests, "-m", "gpu"], 180, {}),
        Step(SANITIZER, sanitized, 120, own_allocations),
        Step("bench_kernels", benchmarks[0], 120, {}),
        Step("bench_vocab --quick", [*benchmarks[1], "--quick", "--no-plot"], 120, {}),
    ]


def run(step: Step) -> Outcome:
    """Run one step, its output passed on; a step past its limit is ended and has failed."""
    if not step.command:
        return Outcome(step.name, "not found on PATH", 0.0, is_failure=False)
    print(f"\n{step.name}: {' '.join(step.command)}", flush=True)
    start = time.monotonic()
    environment = {**os.environ, **step.environment}
    try:
        done = subprocess.run(step.command, cwd=ROOT, env=environment, timeout=step.limit_s)
        failed = done.returncode != 0
        outcome = f"FAILED, exit status {done.returncode}" if failed else "ok"
    except subprocess.TimeoutExpired:
        failed, outcome = True, f"FAILED, more than {step.limit_s:.0f} s"
    return Outcome(step.name, outcome, time.monotonic() - start, failed)


def summary(outcomes: list[Outcome]) -> str:
    """Return the outcomes as aligned text."""
    lines = [("step", "outcome", "seconds")]
    lines += [(o.step, o.outcome, f"{o.seconds:.1f}") for o in outcomes]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        f"{step:<{widths[0]}}  {outcome:<{widths[1]}}  {seconds:>{widths[2]}}"
        for step, outcome, seconds in lines
    )


if __name__ == "__main__":
    sys.exit(main())
