"""The benchmark of host time: launches are counted, and parts add up; the head's operators too."""

import pytest
import torch
from bench_programs import read_csv

from benchmarks import bench_host, bench_kernels
from benchmarks.common.peers import OURS, collect
from benchmarks.head.peers import TRL, candidates
from benchmarks.host import counts
from benchmarks.host.parts import PARTS, shares
from gpu_lab.driver import emulate
from tools import tune_kernels


@pytest.fixture(autouse=True)
def as_if_without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def narrow_tiles():
    """A GPU's are counted here, where nothing is executed."""


def test_rows_of_every_pass(capsys, tmp_path):
    path = tmp_path / "rows.csv"
    options = ["--samples", "2", "--calls", "2", "--no-head", "--no-plot", "--csv", str(path)]
    assert bench_host.main(options) == 0
    out = capsys.readouterr().out
    rows = read_csv(path)
    launches = {(row["impl"], row["passes"]): int(row["launches"]) for row in rows}
    assert 1 <= launches[OURS, "forward"] < launches[OURS, "forward+backward"]
    assert launches["log_softmax", "forward"] == 0
    for row in rows:
        parts = [float(row[name]) for name in bench_host.PART_FIELDS.values()]
        assert min(parts) >= 0
        assert sum(parts) == pytest.approx(float(row["us"]), rel=1e-3)
        assert float(row["us_p20"]) <= float(row["us"]) <= float(row["us_p80"])
        assert row["impl"] != "TRL kernel" or float(row["of_trl"]) == 1
        assert (float(row["launches_us"]) > 0) == (int(row["launches"]) > 0)
    assert "stand-in" in out


def test_parts_are_where_the_time_is():
    x = torch.zeros(2)
    found = shares(lambda: [torch.empty(2**4) for _ in range(100)], 20)
    assert max(found, key=found.get) in ("allocations", "other Python")
    assert found["allocations"] > shares(lambda: [x + 1 for _ in range(100)], 20)["allocations"]
    assert sum(found.values()) == pytest.approx(1)
    assert set(found) == set(PARTS)


def test_operators_of_the_head_are_counted():
    """Inside its own operators: what holds beside TRL's, whose chunks are as many."""
    one_too_many = "Triton launches, frozen head, forward"  # 17: not to grow
    with emulate("sm_90", schedule=None) as lab:
        heads, _ = collect(p for p in candidates("triton") if p.name in (OURS, TRL))
        rows = counts.count(lab, heads, 8, 4, 151936)
    ours = {(row.head, row.passes): row for row in rows if row.impl == OURS}
    assert list(ours) == [
        (head, passes) for head in ("trained", "frozen") for passes in ("forward", "backward")
    ]
    assert all(row.operators > 10 for row in rows)  # an operator of its own would be one
    assert ours["trained", "forward"].launches > 5 > ours["frozen", "backward"].launches
    assert ours["frozen", "forward"].launches <= 17
    goals = list(counts.judge(rows))
    assert len(goals) >= 4
    assert [goal.what for goal in goals if not goal.met] in ([], [one_too_many])
    if any(row.impl == TRL for row in rows):
        assert sum("beside TRL's" in goal.what for goal in goals) == 4


def test_goals_of_the_head_follow_from_the_counts():
    def row(impl, operators, launches=1):
        return counts.Count(impl, "frozen", "backward", operators, launches)

    verdicts = lambda *rows: [goal.met for goal in counts.judge(rows)]  # noqa: E731
    assert verdicts(row(OURS, 70, 16), row(TRL, 70)) == [True, True, True]
    assert verdicts(row(OURS, 71, 17), row(TRL, 70)) == [False, False, False]
    assert verdicts(row(TRL, 70)) == []


def test_a_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    parts = dict.fromkeys(bench_host.PART_FIELDS.values(), 1.0)
    row = bench_host.Row(
        impl=OURS, passes="forward", us=7.0, us_p20=6.0, us_p80=8.0, samples=2, of_trl=None,
        launches=2, **parts,
    )  # fmt: skip
    bench_host.plot(tmp_path / "host.png", [row], "a machine")
    assert (tmp_path / "host.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("program", [bench_host, bench_kernels, tune_kernels])
def test_help(program, capsys):
    with pytest.raises(SystemExit, match="0"):
        program.parse_args(["--help"])
    assert "usage" in capsys.readouterr().out
