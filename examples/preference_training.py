"""Steps and evaluation of preference training, with logits or without."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from checkpoints import Checkpoint, NotFinite, Step
from torch import Tensor, nn

from dpo_triton import seq_logprob_from_model
from dpo_triton.data import Row, TokenRows
from dpo_triton.losses import LOSSES, PreferenceLoss, SequenceLogps, mixture_loss
from dpo_triton.precompute import RefLogps, collate_pairs, score_pairs

MAX_GRAD_NORM = 1.0
MAX_FIRST_DIFFERENCE = 1e-3  # of the first loss, relative to 1 or more
WARM_UP = 0.1  # share of the steps
SIGNIFICANT = 0.01  # probability of a held-out accuracy by chance
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
    accumulate: int = 1  # parts of a batch, one after another: the same gradient in less memory
    dropout: bool = False  # the model's own


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


def preference_loss(
    options: Options, policy: RefLogps, reference: RefLogps, mean_chosen_length: float | None = None
) -> PreferenceLoss:
    """The loss of pairs, from the sums of the policy and of the reference.

    mean_chosen_length: of the batch of which the pairs are a part, where a loss's mean is over all
    of its tokens.
    """
    sides = [
        SequenceLogps(sums, "sum", lengths)
        for logps in (policy, reference)
        for sums, lengths in (
            (logps.chosen, logps.chosen_lengths),
            (logps.rejected, logps.rejected_lengths),
        )
    ]
    more = dict(options.loss_options)
    is_mean_of_tokens = "mean_chosen_length" in LOSSES[options.loss].options or "rpo_alpha" in more
    if mean_chosen_length is not None and is_mean_of_tokens:
        more["mean_chosen_length"] = mean_chosen_length
    return mixture_loss({options.loss: 1.0}, *sides, beta=options.beta, **more)


def train(
    model: nn.Module,
    rows: TokenRows,
    ref_logps: RefLogps,
    options: Options,
    score: Scorer,
    *,
    checkpoint: Checkpoint | None = None,
    resume: bool = False,
) -> list[Step]:
    """Train what requires a gradient, and return what each step gave, the resumed ones too.

    Raises:
        NotFinite: at the first loss, gradient or weight that is NaN or infinite.
        ValueError: a first loss that is not that of a policy equal to its reference.
    """
    from tqdm import tqdm

    device = next(model.parameters()).device
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=options.lr, weight_decay=0.0)
    steps = checkpoint.load(parameters, optimizer) if checkpoint and resume else []
    model.train(options.dropout)  # all that evaluation mode changes in a language model
    with tqdm(total=options.steps, initial=len(steps), unit="step", desc="train") as bar:
        for number in range(len(steps), options.steps):
            began = time.perf_counter()
            torch.manual_seed(options.seed + number)  # of dropout: the same after resuming
            optimizer.param_groups[0]["lr"] = options.lr * schedule(number, options.steps)
            picked = batch_numbers(len(rows), options.batch_size, options.seed, number)
            reference = RefLogps(*(field[picked].to(device) for field in ref_logps))
            batch = [rows[i] for i in picked]
            loss, margins = add_gradients(model, batch, reference, options, score)
            if number == 0:
                check_first_loss(loss, reference, options)
            norm = nn.utils.clip_grad_norm_(parameters.values(), MAX_GRAD_NORM).item()
            check_finite(number, loss, norm, checkpoint)
            optimizer.step()
            optimizer.zero_grad()
            gave = loss, margins.mean().item(), share_above_zero(margins)
            steps.append(Step(*gave, time.perf_counter() - began))
            bar.update()
            recent = steps[-SMOOTHING:]
            means = [sum(column) / len(recent) for column in zip(*recent, strict=True)]
            shown = zip(("loss", "margin", "accuracy"), means[:3], strict=True)
            bar.set_postfix({name: f"{mean:.3f}" for name, mean in shown})
            if checkpoint and ((number + 1) % checkpoint.every == 0 or number + 1 == options.steps):
                checkpoint.save(parameters, optimizer, steps)
    model.eval()
    return steps


def add_gradients(
    model: nn.Module, rows: Sequence[Row], reference: RefLogps, options: Options, score: Scorer
) -> tuple[float, Tensor]:
    """Add a batch's gradient to that of the weights, a part of the batch at a time.

    Returns the batch's loss and the margins of the pairs (B,).
    """
    device = reference.chosen.device
    mean_chosen_length = reference.chosen_lengths.double().mean().item()
    losses, margins = [], []
    for part in np.array_split(np.arange(len(rows)), options.accumulate):
        values, lengths = score(model, *collate_pairs([rows[i] for i in part], device))
        policy = RefLogps(*values.chunk(2), *lengths.chunk(2))
        of_part = RefLogps(*(field[part] for field in reference))
        result = preference_loss(options, policy, of_part, mean_chosen_length)
        (result.losses.sum() / len(rows)).backward()
        losses.append(result.losses.detach())
        margins.append(result.chosen_rewards - result.rejected_rewards)
    return torch.cat(losses).mean().item(), torch.cat(margins)


def check_first_loss(loss: float, reference: RefLogps, options: Options) -> None:
    """The policy is the reference before its first step, whose loss is then known: ln 2 for DPO."""
    if not LOSSES[options.loss].needs_reference or options.dropout:
        return
    expected = preference_loss(options, reference, reference).losses.mean().item()
    if not abs(loss - expected) <= MAX_FIRST_DIFFERENCE * max(1.0, abs(expected)):
        raise ValueError(
            f"the first loss must be {expected:.4f}, that of a policy which is its reference, got "
            f"{loss:.4f}: between scoring the reference and training something changed the model "
            "(an adapter that is not merged, noise, other weights in ref_logps.safetensors)"
        )


def check_finite(number: int, loss: float, norm: float, checkpoint: Checkpoint | None) -> None:
    """Before the step that would spoil the weights."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    kept = checkpoint is not None and checkpoint.path.exists()
    where = f"{checkpoint.path} has the last good weights" if kept else "no checkpoint was reached"
    raise NotFinite(
        f"step {number + 1}: the loss is {loss} and its gradient's norm {norm}; stopped, {where}; "
        "a lower --lr, or another --loss or --beta, may help"
    )


def batch_numbers(num_rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Rows of a step: each row once an epoch, in an order that the seed and the epoch decide."""
    numbers = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, i = divmod(position, num_rows)
        numbers.append(int(permutation(num_rows, seed, epoch)[i]))
    return numbers


@functools.lru_cache(maxsize=4)
def permutation(size: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch + 1)
    return torch.randperm(size, generator=generator)


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
    model: nn.Module, rows: TokenRows, batch_size: int, backend: str, description: str
) -> RefLogps:
    """The policy's log-probabilities of all rows, in their order."""
    from tqdm import tqdm

    parts = []
    for start in tqdm(range(0, len(rows), batch_size), unit="batch", desc=description):
        batch = list(rows[start : start + batch_size])
        parts.append(score_pairs(model, batch, backend=backend))  # type: ignore[arg-type]
    return RefLogps(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def evaluate(options: Options, policy: RefLogps, reference: RefLogps) -> Evaluation:
    """Compare the policy's log-probabilities of held-out pairs with the reference's.

    Raises:
        NotFinite: a log-probability is NaN or infinite.
    """
    if not all(torch.isfinite(logps).all() for logps in (policy.chosen, policy.rejected)):
        raise NotFinite("the trained model gives a held-out pair a log-probability that is NaN")
    result = preference_loss(options, policy, reference)
    margins = result.chosen_rewards - result.rejected_rewards
    accuracies = [share_above_zero(margins)]
    for reduction in ("sum", "mean"):
        chosen, rejected = policy.logps(reduction)
        accuracies.append(share_above_zero(chosen - rejected))
    return Evaluation(result.losses.mean().item(), margins.mean().item(), *accuracies)


def verdict(accuracy: float, num_pairs: int) -> str:
    """One sentence that says what the accuracy on held-out pairs means.

    Guessing gets k or more of n pairs right with probability sum_{j >= k} C(n, j) / 2^n.
    """
    right = math.floor(accuracy * num_pairs)
    by_chance = sum(math.comb(num_pairs, k) for k in range(right, num_pairs + 1)) / 2**num_pairs
    said = (
        f"Of {num_pairs} pairs that it was not trained on, the model has moved towards the chosen "
    )
    said += f"answer in {right} ({accuracy:.0%}, guessing 50%): "
    if by_chance < SIGNIFICANT:
        return said + "it has learnt the preference, and not these pairs alone."
    return said + (
        "that may be chance, so it has learnt nothing that goes beyond its pairs; more --steps, "
        "more pairs or a higher --lr may help."
    )
