"""benchmarks/gpu_check.py with commands that stand in for its own, as if there were a GPU."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import Machine, Step

H100 = Machine("NVIDIA H100 80GB HBM3", 79.2, 16)


def step(name: str, code: str, weight: float = 1.0, **more) -> Step:
    return Step(name, [sys.executable, "-c", code], weight, **more)


def test_each_step_has_a_log_and_the_summary_all_of_them(tmp_path):
    steps = [
        step("fine", "print('3 passed in 1 s')"),
        step("status", "import sys; print('what went wrong'); sys.exit(3)"),
        step("absent", "", missing="no such program"),
        step("variable", "import os; print(os.environ['A'])", environment=(("A", "of the step"),)),
    ]
    outcomes = gpu_check.run_all(steps, tmp_path / "new" / "folder", 60, "the machine")
    assert [outcome.is_failure for outcome in outcomes] == [False, True, False, False]
    assert (tmp_path / "new" / "folder" / "status.log").read_text() == "what went wrong\n"
    title, blank, *lines = (tmp_path / "new" / "folder" / "summary.txt").read_text().splitlines()
    assert (title, blank) == ("the machine", "")
    for line, expected in zip(
        lines,
        [
            "ok; 3 passed in 1 s",
            "FAILED, exit status 3; what went wrong",
            "left out: no such program",
            "ok; of the step",
        ],
        strict=True,
    ):
        assert line.endswith(expected)


def test_a_step_past_its_limit_ends_with_what_it_started(tmp_path):
    """And what it had said until then is kept."""
    code = (
        "import subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "print(child.pid); time.sleep(60)"
    )
    start = time.monotonic()
    outcome = gpu_check.run(step("slow", code), tmp_path / "slow.log", limit_s=2.0)
    assert time.monotonic() - start < 20
    assert outcome.outcome == "FAILED, more than 2 s"
    child = int((tmp_path / "slow.log").read_text())
    for _ in range(50):
        if not is_running(child):
            break
        time.sleep(0.1)
    assert not is_running(child)


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_run_that_is_stopped_leaves_what_was_done(tmp_path):
    """The folder's summary says what was running, and a kill ends that."""
    program = (
        "import pathlib, signal, sys, gpu_check; from gpu_check import Step; "
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1)); "
        "steps = [Step('first', [sys.executable, '-c', 'print(7)'], 1.0), "
        "Step('second', [sys.executable, '-c', 'import time; time.sleep(60)'], 1.0)]; "
        f"gpu_check.run_all(steps, pathlib.Path({str(tmp_path)!r}), 100, 'title')"
    )
    environment = {**os.environ, "PYTHONPATH": str(gpu_check.ROOT / "benchmarks")}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment)
    summary = tmp_path / "summary.txt"
    deadline = time.monotonic() + 60
    while not (summary.exists() and "second" in summary.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait(20) == 1
    first, second = summary.read_text().splitlines()[2:]
    assert first.endswith("ok; 7")
    assert second.endswith("running")


def test_what_a_step_leaves_the_next_ones_have():
    steps = [step("a", "", 1.0), step("b", "", 2.0), step("c", "", 1.0, missing="x"),
             step("d", "", 1.0)]  # fmt: skip
    assert gpu_check.limits(steps, 100.0) == {"a": 25.0, "b": 50.0, "d": 25.0}
    assert gpu_check.limits(steps[1:], 99.0) == {"b": 66.0, "d": 33.0}


def test_no_time_left_is_a_failure(tmp_path):
    outcome = gpu_check.run(step("late", "1 / 0"), tmp_path / "late.log", limit_s=-1.0)
    assert outcome.is_failure
    assert "no time" in outcome.outcome


def test_the_plan_of_a_bare_machine(monkeypatch, tmp_path):
    """Whatever is not installed is named, and nothing else is left out for it."""
    monkeypatch.setattr(gpu_check, "has", lambda module: module in ("pytest", "tqdm"))
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: None)
    steps = {step.name: step for step in gpu_check.plan(H100, tmp_path)}
    assert list(steps)[:4] == ["self-check", "gpu-tests", "suite", "memcheck"]
    assert "compute-sanitizer" in steps["memcheck"].missing
    assert "-n" not in steps["suite"].command
    assert "--no-plot" in steps["bench_vocab"].command
    assert not steps["self-check"].missing
    monkeypatch.setattr(gpu_check, "has", lambda module: False)
    steps = {step.name: step for step in gpu_check.plan(H100, tmp_path)}
    assert steps["suite"].missing == "pytest is not installed"
    assert steps["bench_vocab"].missing == "tqdm is not installed"
    assert not steps["self-check"].missing
    assert "xdist, hypothesis" in gpu_check.heading(H100)


def test_the_plan_of_a_whole_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "has", lambda module: True)
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: "/opt/compute-sanitizer")
    steps = {step.name: step for step in gpu_check.plan(H100, tmp_path)}
    assert sum(step.weight for step in steps.values()) == 9 * 60
    command = steps["suite"].command
    assert command[command.index("-n") + 1] == "14"
    command = steps["memcheck"].command
    assert command[0] == "/opt/compute-sanitizer"
    assert steps["memcheck"].environment == (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)


def test_what_the_sanitizer_runs_exists():
    """A test that -k does not find any more would pass unseen."""
    import test_gpu

    for word in gpu_check.SANITIZED.split(" or "):
        assert any(word in name for name in vars(test_gpu) if name.startswith("test_")), word


def test_options(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "find_machine", lambda: H100)
    monkeypatch.setattr(
        gpu_check, "plan", lambda machine, folder: [step("a", "1 / 0"), step("b", "print(1)")]
    )
    assert gpu_check.main(["--list", "--minutes", "1"]) == 0
    assert capsys.readouterr().out.startswith("a    30 s  ")
    output = ["--output", str(tmp_path)]
    assert gpu_check.main([*output, "--only", "b"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"b.log", "summary.txt"}
    assert gpu_check.main(output) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out
    assert gpu_check.main(["--only", "c"]) == 2
    assert "--only takes a, b; got c" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu_check.main(["--minutes", "0"])


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert "no GPU here" in line
    assert gpu_check.main(["--list"]) == 0
