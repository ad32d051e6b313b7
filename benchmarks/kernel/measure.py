"""The kernel benchmark on a GPU: times instead of counts."""

import statistics
from collections.abc import Callable, Iterator

import torch

from benchmarks.common import measure
from benchmarks.common.report import BACKWARD as BOTH
from benchmarks.common.report import FORWARD, Figure, Figures
from benchmarks.kernel.counts import (
    ALL,
    BACKWARD,
    HALF_SHIFT,
    Case,
    Counted,
    Inputs,
    complaint,
    make_inputs,
)
from benchmarks.kernel.peers import KernelPeer
from benchmarks.kernel.whole import SHAPES, Shape

DEVICE = torch.device("cuda")
COPY_NUMEL = 2**28
ROWS = 8192  # of logits, in sequences of SEQ_LEN; fewer where memory is short
SEQ_LEN = 1024
CHECKED_ROWS = 16
COPY_SHARE = "share of a copy's speed"
TIMED = (FORWARD, BACKWARD, BOTH)
CALL = "time of a call"
GRAPH = "in a CUDA graph"  # replayed: the host has no part in it


def complaints(peers: list[KernelPeer], vocab_size: int, dtype: torch.dtype) -> list[str]:
    """Compare each with float64 on a small batch; return what is wrong."""
    logits, labels = random_batch(2, CHECKED_ROWS // 2, vocab_size, dtype)
    found = []
    for peer in peers:
        for case in (ALL, HALF_SHIFT):
            inputs = make_inputs(logits, labels, case)
            leaf = logits.clone().requires_grad_()
            values = peer.fn(leaf, labels, inputs.mask, case.shift)
            (grad,) = torch.autograd.grad(values.sum(), leaf)
            wrong = complaint(peer, inputs, Counted({}, values.detach(), grad, {}))
            if wrong is not None:
                found.append(f"{peer.name}, scored: {case}: {wrong}")
    return found


def rows(
    peers: list[KernelPeer], vocab_size: int, dtype: torch.dtype, quick: bool
) -> tuple[Figures, float]:
    """Return a row for each time, and the speed of a copy in GB/s, read and written."""
    from tqdm import tqdm

    copy = measure.copy_gb_per_s(DEVICE, numel=COPY_NUMEL, min_run_s=0.5)
    # Logits, their copy, gradient and its slice, and room to spare.
    most = measure.free_bytes(DEVICE) // (8 * vocab_size * dtype.itemsize)
    batch = max(1, min(ROWS, most) // SEQ_LEN)
    logits, labels = random_batch(batch, min(SEQ_LEN, most), vocab_size, dtype)
    run_s = 0.1 if quick else 0.5
    result = Figures()
    with tqdm(total=2 * len(TIMED) * len(peers), unit="time", leave=False) as progress:
        for case in (ALL, HALF_SHIFT):
            for peer in peers:
                inputs = make_inputs(logits, labels, case)
                for passes in TIMED:
                    progress.set_description(f"{peer.name}, {passes}, scored: {case}")
                    if (fn := timed(peer, inputs, passes)) is not None:
                        samples = measure.times_ms(fn, DEVICE, min_run_s=run_s)
                        result += time_rows(peer.name, inputs, passes, samples, copy)
                    progress.update()
    return result, copy


def whole_rows(peers: list[KernelPeer], dtype: torch.dtype, quick: bool) -> Figures:
    """Return the time of whole calls where what is beside the streaming kernels counts: as the host
    starts them, and replayed from a CUDA graph."""
    result = Figures()
    for shape in SHAPES:
        if 10 * shape.batch * shape.seq_len * shape.vocab_size > measure.free_bytes(DEVICE):
            print(f"not run: {shape}: 10 bytes a logit do not fit")
            continue
        logits, labels = random_batch(shape.batch, shape.seq_len, shape.vocab_size, dtype)
        inputs = make_inputs(logits, labels, Case(shape.share, False))
        del logits
        for peer in peers:
            for passes in (FORWARD, BOTH):
                fn = timed(peer, inputs, passes)
                assert fn is not None
                result += call_rows(peer.name, passes, shape, fn, 0.05 if quick else 0.2)
    return result


def call_rows(
    impl: str, passes: str, shape: Shape, fn: Callable[[], object], run_s: float
) -> Iterator[Figure]:
    """Medians of one call, in ms; None where a peer cannot be captured."""
    ways = {CALL: fn}
    if (replay := captured(fn)) is not None:
        ways[f"{CALL} {GRAPH}"] = replay
    for quantity, way in ways.items():
        median = statistics.median(measure.times_ms(way, DEVICE, min_run_s=run_s))
        yield Figure(impl, passes, "gpu", str(shape), quantity, "ms", median, "measured")


def captured(fn: Callable[[], object]) -> Callable[[], object] | None:
    """What replays fn from a CUDA graph, or None."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(stream):
            fn()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            fn()
    except RuntimeError:  # a peer that waits for the host
        torch.cuda.synchronize()
        return None
    return graph.replay


def whole_table(rows: Figures) -> str:
    cells = {
        name: ("{:.4f}", dict(quantity=quantity))
        for name, quantity in (("ms", CALL), (f"ms {GRAPH}", f"{CALL} {GRAPH}"))
    }
    return rows.pivot({"shape": "case", "pass": "passes", "implementation": "impl"}, cells)


def timed(peer: KernelPeer, inputs: Inputs, passes: str) -> Callable[[], object] | None:
    """What to time, or None: a gradient that the forward wrote has no backward of its own."""
    logits, labels, mask, case = inputs
    if passes == FORWARD:

        def forward() -> object:
            with torch.no_grad():
                return peer.fn(logits, labels, mask, case.shift)

        return forward
    leaf = logits.detach().requires_grad_()
    if passes == BACKWARD:
        if peer.overwrites_logits:
            return None
        value = peer.fn(leaf, labels, mask, case.shift).sum()
        return lambda: torch.autograd.grad(value, leaf, retain_graph=True)
    return lambda: torch.autograd.grad(peer.fn(leaf, labels, mask, case.shift).sum(), leaf)


def time_rows(
    impl: str, inputs: Inputs, passes: str, samples: list[float], copy_gb_per_s: float
) -> Iterator[Figure]:
    """Figures of one timing: samples in ms, the least bytes over the median, and its share of a
    copy's speed."""
    logits = inputs.logits
    scored = inputs.num_scored * logits.shape[-1] * logits.element_size()
    least = {FORWARD: scored, BACKWARD: scored + logits.nbytes}
    least[BOTH] = sum(least.values())
    median = statistics.median(samples)
    ordered = sorted(samples)
    gb_per_s = least[passes] / median / 1e6
    for quantity, unit, value in (
        ("time", "ms", median),
        ("time, p20", "ms", ordered[len(ordered) // 5]),
        ("time, p80", "ms", ordered[len(ordered) * 4 // 5]),
        ("least bytes over time", "GB/s", gb_per_s),
        (COPY_SHARE, "share", gb_per_s / copy_gb_per_s),
    ):
        yield Figure(impl, passes, "gpu", str(inputs.case), quantity, unit, value, "measured")


def table(rows: Figures) -> str:
    columns = {
        "ms": ("time", "{:.3f}"),
        "p20": ("time, p20", "{:.3f}"),
        "p80": ("time, p80", "{:.3f}"),
        "GB/s": ("least bytes over time", "{:.0f}"),
        "of copy": (COPY_SHARE, "{:.1%}"),
    }
    cells = {name: (form, dict(quantity=q)) for name, (q, form) in columns.items()}
    return rows.pivot({"implementation": "impl", "scored": "case", "pass": "passes"}, cells)


def random_batch(
    batch: int, seq_len: int, vocab_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    # A generator of its own: a capture that fails leaves the default one unusable.
    draw = torch.Generator(DEVICE)
    draw.manual_seed(0)
    logits = torch.empty((batch, seq_len, vocab_size), dtype=dtype, device=DEVICE)
    for rows in logits:
        rows.copy_(3 * torch.randn(rows.shape, device=DEVICE, generator=draw))
    labels = torch.randint(vocab_size, (batch, seq_len), device=DEVICE, generator=draw)
    return logits, labels
