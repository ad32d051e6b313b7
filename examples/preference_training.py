"""Steps, checkpoints and evaluation of preference training, with logits or without."""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from preference_data import Row
from torch import Tensor, nn

from dpo_triton import seq_logprob_from_model
from dpo_triton.losses import PreferenceLoss, SequenceLogps, mixture_loss
from dpo_triton.precompute import RefLogps, collate_pairs, score_pairs

MAX_GRAD_NORM = 1.0
WARM_UP = 0.1  # share of the steps
SMOOTHING = 10  # steps that the progress bar's numbers are means of

# (model, input_ids, attention_mask, mask) -> sums (S,) and numbers of scored tokens (S,)
Scorer = Callable[[nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class Options:
    """What decides a training's losses, given model and data."""

    loss: str  # of dpo_triton.losses.LOSSES
    beta: float
    loss_options: dict[str, Any]
    lr: float  # at its highest
    steps: int
    batch_size: int  # pairs
    seed: int


class Step(NamedTuple):
    """What a step gave."""

    loss: float
    margin: float  # mean reward of chosen over rejected
    accuracy: float  # share of the pairs with a margin above 0
    seconds: float


class Evaluation(NamedTuple):
    """Of held-out pairs. A tie counts as half."""

    loss: float
    margin: float  # mean reward of chosen over rejected
    reward_accuracy: float  # share where the policy moved towards chosen rather than rejected
    sum_accuracy: float  # share where the sum of log p is larger for chosen
    mean_accuracy: float  # likewise the mean


def fused_scorer(backend: str) -> Scorer:
    """Score without logits."""

    def score(
        model: nn.Module, input_ids: Tensor, attention_mask: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        values, stats = seq_logprob_from_model(
            model,
            input_ids,
            attention_mask,
            mask=mask,
            reduction="sum",
            stats=("lengths",),
            backend=backend,  # type: ignore[arg-type]
        )
        return values, stats["lengths"]

    return score


def score_materialised(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Score as one does without this package: logits, log_softmax, gather."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    log_p = logits[:, :-1].float().log_softmax(-1)
    token_logps = log_p.gather(2, input_ids[:, 1:, None])[..., 0]
    return (token_logps * mask[:, 1:]).sum(1), mask[:, 1:].sum(1)


def preference_loss(options: Options, policy: RefLogps, reference: RefLogps) -> PreferenceLoss:
    """The loss of pairs, from the sums of the policy and of the reference."""
    sides = [
        SequenceLogps(sums, "sum", lengths)
        for logps in (policy, reference)
        for sums, lengths in (
            (logps.chosen, logps.chosen_lengths),
            (logps.rejected, logps.rejected_lengths),
        )
    ]
    return mixture_loss({options.loss: 1.0}, *sides, beta=options.beta, **options.loss_options)


class Checkpoint(NamedTuple):
    """Where the state of a training is kept, every so many steps."""

    path: Path
    every: int
    settings: dict[str, str]  # by command-line option; a run resumes with the same alone

    def save(
        self,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        steps: Sequence[Step],
    ) -> None:
        """Replace the last one by a whole one."""
        state = dict(
            settings=self.settings,
            parameters={name: p.detach() for name, p in parameters.items()},
            optimizer=optimizer.state_dict(),
            steps=[tuple(step) for step in steps],
        )
        written = self.path.with_name(self.path.name + ".tmp")
        torch.save(state, written)
        os.replace(written, self.path)

    def load(
        self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> list[Step]:
        """Restore the last one and return its steps; none where a run was stopped before it."""
        if not self.path.exists():
            print(f"{self.path} is not there: stopped before the first; starting at step 0")
            return []
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        other = [k for k, value in self.settings.items() if state["settings"].get(k) != value]
        if other:
            raise ValueError(
                f"--{other[0].replace('_', '-')} must be {state['settings'].get(other[0])}, as in "
                f"{self.path}, got {self.settings[other[0]]}; a run resumes with its own settings: "
                "repeat them, or pass another --output"
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state["parameters"][name])
        optimizer.load_state_dict(state["optimizer"])
        return [Step(*step) for step in state["steps"]]


def train(
    model: nn.Module,
    rows: Sequence[Row],
    ref_logps: RefLogps,
    options: Options,
    score: Scorer,
    *,
    checkpoint: Checkpoint | None = None,
    resume: bool = False,
) -> list[Step]:
    """Train what requires a gradient, and return what each step gave, the resumed ones too."""
    from tqdm import tqdm

    device = next(model.parameters()).device
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=options.lr, weight_decay=0.0)
    steps = checkpoint.load(parameters, optimizer) if checkpoint and resume else []
    model.train()
    with tqdm(total=options.steps, initial=len(steps), unit="step", desc="train") as bar:
        for number in range(len(steps), options.steps):
            began = time.perf_counter()
            torch.manual_seed(options.seed + number)  # of dropout: the same after resuming
            optimizer.param_groups[0]["lr"] = options.lr * schedule(number, options.steps)
            picked = batch_numbers(len(rows), options.batch_size, options.seed, number)
            reference = RefLogps(*(field[picked].to(device) for field in ref_logps))
            values, lengths = score(model, *collate_pairs([rows[i] for i in picked], device))
            policy = RefLogps(*values.chunk(2), *lengths.chunk(2))
            result = preference_loss(options, policy, reference)
            loss = result.losses.mean()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters.values(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            margins = result.chosen_rewards - result.rejected_rewards
            gave = loss.item(), margins.mean().item(), share_above_zero(margins)
            steps.append(Step(*gave, time.perf_counter() - began))
            del values, policy, result, loss  # or their graph stands beside the next one
            bar.update()
            recent = steps[-SMOOTHING:]
            means = [sum(column) / len(recent) for column in zip(*recent, strict=True)]
            shown = zip(("loss", "margin", "accuracy"), means[:3], strict=True)
            bar.set_postfix({name: f"{mean:.3f}" for name, mean in shown})
            if checkpoint and ((number + 1) % checkpoint.every == 0 or number + 1 == options.steps):
                checkpoint.save(parameters, optimizer, steps)
    model.eval()
    return steps


def batch_numbers(num_rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Rows of a step: each row once an epoch, in an order that the seed and the epoch decide."""
    numbers = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, i = divmod(position, num_rows)
        numbers.append(permutation(num_rows, seed, epoch)[i])
    return numbers


@functools.lru_cache(maxsize=4)
def permutation(size: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch + 1)
    order: list[int] = torch.randperm(size, generator=generator).tolist()
    return order


def schedule(step: int, num_steps: int) -> float:
    """Factor of the learning rate: up linearly, then down linearly to a tenth."""
    warm_up = max(1, round(WARM_UP * num_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 1 - 0.9 * (step - warm_up) / max(1, num_steps - warm_up)


def share_above_zero(margins: Tensor) -> float:
    """A tie counts as half."""
    return ((margins > 0).double() + (margins == 0).double() / 2).mean().item()


def score_rows(
    model: nn.Module, rows: Sequence[Row], batch_size: int, backend: str, description: str
) -> RefLogps:
    """The policy's log-probabilities of all rows, in their order."""
    from tqdm import tqdm

    parts = []
    for start in tqdm(range(0, len(rows), batch_size), unit="batch", desc=description):
        batch = rows[start : start + batch_size]
        parts.append(score_pairs(model, batch, backend=backend))  # type: ignore[arg-type]
    return RefLogps(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def evaluate(options: Options, policy: RefLogps, reference: RefLogps) -> Evaluation:
    """Compare the policy's log-probabilities of held-out pairs with the reference's."""
    result = preference_loss(options, policy, reference)
    margins = result.chosen_rewards - result.rejected_rewards
    accuracies = [share_above_zero(margins)]
    for reduction in ("sum", "mean"):
        chosen, rejected = policy.logps(reduction)
        accuracies.append(share_above_zero(chosen - rejected))
    return Evaluation(result.losses.mean().item(), margins.mean().item(), *accuracies)
