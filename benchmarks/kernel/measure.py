"""The kernel benchmark on a GPU: times instead of counts."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.common import measure
from benchmarks.common.batches import Shape
from benchmarks.common.peers import Peer
from benchmarks.common.report import BACKWARD, BOTH, FORWARD, Figures, figures
from benchmarks.kernel.cases import ALL, HALF_SHIFT, WHOLE_CALLS, Inputs, complaint, make_inputs
from benchmarks.kernel.tables import COPY_SHARE, IN_GRAPH

DEVICE = torch.device("cuda")
COPY_NUMEL = 2**28
ROWS = 8192  # of logits, in sequences of SEQ_LEN; fewer where memory is short
SEQ_LEN = 1024
CHECKED_ROWS = 16
TIMED = (FORWARD, BACKWARD, BOTH)


def complaints(peers: list[Peer], vocab_size: int, dtype: torch.dtype) -> list[str]:
    """Compare each with float64 on a small batch; return what is wrong."""
    logits, labels = random_batch(Shape(2, CHECKED_ROWS // 2, vocab_size), dtype)
    found = []
    for peer, case in itertools.product(peers, (ALL, HALF_SHIFT)):
        inputs = make_inputs(logits, labels, case)
        leaf = logits.clone().requires_grad_()
        values = inputs.sums(peer, leaf)
        (grad,) = torch.autograd.grad(values.sum(), leaf)
        wrong = complaint(peer, inputs, values.detach(), grad)
        if wrong is not None:
            found.append(f"{peer.name}, scored: {case}: {wrong}")
    return found


class Plan(NamedTuple):
    """What is timed of one batch."""

    case: str
    inputs: Inputs
    passes: Sequence[str]
    run_s: float  # of each time
    in_graph: bool = False  # replayed from a CUDA graph too


def of_rows(vocab_size: int, dtype: torch.dtype, quick: bool) -> Iterator[Plan]:
    """Many rows, where the streaming kernels are all of the time."""
    # Logits, their copy, gradient and its slice, and room to spare.
    most = measure.free_bytes(DEVICE) // (8 * vocab_size * dtype.itemsize)
    batch = max(1, min(ROWS, most) // SEQ_LEN)
    shape = Shape(batch, min(SEQ_LEN, most), vocab_size)
    logits, labels = random_batch(shape, dtype)
    for case in (ALL, HALF_SHIFT):
        inputs = make_inputs(logits, labels, case)
        yield Plan(str(case), inputs, TIMED, 0.1 if quick else 0.5)


def of_calls(dtype: torch.dtype, quick: bool) -> Iterator[Plan]:
    """Whole calls where what is beside the streaming kernels counts: as the host starts them, and
    replayed from a CUDA graph."""
    for one in WHOLE_CALLS:
        if 10 * one.shape.num_logits > measure.free_bytes(DEVICE):
            print(f"not run: {one}: 10 bytes a logit do not fit")
            continue
        inputs = make_inputs(*random_batch(one.shape, dtype), one.case)
        yield Plan(str(one), inputs, (FORWARD, BOTH), 0.05 if quick else 0.2, in_graph=True)


def measured(
    peers: list[Peer], vocab_size: int, dtype: torch.dtype, quick: bool, copy_gb_per_s: float
) -> Figures:
    """Time each peer on each batch."""
    from tqdm import tqdm

    result = Figures()
    plans = itertools.chain(of_rows(vocab_size, dtype, quick), of_calls(dtype, quick))
    with tqdm(total=2 + len(WHOLE_CALLS), unit="batch", leave=False) as progress:
        for plan in plans:
            for peer, passes in itertools.product(peers, plan.passes):
                progress.set_description(f"{peer.name}, {passes}, {plan.case}")
                result += measured_pass(peer, passes, plan, copy_gb_per_s)
            progress.update()
            del plan  # before the next one is drawn
    return result


def measured_pass(peer: Peer, passes: str, plan: Plan, copy_gb_per_s: float) -> Figures:
    """What a peer cannot do, such as a backward pass of its own or to be captured, is not there."""
    fn = timed(peer, plan.inputs, passes)
    if fn is None:
        return Figures()
    samples = measure.times_ms(fn, DEVICE, min_run_s=plan.run_s)
    result = time_figures(peer.name, passes, plan, samples, copy_gb_per_s)
    if plan.in_graph and (replay := captured(fn)) is not None:
        median = float(np.median(measure.times_ms(replay, DEVICE, min_run_s=plan.run_s)))
        values = {IN_GRAPH: ("ms", median)}
        result += figures(peer.name, passes, "gpu", plan.case, "measured", values)
    return result


def time_figures(
    impl: str, passes: str, plan: Plan, samples: list[float], copy_gb_per_s: float
) -> Figures:
    """Of one timing: samples in ms, the least bytes over the median, and its share of a copy's
    speed."""
    logits = plan.inputs.logits
    num_scored = plan.inputs.num_scored * logits.shape[-1]
    least = measure.least_bytes(logits.numel(), num_scored, logits.element_size())[passes]
    p20, median, p80 = np.quantile(samples, [0.2, 0.5, 0.8]).tolist()
    gb_per_s = least / median / 1e6
    values = {
        "time": ("ms", median),
        "time, p20": ("ms", p20),
        "time, p80": ("ms", p80),
        "least bytes over time": ("GB/s", gb_per_s),
        COPY_SHARE: ("share", gb_per_s / copy_gb_per_s),
    }
    return figures(impl, passes, "gpu", plan.case, "measured", values)


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


def timed(peer: Peer, inputs: Inputs, passes: str) -> Callable[[], object] | None:
    """What to time, or None: a gradient that the forward wrote has no backward of its own."""
    if passes == FORWARD:
        return torch.no_grad()(lambda: inputs.sums(peer, inputs.logits))
    leaf = inputs.logits.detach().requires_grad_()
    if passes == BACKWARD:
        if peer.overwrites_logits:
            return None
        value = inputs.sums(peer, leaf).sum()
        return lambda: torch.autograd.grad(value, leaf, retain_graph=True)
    return lambda: torch.autograd.grad(inputs.sums(peer, leaf).sum(), leaf)


def random_batch(shape: Shape, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels."""
    # A generator of its own: a capture that fails leaves the default one unusable.
    batch = shape.draw(dtype, torch.Generator(DEVICE).manual_seed(0))
    return batch.rows, batch.labels
