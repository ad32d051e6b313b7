"""The benchmark of the head refuses wrong results, and judges its goals by the rows."""

import dataclasses

import pytest
import torch
from bench_programs import quick_peaks, quiet_machine, read_csv  # noqa: F401  (fixtures)

import dpo_triton
from benchmarks import bench_dpo_step, bench_linear, bench_parallel, bench_vocab
from benchmarks.common import command, measure, peers
from benchmarks.common.batches import Shape
from benchmarks.common.cases import Case, Setting, measure_case
from benchmarks.common.peers import Peer
from benchmarks.common.report import BOTH, FORWARD
from benchmarks.head import model, rows
from benchmarks.head.peers import candidates, upstream_of_simpo
from benchmarks.head.rows import FROZEN, TRAINED, Row


@pytest.fixture
def bench(monkeypatch, quiet_machine, quick_peaks):  # noqa: F811
    """The program on tiny shapes: a vocabulary of more than one tile, and one of less."""
    shapes = (Shape(4, 32, 4099, 24, bench_linear.HEADLINE), Shape(2, 8, 257, 16, "b"))
    monkeypatch.setattr(bench_linear, "SHAPES", {shape.name: shape for shape in shapes})
    return bench_linear


@pytest.mark.parametrize(
    "wrong", [lambda v: v + 1e-3, lambda v: v * torch.nan, lambda v: v.detach()]
)
def test_refuses_to_time_wrong_results(bench, monkeypatch, capsys, tmp_path, wrong):
    right = dpo_triton.fused_linear_seq_logprob
    monkeypatch.setattr(
        dpo_triton, "fused_linear_seq_logprob", lambda *a, **k: wrong(right(*a, **k))
    )
    path = tmp_path / "rows.csv"
    assert bench.main(["--device", "cpu", "--no-plot", "--csv", str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "dpo_triton, V = 257, float32, trained head" in err
    assert not path.exists()


def test_rows_of_every_case(bench, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "made" / "rows.csv"
    assert bench.main(["--quick", "--device", "cpu", "--seed", "7", "--csv", str(path)]) == 0
    out, _ = capsys.readouterr()
    found = read_csv(path)
    run = ["machine", "torch", "triton", "numba", "trl", "liger-kernel", "seed", "command"]
    assert list(found[0]) == [field.name for field in dataclasses.fields(Row)] + run
    ours = [row for row in found if row["impl"] == "dpo_triton"]
    shares = [0.25, 0.45, 1.0]
    case = ("model", "dtype", "scored_share", "passes", "head")
    assert [tuple(row[name] for name in case) for row in ours] == [
        (model, dtype, f"{share:g}", passes, head)
        for model, dtype, wanted in (
            (bench.HEADLINE, "float32", shares),
            ("b", "float32", shares),
            (bench.HEADLINE, "bfloat16", [0.45]),
        )
        for share in wanted
        for passes, head in bench.MODES
    ]  # fmt: skip
    for row in found:
        is_float32 = row["dtype"] == "float32"
        assert float(row["ms_p20"]) <= float(row["ms"]) <= float(row["ms_p80"])
        assert float(row["value_error"]) < (1e-5 if is_float32 else 0.05)
        has_grad = row["passes"] == "forward+backward"
        for name, has in (("hidden", has_grad), ("weight", has_grad and row["head"] == "trained")):
            error = row[f"{name}_grad_error"]
            assert (error != "") == has
            assert not has or float(error) < (1e-5 if is_float32 else 0.05)
    assert not [r for r in found if float(r["scored_share"]) == 1 and "scored rows" in r["impl"]]
    assert "time of the formula on the scored rows, 45% scored" in out
    assert "not run: Liger cross entropy" in out
    assert "modelled for a GPU, not measured" in out
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    modelled = path.with_name("rows-modelled.csv").read_text()
    assert modelled.count("modelled") == 12  # shares, heads, schemes


def test_a_peer_that_fails_is_named_and_ours_is_not_forgiven(bench, monkeypatch, tmp_path, capsys):
    def refuse(*inputs):
        raise RuntimeError("no memory, for the test\nand a second line")

    plain = candidates("auto")[:3]
    broken = Peer("broken", "", lambda: refuse)
    monkeypatch.setattr(bench, "candidates", lambda backend: [*plain, broken])
    options = ["--quick", "--model", "b", "--no-plot", "--csv", str(tmp_path / "rows.csv")]
    assert bench.main([*options, "--device", "cpu"]) == 0
    out, _ = capsys.readouterr()
    assert "not run: broken: RuntimeError: no memory, for the test: 9 times, at first with b" in out

    batch = bench.SHAPES["b"].draw(torch.float32, torch.Generator(), upstream_of_simpo)
    ours = Peer("ours", "", lambda: refuse, ours=True)
    run = command.Run("bench_linear", bench.parse_args, ["--no-plot"])
    with pytest.raises(RuntimeError, match="no memory"):
        measure_case(Case(batch, Setting(1.0, FORWARD, bench_linear.ONCE)), [ours], run)


def test_who_cannot_run_is_named():
    def of_another_version():
        raise AttributeError("no such function")

    runnable, not_run = peers.collect(
        [
            Peer("here", "", lambda: print),
            Peer("absent", "", lambda: print, "no_such_package.module"),
            Peer("old", "", of_another_version),
            Peer("elsewhere", "", of_another_version, obstacle="needs a GPU"),
        ]
    )
    assert [peer.name for peer in runnable] == ["here"]
    assert not_run == {
        "absent": "no_such_package is not installed",
        "old": "AttributeError: no such function",
        "elsewhere": "needs a GPU",
    }


def test_goals_follow_from_the_rows():
    def row(impl, ms, **more):
        cells = dict(
            impl=impl, model="m", hidden_size=8, vocab_size=1000, batch=4, seq_len=16,
            dtype="float32", scored_share=0.45, passes=BOTH, head=TRAINED, ms=ms,
            ms_p20=ms, ms_p80=ms, samples=1, peak_mib=60.0, value_error=1e-6, value_rounding=5e-7,
            hidden_grad_error=1e-6, hidden_grad_rounding=1e-7, weight_grad_error=2e-6,
            weight_grad_rounding=1e-7, of_floor=None,
        )  # fmt: skip
        return Row(**(cells | more))

    def verdicts(*measured):
        goals = rows.judge([*measured], "m")
        return [(goal.measured.split()[0], goal.met) for goal in goals]

    right = ("0.000", True)
    # Speed, peak, errors of values, of hidden's and of weight's gradient.
    assert verdicts(row("dpo_triton", 1.0), row("TRL", 3.6)) == [
        ("3.60x", True), ("60.0", True), right, right, right
    ]  # fmt: skip
    floor = row("log_softmax, scored rows", 1.0)
    worse = dict(peak_mib=65.0, value_error=2e-6, weight_grad_error=2.05e-6)
    assert verdicts(row("dpo_triton", 1.2, **worse), floor) == [
        ("1.20x", False), ("65.0", False), ("2.000", False), right, ("0.500", True)
    ]  # fmt: skip
    frozen = dict(head=FROZEN, weight_grad_error=None)
    # Against the formula that trains the head; its own row with a frozen one is none.
    assert verdicts(row("dpo_triton", 0.79, **frozen), floor) == [("0.79x", True), ("60.0", True)]
    whole = dict(scored_share=1.0)
    assert verdicts(
        row("dpo_triton", 1.0, **whole), row("TRL", 1.4, **whole), row("log_softmax", 0.9, **whole)
    )[:2] == [("1.40x", False), ("1.11x", True)]
    assert verdicts(row("TRL", 1.0)) == []


def test_modelled_counts():
    """By hand, of 16 columns a token: one tile for both, H = 2, all of 8192 tokens scored."""
    trl, ours, trl_frozen, ours_frozen = model.modelled("m", 2, 16, [1.0])
    assert (trl.tiles, ours.tiles) == (2, 1)  # TRL's have 4096 tokens
    assert (trl.products, trl_frozen.products, ours_frozen.products) == (4, 3, 2)
    assert ours.products == 3  # the one tile is kept for the backward pass
    assert trl.tile_bytes_per_token == 7 * 2 * 16
    assert ours.tile_bytes_per_token == 6 * 2 * 16
    assert ours_frozen.tile_bytes_per_token == 5 * 2 * 16
    assert trl.launches_per_token == 2 * 6 / 8192
    # Hidden states read 3 times and a float32 sum read and written; weights read 3 times a tile of
    # tokens, their sum read and written, and at last zeros, a read and a result.
    of_weight = 16 * 2 * (2 * (3 * 2 + 8) + 10)
    assert trl.bytes_per_token == 7 * 2 * 16 + 2 * (3 * 2 + 8) + of_weight / 8192


def test_a_partial_run_does_not_replace_the_whole_one():
    for options, name in (
        ([], "linear-amd.csv"),
        (["--model", *bench_linear.SHAPES], "linear-amd.csv"),
        (["--quick"], "linear-amd.local.csv"),
        (["--share", "1"], "linear-amd.local.csv"),
    ):
        run = command.Run("bench_linear", bench_linear.parse_args, options)
        csv, plot = run.paths("linear-amd")
        assert (csv.name, plot.name) == (name, name.replace(".csv", ".png"))


def test_on_a_gpu_it_measures_larger_heads_in_bfloat16(monkeypatch, capsys):
    args = bench_linear.parse_args(["--device", "cuda"])
    plans = bench_linear.plans_of(args)
    shapes = [plan.shape for plan in plans]
    assert [shape.name for shape in shapes] == list(bench_linear.GPU_SHAPES)
    settings = {(plan.dtype, setting.share) for plan in plans for setting in plan.settings}
    assert settings == {(torch.bfloat16, 1.0)}
    tokens = [shape.batch * shape.seq_len for shape in shapes]
    assert tokens == 2 * [1024, 8 * 1024, 64 * 1024]
    assert all(shape.vocab_size == 151936 and shape.batch % 2 == 0 for shape in shapes)

    monkeypatch.setattr(measure, "free_bytes", lambda device: 24 * 2**30)
    device = torch.device("cuda")
    fits = [shape.name for shape in shapes if bench_linear.has_room(shape, device)]
    assert fits == ["H896-1k", "H896-8k", "H896-64k", "H4096-1k", "H4096-8k"]
    assert "left out: H4096-64k needs 27 GiB" in capsys.readouterr().out


@pytest.mark.parametrize("program", [bench_vocab, bench_linear, bench_dpo_step, bench_parallel])
def test_help(program, capsys):
    with pytest.raises(SystemExit, match="0"):
        program.parse_args(["--help"])
    assert "--no-plot" in capsys.readouterr().out


def test_what_no_benchmark_can_do_is_refused(capsys):
    for program, options, said in (
        (bench_linear, ["--device", "mps"], "--device must be a cpu or cuda device, got mps"),
        (bench_linear, ["--share", "0"], "--share must be in (0, 1]"),
        (bench_vocab, ["--vocab", "6400", "1"], "--vocab must be 2 or more, got [6400, 1]"),
        (bench_vocab, ["--sizes", "8x64"], "--sizes must be BxTxV"),
        (bench_dpo_step, ["--seq-len", "1"], "--seq-len must be 2 or more, got 1"),
    ):
        with pytest.raises(SystemExit, match="2"):
            program.parse_args(options)
        assert said in capsys.readouterr().err
