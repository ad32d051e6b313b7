"""What the kernels set out to reach in bfloat16 at one vocabulary size, judged by a run's rows."""

from collections.abc import Iterator

from goals import Goal, goal_lines
from kernel_peers import OURS, TRL
from kernel_report import BINDING, MEMORY, PTX, TIME, Rows, next_resource

VOCAB_SIZE, DTYPE = 131072, "bfloat16"
TARGETS = ("sm_90", "sm_100")
# Pass -> instructions per logit at most, and as a share of TRL's in the same run.
INSTRUCTIONS = {"forward": (7.5, 0.5), "backward": (8.5, 0.55)}
# Rows scored -> pass -> (bytes loaded, bytes stored) per logit.
BYTES = {
    "50%, shift": {"forward": (1.0, 0.0), "backward": (1.0, 2.0)},
    "all": {"forward": (2.0, 0.0), "backward": (2.0, 2.0)},
}
BYTES_SLACK = 0.005  # of the goal's bytes in both directions
MEMORY_SLACK = {"H100 SXM": 1.0, "H200": 1.0, "B200": 1.15}  # modelled time over memory's


def judge(rows: Rows) -> list[Goal]:
    """Return what the rows can judge: nothing about a target or a peer that is not in them."""
    return [*_instructions(rows), *_bytes(rows), *_binding(rows)]


def goals_text(goals: list[Goal]) -> str:
    if not goals:
        return f"goals: none can be judged without V = {VOCAB_SIZE} and {DTYPE}"
    return goal_lines(f"goals, V = {VOCAB_SIZE}, {DTYPE}", goals, found="found")


def _instructions(rows: Rows) -> Iterator[Goal]:
    for target in TARGETS:
        for passes, (most, share) in INSTRUCTIONS.items():
            key = dict(passes=passes, where=target, case="all")
            mine, theirs = (rows.value(PTX, impl=impl, **key) for impl in (OURS, TRL))
            if mine is None:
                continue
            what = f"PTX instructions per logit, {passes}, {target}"
            yield Goal(what, f"<= {most}", f"{mine:.2f}", mine <= most)
            if theirs is not None:
                ratio = mine / theirs
                yield Goal(
                    f"{what}, over TRL's",
                    f"<= {share}x",
                    f"{ratio:.3f}x (TRL {theirs:.2f})",
                    ratio <= share,
                )


def _bytes(rows: Rows) -> Iterator[Goal]:
    for case, by_pass in BYTES.items():
        for passes, goal in by_pass.items():
            key = dict(impl=OURS, passes=passes, case=case)
            found = [rows.value(f"{kind} bytes per logit", **key) for kind in ("loaded", "stored")]
            torch_bytes = rows.value("PyTorch's bytes per logit", **key)
            if None in found or torch_bytes is None:
                continue
            total = sum(found) + torch_bytes
            yield Goal(
                f"bytes per logit, {passes}, scored: {case}",
                f"{goal[0]:g} + {goal[1]:g} within {BYTES_SLACK:.1%}",
                f"{found[0]:.4f} + {found[1]:.4f}",
                total <= sum(goal) * (1 + BYTES_SLACK),
            )


def _binding(rows: Rows) -> Iterator[Goal]:
    for device, slack in MEMORY_SLACK.items():
        for passes in INSTRUCTIONS:
            key = dict(impl=OURS, passes=passes, where=device, case="all")
            time, memory = rows.value(TIME, **key), rows.value(MEMORY, **key)
            if time is not None and memory is not None:
                goal = "memory" if slack == 1 else f"<= {slack}x memory's time"
                resource, next_ms = next_resource(rows, **key)
                yield Goal(
                    f"modelled binding resource, {passes}, {device}",
                    goal,
                    f"{rows.value(BINDING, **key)}, {time / memory:.2f}x memory's time"
                    f" (next: {resource}, {next_ms / memory:.2f}x)",
                    time <= slack * memory,
                )
