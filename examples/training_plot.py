"""The picture of a training run: what the steps gave, and log-probabilities against length."""

from collections.abc import Sequence
from pathlib import Path

from checkpoints import Step
from preference_training import SMOOTHING, Evaluation

from dpo_triton.precompute import RefLogps

COLOURS = {"chosen": "tab:blue", "rejected": "tab:orange"}


def plot(
    path: Path,
    steps: Sequence[Step],
    evaluations: Sequence[Evaluation],
    before: RefLogps,
    after: RefLogps,
    title: str,
) -> None:
    """Draw loss, margin and accuracy of the steps, and the held-out evaluations at either end;
    below, sum and mean of log p of each answer against its length, before (faint) and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(13, 8.5), layout="constrained")
    grid = figure.add_gridspec(2, 6)
    panels = [figure.add_subplot(grid[0, i : i + 2]) for i in (0, 2, 4)]
    names = ("loss", "margin", "accuracy")
    labels = ("loss", "reward margin", "share with reward of chosen > rejected")
    for axis, name, label in zip(panels, names, labels, strict=True):
        values = [getattr(step, name) for step in steps]
        numbers = range(1, len(steps) + 1)
        axis.plot(numbers, values, color="tab:blue", alpha=0.3, label="batch")
        axis.plot(numbers, running_mean(values), color="tab:blue", label=f"mean of {SMOOTHING}")
        if evaluations:
            field = "reward_accuracy" if name == "accuracy" else name
            ends = [getattr(evaluation, field) for evaluation in evaluations]
            axis.plot([0, len(steps)], ends, "k*", markersize=11, label="held out")
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
    panels[0].legend()

    for column, reduction in ((0, "sum"), (3, "mean")):
        axis = figure.add_subplot(grid[1, column : column + 3])
        lengths = (after.chosen_lengths, after.rejected_lengths)
        sides = zip(
            COLOURS.items(),
            lengths,
            before.logps(reduction),
            after.logps(reduction),
            strict=True,
        )
        for (side, colour), length, start, end in sides:
            axis.scatter(length, start, s=14, color=colour, alpha=0.25, linewidths=0)
            axis.scatter(length, end, s=14, color=colour, label=f"{side}, after (before: faint)")
        axis.set(xlabel="tokens of the answer", ylabel=f"{reduction} of log p, nats")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def running_mean(values: Sequence[float]) -> list[float]:
    """Mean of the last SMOOTHING values, of fewer at the start."""
    windows = [values[max(0, i + 1 - SMOOTHING) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
