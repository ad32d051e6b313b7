"""The kernel benchmark's counts are right, and wrong results are refused."""

from collections import Counter

import pytest
import torch
from bench_programs import read_csv

pytest.importorskip("tqdm")

import dpo_triton
from benchmarks import bench_kernels
from benchmarks.common.batches import Shape
from benchmarks.common.command import Run
from benchmarks.common.logits_peers import LIGER, TRL_KERNEL, kernels, sliced
from benchmarks.common.peers import OURS, Peer
from benchmarks.common.report import Figure, Figures, aligned
from benchmarks.kernel import cases, measure
from benchmarks.kernel.tables import FLOOR, MEASURED, MEMORY, PTX, TIME
from gpu_lab.driver import emulate
from gpu_lab.loops import Instruction, streaming_loop
from gpu_lab.operators import Operators, traffic
from tools import tune_kernels

V = 4096
TINY = ["--vocab", str(V), "--quick", "--no-plot"]


@pytest.fixture(autouse=True)
def as_if_without_gpu(monkeypatch):
    """Where there is one the program would measure."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def without_peers(monkeypatch):
    monkeypatch.setattr(bench_kernels, "kernels", lambda: kernels()[:1])


def read(path):
    return [row | dict(value=number(row["value"])) for row in read_csv(path)]


def number(text):
    try:
        return float(text)
    except ValueError:
        return text


def fields(row):
    return {name: row[name] for name in Figure.__dataclass_fields__}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_counts_without_peers(monkeypatch, capsys, tmp_path, dtype):
    without_peers(monkeypatch)
    arguments = [*TINY, "--dtype", dtype, "--output", str(tmp_path)]
    assert bench_kernels.main(arguments) == 0
    out = capsys.readouterr().out
    assert "published us" in out
    assert "890.0" in out  # of TRL's kernel, by its authors

    cells = read(tmp_path / "kernels-modelled.local.csv")
    assert {row["impl"] for row in cells} == {OURS}
    assert all(row["command"].endswith(" ".join(arguments)) for row in cells)
    assert {row["how"] for row in cells} >= {"counted", "static", "modelled"}
    assert all("modelled" in row["quantity"] for row in cells if row["how"] == "modelled")
    rows = Figures(Figure(**fields(row)) for row in cells)
    size = getattr(torch, dtype).itemsize
    three_of_four = 0.75  # with the shift a sequence of 4 tokens has 3 rows to read
    for case, scored in {
        "all": 1,
        "50%": 0.5,
        "all, shift": three_of_four,
        "50%, shift": 0.5,
    }.items():
        for passes, loaded, stored in (("forward", scored, 0), ("backward", scored, 1)):
            key = dict(passes=passes, case=case, where="sm_90")
            found = [rows.value(f"{kind} bytes per logit", **key) for kind in ("loaded", "stored")]
            # Beside the logits: some hundred bytes for each row.
            assert found == pytest.approx([size * loaded, size * stored], abs=0.05), (case, passes)
            assert rows.value("PyTorch's bytes per logit", **key) == 0
    for passes, most in (("forward", 1.2), ("backward", 1.0)):
        key = dict(passes=passes, where="sm_90")
        assert 1.0 <= rows.value("exp2 per logit", **key) <= most
        assert 3 < rows.value(PTX, **key) < 30
        assert rows.value("launches", **key) == (3 if passes == "forward" else 1)
        assert rows.value("spills", **key) == 0
        assert rows.value("16-byte share of loads", **key) > 0.98
        for device in ("H100 SXM", "H200", "MI300X"):
            key = dict(passes=passes, where=device, case="all")
            assert rows.value(TIME, **key) >= rows.value(MEMORY, **key) > 0
            assert rows.value(MEMORY, **key) >= rows.value(FLOOR, **key)
    assert rows.value(TIME, where="B200") is None  # its target was not compiled for


@pytest.mark.parametrize(
    "wrong", [lambda v: v * 1.01, lambda v: v.detach() + 0 * v, lambda v: v * torch.nan]
)
def test_refuses_wrong_results(monkeypatch, capsys, tmp_path, wrong):
    without_peers(monkeypatch)
    right = dpo_triton.fused_seq_logprob
    monkeypatch.setattr(dpo_triton, "fused_seq_logprob", lambda *a, **k: wrong(right(*a, **k)))
    assert bench_kernels.main([*TINY, "--output", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "wrong results" in err
    assert f"{OURS}, sm_90" in err
    assert "instructions" not in out
    assert not list(tmp_path.iterdir())


def test_a_peer_that_fails_is_said(monkeypatch, capsys, tmp_path):
    def fail(logits, labels, mask, **options):
        raise RuntimeError("no such kernel, for the test")

    broken = Peer(LIGER, "", lambda: fail)
    absent = Peer(TRL_KERNEL, "", lambda: fail, "no_such_package")
    monkeypatch.setattr(bench_kernels, "kernels", lambda: [kernels()[0], broken, absent])
    monkeypatch.setattr(bench_kernels, "CASES", (cases.ALL, cases.HALF_SHIFT))
    assert bench_kernels.main([*TINY[:-1], "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"not run: {LIGER}: RuntimeError: no such kernel" in out
    assert f"not run: {TRL_KERNEL}: no_such_package is not installed" in out
    assert (tmp_path / "kernels-modelled.local.png").stat().st_size > 0


def test_torch_traffic_is_that_of_the_operators():
    logits = torch.zeros(2, 4, V, dtype=torch.bfloat16, requires_grad=True)
    whole, part = 2 * 4 * V * 2, 2 * 3 * V * 2
    with Operators() as operators:
        result = logits[:, :-1]  # a view
    assert traffic(operators.started, V) == (0, 0)
    with Operators() as operators:
        torch.autograd.grad(result, logits, torch.ones_like(result))
    ones = part  # torch.ones_like
    assert traffic(operators.started, V) == (part, ones + whole + part)
    with Operators() as operators:
        result.detach().reshape(-1, V)  # a copy
        torch.zeros(V - 1).clone()  # too small to count
    assert traffic(operators.started, V) == (part, part)


def test_shared_reads_count_once():
    """A token's label is read by all threads of a program: 8 bytes, not 8 for each thread."""
    labels = torch.zeros(1, 8, dtype=torch.int64)
    with emulate("sm_90") as lab, torch.no_grad():
        dpo_triton.fused_seq_logprob(torch.zeros(1, 8, 64), labels, backend="triton")
    partials = lab.launches[0]
    assert partials.distinct["load"] < 8 * (64 * 4 + 8 + 4) + 64 <= partials.bytes_loaded
    assert len(lab.launched) == len(lab.launches)


def test_shortest_way_takes_the_smaller_branch():
    """head -> (2 instructions | 5) -> latch; the loop reads memory at its head."""
    step = lambda opcode, target=None, falls=True: Instruction(opcode, "", target, falls)  # noqa: E731
    program = [step("LDG"), step("BRA", 4)]
    program += [step("SMALL"), step("BRA", 9, False)]
    program += [step("LARGE")] * 5
    program += [step("LATCH"), step("BRA", 0), step("EXIT", None, False)]
    loop = streaming_loop(program, lambda i: i.opcode == "LDG")
    opcodes = Counter(i.opcode for i in loop.shortest)
    assert opcodes == {"LDG": 1, "BRA": 3, "SMALL": 1, "LATCH": 1}
    assert len(loop.hot) < len(loop.shortest) < len(loop.body)


def test_tuning_marks_the_chosen_setting(monkeypatch, capsys):
    monkeypatch.setattr(tune_kernels, "QUICK_BLOCKS", (512,))
    assert tune_kernels.main(["--quick", "--vocab", "16384", "--target", "sm_90"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for kernel in ("partials", "grad"):
        with emulate("sm_90"):
            chosen, _ = tune_kernels.chosen_setting(kernel, 16384, torch.bfloat16)
        marked = [line.split() for line in lines if line.endswith("chosen")]
        assert [str(chosen.block), str(chosen.threads)] in [line[:2] for line in marked]
    assert len(marked) == 2
    assert sum(line.strip().startswith("512 ") for line in lines) == 2


def test_measured_rows():
    logits = torch.zeros(2, 4, V, dtype=torch.bfloat16)
    labels = torch.zeros(2, 4, dtype=torch.int64)
    inputs = cases.make_inputs(logits, labels, cases.HALF_SHIFT)
    plan = measure.Plan("some", inputs, measure.TIMED, 1.0)
    rows = Figures()
    for passes in measure.TIMED:
        samples = [0.004, 0.002, 0.001, 0.003, 0.005]
        rows += measure.time_figures(OURS, passes, plan, samples, copy_gb_per_s=20.0)
    assert rows.value("time", passes="forward") == 0.003
    assert rows.value("time, p20") == pytest.approx(0.0018)
    assert rows.value("time, p80") == pytest.approx(0.0042)
    scored = 2 * 2 * V * 2  # bytes
    for passes, least in (
        ("forward", scored),
        ("backward", 3 * scored),
        ("forward+backward", 4 * scored),
    ):
        speed = rows.value("least bytes over time", passes=passes)
        assert speed == pytest.approx(least / 0.003e-3 / 1e9)
        assert rows.value(measure.COPY_SHARE, passes=passes) == pytest.approx(speed / 20)
    table = rows.pivot(*MEASURED)
    assert len(table.splitlines()) == 4
    assert "0.0030  0.0018  0.0042" in table
    overwriting = Peer(LIGER, "", lambda: print, overwrites_logits=True)
    assert measure.timed(overwriting, inputs, "backward") is None


def plain(logits, labels, mask, *, reduction, shift):
    assert reduction == "sum"
    logits, labels, mask = sliced(logits, labels, mask, shift)
    logps = logits.float().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    return (logps if mask is None else logps * mask).sum(1)


@pytest.mark.parametrize("error", [0.0, 0.1])
def test_a_gpu_is_measured(monkeypatch, capsys, tmp_path, error):
    """The same command, with a CPU for the GPU and plain PyTorch for the kernels."""
    peer = Peer(
        OURS, "", lambda: lambda *batch, **how: plain(*batch, **how) * (1 + error), ours=True
    )
    absent = Peer(TRL_KERNEL, "", lambda: plain, obstacle="not here")
    monkeypatch.setattr(bench_kernels, "kernels", lambda: [peer, absent])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)  # PyTorch's clock would
    for name, value in dict(DEVICE=torch.device("cpu"), COPY_NUMEL=2**16, ROWS=16).items():
        monkeypatch.setattr(measure, name, value)
    monkeypatch.setattr(measure, "SEQ_LEN", 8)
    small = cases.WholeCall(Shape(2, 4, 257, name="small"), cases.ALL)
    monkeypatch.setattr(measure, "WHOLE_CALLS", [small])
    monkeypatch.setattr(measure, "captured", lambda fn: None)
    command = ["--vocab", "257", "--quick", "--no-plot", "--output", str(tmp_path)]
    status = bench_kernels.main(command)
    out, err = capsys.readouterr()
    if error:
        assert status == 1
        assert "wrong results" in err
        assert not list(tmp_path.iterdir())
        return
    assert status == 0
    assert "not run: TRL kernel: not here" in out
    (path,) = tmp_path.iterdir()
    cells = read(path)
    assert {row["how"] for row in cells} == {"measured"}
    assert len(cells) == 2 * 3 * 5 + 2 * 5  # cases, passes, quantities; calls of one shape
    assert all(row["value"] > 0 for row in cells)


def test_a_partial_run_gets_a_name_that_git_ignores():
    for arguments, suffix in (
        ([], ""),
        (["--seed", "3", "--output", "there"], ""),
        (["--vocab", "128"], ".local"),
        (["--quick"], ".local"),
    ):
        run = Run("bench_kernels", bench_kernels.parse_args, ["--no-plot", *arguments])
        assert run.paths("a")[0].name == f"a{suffix}.csv"
    assert aligned([("a", "b"), ("aa", "bb")], 1) == "a    b\naa  bb"
