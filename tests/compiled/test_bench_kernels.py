"""The kernel benchmark's counts are right, wrong results are refused, and goals judged by rows."""

import csv
from collections import Counter

import pytest
import torch

pytest.importorskip("tqdm")

import bench_kernels
import kernel_counts
import kernel_goals
import kernel_measure
import kernel_peers
import kernel_report
import tune_kernels
from gpu_lab.driver import emulate
from gpu_lab.loops import Instruction, streaming_loop
from kernel_peers import LIGER, OURS, TRL, KernelPeer
from kernel_report import BINDING, FLOOR, MEMORY, PTX, TIME, Row, Rows

import dpo_triton

V = 4096
TINY = ["--vocab", str(V), "--quick", "--no-plot"]


@pytest.fixture(autouse=True)
def as_if_without_gpu(monkeypatch):
    """Where there is one the program would measure."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def without_peers(monkeypatch):
    monkeypatch.setattr(kernel_peers, "why_not", lambda module: f"no {module}, for the test")


def read(path):
    with path.open() as file:
        return [row | dict(value=number(row["value"])) for row in csv.DictReader(file)]


def number(text):
    try:
        return float(text)
    except ValueError:
        return text


def fields(row):
    return {name: row[name] for name in Row.__dataclass_fields__}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_counts_without_peers(monkeypatch, capsys, tmp_path, dtype):
    without_peers(monkeypatch)
    arguments = [*TINY, "--dtype", dtype, "--output", str(tmp_path)]
    assert bench_kernels.main(arguments) == 0
    out = capsys.readouterr().out
    for name, module in kernel_peers.MODULES.items():
        assert f"not run: {name}: no {module}" in out
    assert "goals: none can be judged" in out
    assert "published 0.89 ms" in out

    cells = read(tmp_path / "kernels-modelled.local.csv")
    assert {row["impl"] for row in cells} == {OURS}
    assert all(row["command"].endswith(" ".join(arguments)) for row in cells)
    assert {row["how"] for row in cells} >= {"counted", "static", "modelled"}
    assert all("modelled" in row["quantity"] for row in cells if row["how"] == "modelled")
    rows = Rows(Row(**fields(row)) for row in cells)
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
        assert rows.value("launches", **key) == (2 if passes == "forward" else 1)
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
    def fail(logits, labels, mask, shift):
        raise RuntimeError("no such kernel, for the test")

    ours = kernel_peers.ours()
    broken = KernelPeer(LIGER, fail, ours.tile)
    monkeypatch.setattr(kernel_peers, "collect", lambda dtype: ([ours, broken], {}))
    monkeypatch.setattr(bench_kernels, "CASES", (kernel_counts.ALL, kernel_counts.HALF_SHIFT))
    assert bench_kernels.main([*TINY[:-1], "--output", str(tmp_path)]) == 0
    assert f"not run: {LIGER}: RuntimeError: no such kernel" in capsys.readouterr().out
    assert (tmp_path / "kernels-modelled.local.png").stat().st_size > 0


def test_torch_traffic_is_that_of_the_operators():
    logits = torch.zeros(2, 4, V, dtype=torch.bfloat16, requires_grad=True)
    whole, part = 2 * 4 * V * 2, 2 * 3 * V * 2
    with kernel_counts.TorchTraffic(V) as traffic:
        result = logits[:, :-1]  # a view
    assert (traffic.loaded, traffic.stored) == (0, 0)
    with kernel_counts.TorchTraffic(V) as traffic:
        torch.autograd.grad(result, logits, torch.ones_like(result))
    ones = part  # torch.ones_like
    assert (traffic.loaded, traffic.stored - ones) == (part, whole + part)
    with kernel_counts.TorchTraffic(V) as traffic:
        result.detach().reshape(-1, V)  # a copy
        torch.zeros(V - 1).clone()  # too small to count
    assert (traffic.loaded, traffic.stored) == (part, part)


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


def goal_rows(instructions=7.0, theirs=17.0, loaded=1.0, time=1.0, torch_bytes=0.0):
    rows = Rows()
    for passes in ("forward", "backward"):
        for target in kernel_goals.TARGETS:
            rows.append(Row(OURS, passes, target, "all", PTX, "", instructions, "counted"))
            rows.append(Row(TRL, passes, target, "all", PTX, "", theirs, "counted"))
        stored = 0.0 if passes == "forward" else 2.0
        for case, scale in (("all", 2.0), ("50%, shift", 1.0)):
            for quantity, value in (
                ("loaded bytes per logit", loaded * scale),
                ("stored bytes per logit", stored),
                ("PyTorch's bytes per logit", torch_bytes),
            ):
                rows.append(Row(OURS, passes, "sm_90", case, quantity, "", value, "counted"))
        for device in kernel_goals.MEMORY_SLACK:
            others = f"{TIME} of issue slots in the kernel"
            for quantity, value in (
                (TIME, time),
                (MEMORY, 1.0),
                (BINDING, "memory"),
                (others, 0.5),
            ):
                rows.append(Row(OURS, passes, device, "all", quantity, "ms", value, "modelled"))
    return rows


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        (dict(), 0),
        (dict(instructions=8.0), 2),  # the forwards
        (dict(instructions=8.6), 4 + 2),  # and over half of TRL's forward
        (dict(theirs=13.0), 2),  # 0.54 of TRL's
        (dict(loaded=1.004), 0),
        (dict(loaded=1.02), 4),  # 1.02 + 2 is 0.7 % above
        (dict(torch_bytes=6.0), 4),
        (dict(time=1.1), 4),  # H100 and H200
        (dict(time=1.2), 6),
    ],
)
def test_goals_are_judged_by_rows(changed, missed):
    goals = kernel_goals.judge(goal_rows(**changed))
    assert len(goals) == 8 + 4 + 6
    assert sum(not goal.met for goal in goals) == missed, kernel_goals.goals_text(goals)
    assert kernel_goals.goals_text(goals).count("MISSED") == missed


def test_goals_without_trl():
    rows = Rows(row for row in goal_rows() if row.impl == OURS)
    assert len(kernel_goals.judge(rows)) == 4 + 4 + 6


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
    inputs = kernel_counts.make_inputs(logits, labels, kernel_counts.HALF_SHIFT)
    rows = Rows()
    for passes in kernel_measure.TIMED:
        samples = [0.004, 0.002, 0.001, 0.003, 0.005]
        rows += kernel_measure.time_rows(OURS, inputs, passes, samples, copy_gb_per_s=20.0)
    assert rows.value("time", passes="forward") == 0.003
    assert rows.value("time, p20") == 0.002
    assert rows.value("time, p80") == 0.005
    scored = 2 * 2 * V * 2  # bytes
    for passes, least in (
        ("forward", scored),
        ("backward", 3 * scored),
        ("forward+backward", 4 * scored),
    ):
        speed = rows.value("least bytes over time", passes=passes)
        assert speed == pytest.approx(least / 0.003e-3 / 1e9)
        assert rows.value(kernel_measure.COPY_SHARE, passes=passes) == pytest.approx(speed / 20)
    table = kernel_measure.table(rows)
    assert len(table.splitlines()) == 4
    assert "0.003  0.002 - 0.005" in table
    overwriting = KernelPeer(LIGER, lambda *a: None, lambda *a: 1, overwrites_logits=True)
    assert kernel_measure.timed(overwriting, inputs, "backward") is None


def plain(logits, labels, mask, shift):
    logits, labels, mask = kernel_peers.sliced(logits, labels, mask, shift)
    logps = logits.float().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    return kernel_peers.masked_sum(logps, mask)


@pytest.mark.parametrize("error", [0.0, 0.1])
def test_a_gpu_is_measured(monkeypatch, capsys, tmp_path, error):
    """The same command, with a CPU for the GPU and plain PyTorch for the kernels."""
    peer = KernelPeer(OURS, lambda *batch: plain(*batch) * (1 + error), lambda *where: 1)
    monkeypatch.setattr(kernel_peers, "collect", lambda dtype: ([peer], {TRL: "not here"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in dict(DEVICE=torch.device("cpu"), COPY_NUMEL=2**16, ROWS=16).items():
        monkeypatch.setattr(kernel_measure, name, value)
    monkeypatch.setattr(kernel_measure, "SEQ_LEN", 8)
    status = bench_kernels.main(["--vocab", "257", "--quick", "--output", str(tmp_path)])
    out, err = capsys.readouterr()
    if error:
        assert status == 1
        assert "wrong results" in err
        assert not list(tmp_path.iterdir())
        return
    assert status == 0
    assert "not run: TRL: not here" in out
    (path,) = tmp_path.iterdir()
    cells = read(path)
    assert {row["how"] for row in cells} == {"measured"}
    assert len(cells) == 2 * 3 * 5  # cases, passes, quantities
    assert all(row["value"] > 0 for row in cells)


def test_a_partial_run_gets_a_name_that_git_ignores():
    for arguments, suffix in (([], ""), (["--vocab", "128"], ".local"), (["--quick"], ".local")):
        args = bench_kernels.parse_args(arguments)
        assert bench_kernels.output_path(args, "a").name == f"a{suffix}.csv"
    assert kernel_report.aligned([("a", "b"), ("aa", "bb")], 1) == "a    b\naa  bb"
