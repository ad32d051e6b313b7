"""The benchmark refuses wrong results, and says what it measured and what it could not run."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
import torch
from bench_programs import quick_peaks, quiet_machine, read_csv  # noqa: F401  (fixtures)

import dpo_triton
from benchmarks import bench_vocab
from benchmarks.common import command, goals, measure
from benchmarks.common.command import ROOT
from benchmarks.common.logits_peers import LOG_SOFTMAX, candidates
from benchmarks.common.peers import OURS
from benchmarks.common.report import BOTH, FORWARD
from benchmarks.vocab import first_call
from benchmarks.vocab.first_call import FirstCall
from benchmarks.vocab.judged import judge
from benchmarks.vocab.rows import SIZES, VOCABULARY, Row

TINY = ["--vocab", "257", "--dtype", "float32", "--device", "cpu", "--no-plot"]
TINY += ["--no-first-calls", "--sizes"]


@pytest.fixture
def bench(monkeypatch, quiet_machine, quick_peaks):  # noqa: F811
    """The program, with little effort."""
    effort = bench_vocab.Effort(2, 1e-3, 2)
    monkeypatch.setattr(bench_vocab, "EFFORTS", {"cpu": ((2**14, effort),) * 2})
    monkeypatch.setattr(bench_vocab, "SMALL_EFFORT", effort)
    monkeypatch.setattr(bench_vocab, "COPY_NUMEL", {"cpu": 2**16})
    return bench_vocab


def without_compiling(monkeypatch):
    """torch.compile is slow to start: here it is a peer that fails."""

    def refuse(fn, **options):
        def compiled(*args):
            raise RuntimeError("no compiler, for the test\nand a second line")

        return compiled

    monkeypatch.setattr(torch, "compile", refuse)


@pytest.mark.parametrize(
    "wrong", [lambda v: v + 1e-3, lambda v: v * torch.nan, lambda v: v.detach()]
)
def test_refuses_to_time_wrong_results(bench, monkeypatch, capsys, tmp_path, wrong):
    right = dpo_triton.fused_seq_logprob
    monkeypatch.setattr(dpo_triton, "fused_seq_logprob", lambda *a, **k: wrong(right(*a, **k)))
    path = tmp_path / "rows.csv"
    assert bench.main([*TINY, "--csv", str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "dpo_triton, V = 257, float32" in err
    assert not path.exists()


def test_rows_and_what_was_not_run(bench, monkeypatch, capsys, tmp_path):
    without_compiling(monkeypatch)
    monkeypatch.setattr(bench, "HEADLINE", 257)
    path = tmp_path / "made" / "rows.csv"
    assert bench.main([*TINY, "--seed", "7", "--csv", str(path)]) == 0
    out, _ = capsys.readouterr()
    found = read_csv(path)
    columns = [field.name for field in dataclasses.fields(Row)]
    run = ["machine", "copy_gb_per_s", "torch", "triton", "numba", "seed", "command"]
    assert list(found[0]) == columns + run
    ours = [row for row in found if row["impl"] == "dpo_triton"]
    assert [(row["scored_share"], row["passes"]) for row in ours] == [
        (share, passes) for share in ("1", "0.5") for passes in ("forward", "forward+backward")
    ]
    in_place = [row for row in found if row["impl"] == "dpo_triton in place"]
    assert [row["passes"] for row in in_place] == ["forward+backward"] * 2
    for row in found:
        assert row["seed"] == "7"
        assert row["command"].startswith("python benchmarks/bench_vocab.py --vocab 257")
        assert float(row["ms_p20"]) <= float(row["ms"]) <= float(row["ms_p80"])
        assert float(row["value_error"]) < 1e-5
        assert (row["grad_error"] == "") == (row["passes"] == "forward")
        assert row["impl"] != "log_softmax" or float(row["speedup"]) == 1

    assert "not run: torch.compile: RuntimeError: no compiler, for the test: 4 times" in out
    assert "not run: TRL kernel: its kernel is Triton's: needs a GPU" in out
    assert "not run: Liger: its kernel is Triton's: needs a GPU" in out
    assert "speed over log_softmax, float32, 50% scored, forward+backward" in out
    assert "peak of dpo_triton in place" in out
    assert "speed over torch.compile" not in out


def test_goals_follow_from_the_rows():
    def verdicts(*measured):
        judged = judge([*measured], [], 1000)
        return [(goal.measured.split()[0].removesuffix("MiB"), goal.met) for goal in judged]

    # Speed, peak (1 MiB, 64 bytes a row, and a gradient of 2 MB), errors of values and gradients.
    assert verdicts(row("dpo_triton", 2.0), row("log_softmax", 7.1)) == [
        ("3.55x", True), ("3.0", True), ("0.000", True), ("0.000", True)
    ]  # fmt: skip
    slow = row("dpo_triton", 2.1, peak_mib=3.1, value_error=2.1e-6, grad_error=2e-3)
    assert verdicts(slow, row("log_softmax", 7.1)) == [
        ("3.38x", False), ("3.1", False), ("2.200", False), ("0.500", True)
    ]  # fmt: skip
    both = row("dpo_triton", 2.0), row("torch.compile", 6.9)
    assert verdicts(*both)[0] == ("3.45x", False)  # 3.5 with the backward pass
    forward = [dataclasses.replace(one, passes=FORWARD, scored_share=0.5) for one in both]
    assert verdicts(*forward)[0] == ("3.45x", True)  # 2.2 without, half of the rows scored
    in_place = row("dpo_triton in place", 2.0, peak_mib=1.1)
    assert verdicts(in_place) == [("1.1", False)]
    assert verdicts() == []
    assert "none can be judged without V = 1000" in goals.text("", [], "V = 1000")
    text = goals.text("V = 1000", judge([slow, row("log_softmax", 7.1)], [], 1000), "")
    assert [text.count(word) for word in ("met", "MISSED")] == [1, 3]


def test_goals_of_sizes_neighbours_and_first_calls():
    def judged(*measured, first_calls=()):
        found = judge([*measured], first_calls, 1000)
        return [(goal.what, goal.goal, goal.met) for goal in found if "error" not in goal.what]

    small = dict(part=SIZES, batch=8, seq_len=16, vocab_size=64, threads=1)
    assert judged(row("dpo_triton", 1.0, speedup=0.79, **small)) == [
        ("speed over log_softmax, 8 x 16 x 64, bfloat16, threads: 1, forward+backward",
         ">= 0.80x", False)
    ]  # fmt: skip
    large = dict(small, seq_len=64, vocab_size=6400)
    ((_, goal, met),) = judged(row("dpo_triton", 1.0, speedup=1.5, **large))
    assert (goal, met) == (">= 1.50x", True)
    assert judged(row("dpo_triton", 1.0, speedup=0.1, **dict(small, seq_len=2))) == []

    beside = dict(large, neighbours=1)
    quiet = [row("dpo_triton", 1.0, **large), row("log_softmax", 2.0, **large)]
    for ms, met in ((1.4, True), (1.6, False)):
        pair = [row("dpo_triton", ms, **beside), row("log_softmax", 3.0, **beside)]
        ((what, goal, found),) = judged(*quiet, *pair)
        assert what.startswith("slowed by 1 busy neighbour, 8 x 64 x 6400")
        assert (goal, found) == ("<= 1.50x", met)
    calls = [FirstCall("empty", "forward", 5.9), FirstCall("filled", "forward", 0.51)]
    assert [met for *_, met in judged(first_calls=calls)] == [True, False]


def row(impl, ms, **more):
    cells = dict(
        impl=impl, vocab_size=1000, batch=8, seq_len=128, dtype="bfloat16", scored_share=1.0,
        passes=BOTH, ms=ms, ms_p20=ms, ms_p80=ms, samples=1, glogits_per_s=1.0,
        copy_share=0.1, peak_mib=3.0, value_error=1e-6, value_rounding=5e-7, grad_error=1e-3,
        grad_rounding=2e-3, speedup=None, part=VOCABULARY, threads=2, neighbours=0,
    )  # fmt: skip
    return Row(**(cells | more))


@pytest.mark.parametrize(
    ("passes", "num_scored", "expected"),
    [
        ("forward", 1000, 2000),
        ("forward", 500, 1000),
        ("backward", 500, 3000),
        ("forward+backward", 1000, 6000),  # two reads and a write
        ("forward+backward", 500, 4000),  # the gradient's zeros are written too
    ],
)
def test_least_bytes_of_bfloat16(passes, num_scored, expected):
    assert measure.least_bytes(1000, num_scored, 2)[passes] == expected


def test_peak_counts_what_a_call_holds(quiet_machine):  # noqa: F811
    measure.map_buffers()
    torch.ones(2**24)  # what a first call loads is no part of it
    peak = measure.peak_mib(lambda: torch.ones(2**24), torch.device("cpu"))
    if peak is None:
        pytest.skip("no peak resident size here")
    # Linux counts resident pages per core, and adds those up at every 32.
    uncounted = max(0.5, 32 * 4096 * (os.cpu_count() or 1) / 2**20)
    assert 64 - uncounted <= peak <= 65


def test_times_restore_before_each_sample(quiet_machine):  # noqa: F811
    state = dict(clean=False, calls=0)

    def restore():
        state["clean"] = True

    def fn():
        assert state["clean"]
        state["calls"] += 1
        state["clean"] = False

    samples = measure.times_ms(fn, torch.device("cpu"), min_run_s=1e-6, restore=restore)
    assert len(samples) >= 3
    assert state["calls"] == len(samples)


def with_few_peers(monkeypatch):
    """Ours and the formula: where cores are busy the threads of many wait for one another."""

    def few(device, backend):
        return [one for one in candidates(device, backend) if one.name in (OURS, LOG_SOFTMAX)]

    monkeypatch.setattr(bench_vocab, "candidates", few)


def test_plots_and_sizes(bench, tmp_path, monkeypatch, capsys):
    """A size with all threads and with one; another process is busy beside the named one."""
    pytest.importorskip("matplotlib")
    with_few_peers(monkeypatch)
    monkeypatch.setattr(bench, "NEIGHBOURED", (2, 3, 7))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(measure, "setting", lambda threads, neighbours: nullcontext())
    arguments = [argument for argument in TINY if argument != "--no-plot"]
    sizes = ["2x3x7", "2x300x131"]
    path = tmp_path / "rows.csv"
    monkeypatch.setattr(bench, "LARGE", 10**4)
    assert bench.main([*arguments, *sizes, "--share", "1", "--csv", str(path)]) == 0
    for name in ("rows.png", "rows-sizes.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    settings = [
        (row["seq_len"], row["threads"], row["neighbours"], row["samples"] == "1")
        for row in read_csv(path)
        if (row["impl"], row["passes"], row["part"]) == ("log_softmax", "forward", SIZES)
    ]
    assert settings == [
        ("3", "2", "0", False),
        ("3", "1", "0", False),
        ("3", "2", "1", False),
        ("300", "2", "0", True),  # once
    ]
    *_, first, second, third, fourth, fifth = capsys.readouterr().out.splitlines()
    assert first.startswith("Of 2 x 300 x 131 float32 logits, 2 threads, ")
    assert "dpo_triton" in second
    assert "MiB above" in third or "not known" in third
    assert "nats at most" in fourth
    assert fifth.startswith(("Where time alone", "Nothing here"))


def test_a_setting_has_threads_and_a_busy_neighbour_for_a_while():
    before, alone = torch.get_num_threads(), os.times()
    with measure.setting(before + 1, 1):
        assert torch.get_num_threads() == before + 1
        time.sleep(0.3)
    assert torch.get_num_threads() == before
    after = os.times()  # of children that have ended
    assert after.children_user + after.children_system > alone.children_user + 0.01


def test_a_neighbour_ends_with_the_benchmark():
    """Though that is killed; the pipe is closed when both are gone."""
    program = "import sys, time; sys.path.insert(0, sys.argv[1])\n"
    program += "from benchmarks.common import measure\n"
    program += "with measure.setting(1, 1): print('in', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", program, str(ROOT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"in\n"
        process.kill()
        assert process.stdout.read() == b""


def test_only_what_was_measured_is_drawn(bench, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    with_few_peers(monkeypatch)
    arguments = [argument for argument in TINY if argument != "--no-plot"]
    assert bench.main([*arguments, "--share", "1", "--csv", str(tmp_path / "rows.csv")]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"rows.csv", "rows.png"}


def test_sizes_are_within_memory(monkeypatch):
    monkeypatch.setattr(measure, "free_bytes", lambda device: 64 * 2**27)
    args = bench_vocab.parse_args(["--device", "cpu"])
    parts = bench_vocab.plans_of(args, torch.device("cpu"))
    vocab_sizes = dict.fromkeys(plan.shape.vocab_size for plan in parts[VOCABULARY])
    assert list(vocab_sizes) == bench_vocab.VOCAB_SIZES
    *others, largest = parts[SIZES]  # the largest with one dtype
    assert largest.shape.num_logits <= 2**27 < 8 * 512 * 151936
    assert largest.dtype == torch.bfloat16
    assert {setting.effort.min_run_s for setting in largest.settings} == {None}
    assert [plan.dtype for plan in others] == [torch.bfloat16, torch.float32] * 5


def test_a_first_call_is_that_of_a_new_process(monkeypatch, capsys):
    """Two, whose folder of compiled code is empty at first."""
    monkeypatch.setattr(sys, "argv", ["", "cpu", "torch"])
    exec(first_call.PROGRAM, {})
    forward, both = map(float, capsys.readouterr().out.split())
    assert 0 < forward < both

    keeps = "import os; folder = os.environ['NUMBA_CACHE_DIR']; kept = len(os.listdir(folder)); "
    keeps += "open(f'{folder}/code', 'w').close(); print(kept, kept + 0.5)"
    monkeypatch.setattr(first_call, "PROGRAM", keeps)
    found = first_call.measure("cpu", "torch")
    assert [(call.cache, call.passes, call.seconds) for call in found] == [
        ("empty", FORWARD, 0.0), ("empty", BOTH, 0.5),
        ("filled", FORWARD, 1.0), ("filled", BOTH, 1.5),
    ]  # fmt: skip


def test_missing_extra_is_named(bench, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"matplotlib not found: pip install '\.\[bench,trl\]'"):
        command.Run("bench_vocab", bench.parse_args, [])


def test_a_partial_run_does_not_replace_the_whole_one():
    for options, name in (
        ([], "amd.csv"),
        (["--seed", "3"], "amd.csv"),
        (["--quick"], "amd.local.csv"),
        (["--backend", "torch"], "amd.local.csv"),
    ):
        run = command.Run("bench_vocab", bench_vocab.parse_args, options)
        csv, plot = run.paths("amd")
        assert (csv.name, plot.name) == (name, name.replace(".csv", ".png"))
