"""The first steps of a training beside those from materialised logits: losses, time and memory."""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from preference_training import Options, fused_scorer, score_materialised, train
from preparation import Setup

MAX_LOSS_DIFFERENCE = 1e-4  # at every step


class Compared(NamedTuple):
    """What the first steps took, scored in one way."""

    scored: str
    losses: list[float]
    seconds: float
    peak_gib: float | None


def compare(setup: Setup, options: Options, backend: str) -> list[Compared]:
    """Take the first steps twice, without and with logits, and put the policy back each time."""
    scorers = {"fused": fused_scorer(backend), "logits": score_materialised}
    device = next(setup.model.parameters()).device
    trained = [p for p in setup.model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]
    results = []
    for name, score in scorers.items():
        reset_peak(device)
        steps = train(setup.model, setup.train_rows, setup.train_ref, options, score)
        seconds = sum(step.seconds for step in steps)
        results.append(Compared(name, [step.loss for step in steps], seconds, peak_gib(device)))
        with torch.no_grad():
            for parameter, value in zip(trained, start, strict=True):
                parameter.copy_(value)
    return results


def print_comparison(fused: Compared, materialised: Compared) -> bool:
    """Print losses, time and memory; return whether the losses agree."""
    pairs = list(zip(fused.losses, materialised.losses, strict=True))
    print(f"\n{'step':<10}{'fused':>12}{'logits':>12}{'difference':>12}")
    for number, (ours, theirs) in enumerate(pairs, start=1):
        print(f"{number:<10}{ours:>12.6f}{theirs:>12.6f}{abs(ours - theirs):>12.1e}")
    print(f"{'seconds':<10}{fused.seconds:>12.1f}{materialised.seconds:>12.1f}")
    if fused.peak_gib is not None and materialised.peak_gib is not None:
        print(f"{'peak, GiB':<10}{fused.peak_gib:>12.2f}{materialised.peak_gib:>12.2f}")
    print()
    if not all(abs(ours - theirs) <= MAX_LOSS_DIFFERENCE for ours, theirs in pairs):
        print(f"error: losses differ by more than {MAX_LOSS_DIFFERENCE}", file=sys.stderr)
        return False
    return True


def reset_peak(device: torch.device) -> None:
    """Forget what loading took, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib(device: torch.device) -> float | None:
    """Largest memory since reset_peak: allocated on a GPU, else the process's; None: not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform != "linux":
        return None
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20
