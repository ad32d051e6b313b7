"""The benchmark of a sharded head, with one process that stands for all."""

import pytest
import torch.distributed as dist
from bench_programs import read_csv

from benchmarks import bench_parallel
from benchmarks.parallel import ways

TINY = ["--processes", "2", "--vocab", "40", "--tokens", "16"]


@pytest.fixture
def bench(monkeypatch):
    """The program, whose ranks are this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(bench_parallel, "run_processes", lambda fn, size, *more: [fn(*more)])
    yield bench_parallel
    dist.destroy_process_group()


def test_rows_of_every_way(bench, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert bench.main([*TINY, "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    rows = read_csv(tmp_path / "parallel.local.csv")
    assert {row["impl"] for row in rows} == set(ways.WAYS)
    errors = [row for row in rows if row["quantity"] == "largest error of a value"]
    assert len(errors) == 3
    assert all(float(row["value"]) < bench.ALLOWED for row in errors)
    modelled = [row for row in rows if row["how"] == "modelled"]
    assert len(modelled) == 3 * len(bench.GPUS) * 8
    line = next(line for line in out.splitlines() if line.startswith("peak memory"))
    assert line.split()[2:4] == ["dpo_triton", "MiB"]
    assert len(line.split()) == 4 + len(bench.GPUS)
    assert (tmp_path / "parallel.local.png").read_bytes().startswith(b"\x89PNG")


def test_refuses_wrong_results(bench, monkeypatch, capsys, tmp_path):
    right = ways.WAYS[ways.GATHERED]
    monkeypatch.setitem(ways.WAYS, ways.GATHERED, lambda *inputs: right(*inputs) + 0.1)
    assert bench.main([*TINY, "--no-plot", "--output", str(tmp_path)]) == 1
    assert "gathered logits, 2 processes: error 0.1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_vocabulary_has_a_column_a_process(capsys):
    with pytest.raises(SystemExit):
        bench_parallel.parse_args(["--vocab", "3", "--processes", "4"])
    assert "--vocab must be at least the number of processes" in capsys.readouterr().err
