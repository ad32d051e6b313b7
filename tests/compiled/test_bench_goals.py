"""What the kernels must hold beside the peers': instructions and bytes a logit, and what binds.

Instructions and bytes are counted in the emulator, times modelled; in bfloat16, V = 131072.
"""

from functools import cache

import pytest
import torch

from benchmarks.common.logits_peers import TRL_KERNEL, kernels
from benchmarks.common.peers import OURS, collect
from benchmarks.common.report import BACKWARD, FORWARD
from benchmarks.kernel.cases import ALL, HALF_SHIFT, PASSES, make_inputs
from benchmarks.kernel.counts import count
from benchmarks.kernel.figures import modelled, of_work
from benchmarks.kernel.tables import MEMORY, PTX, TIME
from gpu_lab.driver import emulate

VOCAB_SIZE, SEQ_LEN = 131072, 2
TARGETS = ("sm_90", "sm_100")
INSTRUCTIONS = {FORWARD: 7.5, BACKWARD: 8.5}  # a logit, and
SHARE_OF_TRL = {FORWARD: 0.5, BACKWARD: 0.55}
# Case -> pass -> (bytes loaded, bytes stored) a logit of the batch.
BYTES = {
    HALF_SHIFT: {FORWARD: (1.0, 0.0), BACKWARD: (1.0, 2.0)},
    ALL: {FORWARD: (2.0, 0.0), BACKWARD: (2.0, 2.0)},
}
BYTES_SLACK = 0.005
MEMORY_SLACK = {"H100 SXM": 1.0, "H200": 1.0, "B200": 1.15}  # modelled time over memory's


@cache
def figures(name, target, case):
    """Of one implementation: counted, and modelled for the target's devices."""
    with emulate(target):
        runnable, _ = collect(kernels())
    peer = next((peer for peer in runnable if peer.name == name), None)
    if peer is None:
        pytest.skip(f"{name} is not installed")
    logits = torch.randn(1, SEQ_LEN, VOCAB_SIZE).mul_(3).bfloat16()
    inputs = make_inputs(logits, torch.randint(VOCAB_SIZE, (1, SEQ_LEN)), case)
    counted = count(peer, inputs, target)
    rows = of_work(name, target, inputs, counted.work, 0.0)
    rows += modelled(name, inputs, counted.work, {target: counted.loops()})
    return rows


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("target", TARGETS)
def test_instructions_a_logit(target, passes):
    mine = figures(OURS, target, ALL).value(PTX, passes=passes)
    assert mine <= INSTRUCTIONS[passes]
    assert mine <= SHARE_OF_TRL[passes] * figures(TRL_KERNEL, target, ALL).value(PTX, passes=passes)


@pytest.mark.parametrize("case", BYTES, ids=str)
def test_bytes_a_logit(case):
    rows = figures(OURS, "sm_90", case)
    for passes, (loaded, stored) in BYTES[case].items():
        moved = ("loaded", "stored", "PyTorch's")
        found = [rows.value(f"{kind} bytes per logit", passes=passes) for kind in moved]
        assert sum(found) <= (loaded + stored) * (1 + BYTES_SLACK), (passes, found)


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("device", MEMORY_SLACK)
def test_memory_binds(device, passes):
    rows = figures(OURS, "sm_100" if device == "B200" else "sm_90", ALL)
    key = dict(passes=passes, where=device)
    assert rows.value(TIME, **key) <= MEMORY_SLACK[device] * rows.value(MEMORY, **key)
