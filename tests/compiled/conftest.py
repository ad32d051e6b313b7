"""Tests of what Triton's compiler makes of the kernels: no GPU is needed, and none is used.

A process in which Triton interprets kernels cannot compile them. There each file runs in a process
of its own, as one test; `TRITON_INTERPRET=0 python -m pytest tests/compiled` runs them one by one.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


class InOwnProcess(pytest.File):
    """A file whose only test is a run of pytest over it."""

    def collect(self) -> Iterator[pytest.Item]:
        yield OwnProcess.from_parent(self, name="compiled")


class OwnProcess(pytest.Item):
    def runtest(self) -> None:
        seed = str(self.config.getoption("--seed"))
        pytest_short = [sys.executable, "-m", "pytest", "-rs", "--tb=short"]
        command = [*pytest_short, str(self.path), "--seed", seed]
        # To import plug-ins that these files do not use takes seconds.
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "0",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }
        done = subprocess.run(
            command, cwd=self.config.rootpath, env=environment, capture_output=True, text=True
        )
        print(done.stdout[-200:])
        if done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:  # the file skips itself
            reasons = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
            pytest.skip("; ".join(reasons))
        if done.returncode != 0:
            pytest.fail(f"{' '.join(command)}\n{done.stdout}{done.stderr}", pytrace=False)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, self.path.name


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.File | None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return InOwnProcess.from_parent(parent, path=module_path)
    return None
