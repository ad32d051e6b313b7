"""The benchmark refuses wrong results, and says what it measured and what it could not run."""

import dataclasses
import importlib.util
import os

import pytest
import torch
from bench_programs import quiet_machine, read_csv  # noqa: F401  (a fixture)

import dpo_triton
from benchmarks import bench_vocab
from benchmarks.common import command, goals, measure
from benchmarks.common.report import BACKWARD
from benchmarks.vocab import rows
from benchmarks.vocab.cases import Effort
from benchmarks.vocab.rows import Row

TINY = ["--vocab", "257", "--dtype", "float32", "--device", "cpu", "--no-plot"]


@pytest.fixture
def bench(monkeypatch, quiet_machine):  # noqa: F811
    """The program, with little effort."""
    monkeypatch.setattr(bench_vocab, "EFFORTS", {"cpu": (Effort(2**14, 2, 1e-3, 2),) * 2})
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
    run = ["machine", "copy_gb_per_s", "torch", "triton", "seed", "command"]
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
    assert "peak of dpo_triton in place" in out or "n/a" in out
    assert "speed over torch.compile" not in out


def test_goals_follow_from_the_rows():
    def row(impl, ms, **more):
        cells = dict(
            impl=impl, vocab_size=1000, batch=8, seq_len=128, dtype="bfloat16", scored_share=1.0,
            passes=BACKWARD, ms=ms, ms_p20=ms, ms_p80=ms, samples=1, glogits_per_s=1.0,
            copy_share=0.1, peak_mib=10.0, value_error=1e-6, value_rounding=5e-7, grad_error=1e-3,
            grad_rounding=2e-3, speedup=None,
        )  # fmt: skip
        return Row(**(cells | more))

    def verdicts(*measured):
        judged = rows.judge([*measured], 1000)
        return [(goal.measured.split()[0].removesuffix("MiB"), goal.met) for goal in judged]

    # Speed, peak (8 MiB, 64 bytes a row, and a gradient of 2 MB), errors of values and gradients.
    assert verdicts(row("dpo_triton", 2.0), row("log_softmax", 7.1)) == [
        ("3.55x", True), ("10.0", True), ("0.000", True), ("0.000", True)
    ]  # fmt: skip
    slow = row("dpo_triton", 2.1, peak_mib=10.1, value_error=2.1e-6, grad_error=2e-3)
    assert verdicts(slow, row("log_softmax", 7.1)) == [
        ("3.38x", False), ("10.1", False), ("2.200", False), ("0.500", True)
    ]  # fmt: skip
    in_place = row("dpo_triton in place", 2.0, peak_mib=8.1)
    assert verdicts(in_place) == [("8.1", False)]
    assert verdicts() == []
    assert "none can be judged without V = 1000" in goals.text("", [], "V = 1000")
    text = goals.text("V = 1000", rows.judge([slow, row("log_softmax", 7.1)], 1000), "")
    assert [text.count(word) for word in ("met", "MISSED")] == [1, 3]


@pytest.mark.parametrize(
    ("passes", "num_scored", "expected"),
    [
        ("forward", 1000, 2000),
        ("forward", 500, 1000),
        ("forward+backward", 1000, 6000),  # two reads and a write
        ("forward+backward", 500, 4000),  # the gradient's zeros are written too
    ],
)
def test_least_bytes_of_bfloat16(passes, num_scored, expected):
    assert rows.least_bytes(1000, num_scored, 2, passes) == expected


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
        state["calls"] += 1
        state["clean"] = False

    samples = measure.times_ms(fn, torch.device("cpu"), min_run_s=1e-6, restore=restore)
    assert len(samples) >= 1
    assert state["calls"] >= 3 * len(samples)  # two to warm up


def test_plot_is_drawn(bench, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    without_compiling(monkeypatch)
    arguments = [argument for argument in TINY if argument != "--no-plot"]
    assert bench.main([*arguments, "--share", "1", "--csv", str(tmp_path / "rows.csv")]) == 0
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_missing_extra_is_named(bench, monkeypatch):
    args = bench.parse_args([])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"matplotlib not found: pip install '\.\[bench\]'"):
        command.require_bench_extra(args)


def test_a_partial_run_does_not_replace_the_whole_one():
    whole, plot = bench_vocab.output_paths(bench_vocab.parse_args([]), "AMD EPYC, 2 threads")
    assert (whole.name, plot.name) == ("amd-epyc-2-threads.csv", "amd-epyc-2-threads.png")
    quick, _ = bench_vocab.output_paths(bench_vocab.parse_args(["--quick"]), "AMD EPYC, 2 threads")
    assert quick.name == "amd-epyc-2-threads.local.csv"
