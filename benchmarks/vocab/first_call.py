"""What the first call of a process takes, with the compiled code on disk and without."""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass

from benchmarks.common.command import ROOT
from benchmarks.common.report import BOTH, FORWARD, shown

EMPTY, CACHED = "empty", "filled"
PROGRAM = """
import sys, time, torch
from dpo_triton import fused_seq_logprob
device, backend = sys.argv[1:]
logits = torch.randn(8, 64, 6400, device=device, requires_grad=True)
labels = torch.zeros(8, 64, dtype=torch.int64, device=device)
start = time.perf_counter()
value = fused_seq_logprob(logits, labels, backend=backend).sum()
value.item()
print(time.perf_counter() - start)
value.backward()
logits.grad[0, 0, 0].item()
print(time.perf_counter() - start)
"""


@dataclass(frozen=True)
class FirstCall:
    """In a new process, which has imported torch and dpo_triton; 8 x 64 x 6400 in float32."""

    cache: str = shown("folder of compiled code")  # EMPTY or CACHED
    passes: str = shown("pass")
    seconds: float = shown("seconds", "{:.2f}")


def measure(device: str, backend: str) -> list[FirstCall]:
    """Run two new processes one after the other, which share a folder that is empty at first."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment |= dict(NUMBA_CACHE_DIR=folder, TRITON_CACHE_DIR=folder)
        for cache in (EMPTY, CACHED):
            command = [sys.executable, "-c", PROGRAM, device, backend]
            out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
            for passes, seconds in zip((FORWARD, BOTH), out.stdout.split(), strict=True):
                rows.append(FirstCall(cache, passes, float(seconds)))
    return rows
