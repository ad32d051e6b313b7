"""The same losses, metrics and gradients as TRL's trainers, whose own methods run on stand-ins."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", minversion="1.16")
cpo_trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
orpo_trainer = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
from trl.trainer.dpo_trainer import DPOTrainer  # noqa: E402
from trl.trainer.kto_trainer import KTOTrainer  # noqa: E402

from dpo_triton import fused_dpo_loss  # noqa: E402
from dpo_triton.losses import hinge_loss, ipo_loss, kto_loss, simpo_loss  # noqa: E402

PAIRS, SEQ_LEN, VOCAB = 3, 11, 40


class Accelerator:
    device = torch.device("cpu")

    def gather(self, x):
        return x

    gather_for_metrics = gather


def model_outputs(logits, input_ids, completion_mask):
    """What TRL's patched models return with fused_lm_head=True, aligned with input_ids[:, 1:]."""
    log_p = logits[:, :-1].log_softmax(-1)
    logps = log_p.gather(-1, input_ids[:, 1:, None])[..., 0]
    scored = completion_mask[:, 1:].bool()
    return SimpleNamespace(
        log_probs=torch.where(scored, logps, 0.0),
        entropy=torch.special.entr(log_p.exp()).sum(-1).detach(),
        mean_logits=logits[:, :-1].mean(-1).detach(),
        is_top1=logits[:, :-1].argmax(-1) == input_ids[:, 1:],
        log_sum_sq_probs=(2 * log_p).logsumexp(-1).detach(),
    )


class Model(torch.nn.Module):
    """Answers with the outputs of given logits."""

    is_gradient_checkpointing = False

    def __init__(self, *tensors):
        super().__init__()
        self.outputs = model_outputs(*tensors)

    def forward(self, **kwargs):
        assert kwargs["fused_lm_head"]
        return self.outputs


def draw():
    """Logits of policy and reference, ids, and answers that differ in length; no first token."""
    policy = 2 * torch.randn(2 * PAIRS, SEQ_LEN, VOCAB)
    reference = policy + 0.5 * torch.randn_like(policy)
    input_ids = torch.randint(0, VOCAB, (2 * PAIRS, SEQ_LEN))
    starts = torch.randint(1, 4, (2 * PAIRS, 1))
    ends = torch.randint(5, SEQ_LEN + 1, (2 * PAIRS, 1))
    positions = torch.arange(SEQ_LEN)
    completion_mask = ((positions >= starts) & (positions < ends)).long()
    return policy, reference, input_ids, completion_mask


def trl_dpo(policy, reference, input_ids, completion_mask, **config):
    """DPOTrainer's loss and metrics."""
    model = Model(policy, input_ids, completion_mask)
    defaults = dict(
        loss_type="sigmoid",
        loss_weights=None,
        beta=0.1,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        f_alpha_divergence_coef=0.5,
        label_smoothing=0.0,
        use_weighting=False,
        discopop_tau=0.05,
    )
    options = defaults | config
    loss_types = options["loss_type"]
    loss_types = [loss_types] if isinstance(loss_types, str) else loss_types
    trainer = SimpleNamespace(
        model=model,
        ref_model=Model(reference, input_ids, completion_mask),
        accelerator=Accelerator(),
        args=SimpleNamespace(
            discopop_tau=options["discopop_tau"], gradient_checkpointing_kwargs=None
        ),
        loss_types=loss_types,
        precompute_ref_logps=False,
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    for name in options.keys() - {"loss_type", "discopop_tau"}:
        setattr(trainer, name, options[name])
    trainer.loss_weights = options["loss_weights"] or [1.0] * len(loss_types)
    inputs = dict(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        completion_mask=completion_mask,
    )
    loss = DPOTrainer._compute_loss(trainer, model, inputs, False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


F_DIVERGENCES = [
    dict(f_divergence_type="forward_kl"),
    dict(f_divergence_type="js_divergence"),
    dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.3),
    dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0),
]
TAKE_DIVERGENCES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "discopop")
CASES = [
    *(
        dict(loss_type=name)
        for name in (
            *TAKE_DIVERGENCES,
            *("nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
            *("apo_zero", "apo_down", "sft"),
        )
    ),
    *(
        dict(loss_type=name, label_smoothing=0.125)
        for name in ("exo_pair", "robust", "aot", "aot_unpaired")
    ),
    *(dict(loss_type=name, **f) for name in TAKE_DIVERGENCES for f in F_DIVERGENCES),
    *(dict(loss_type="exo_pair", label_smoothing=0.01, **f) for f in F_DIVERGENCES),
    *(dict(loss_type=name, ld_alpha=a) for name in ("sigmoid", "hinge") for a in (0.0, 0.25, 1.0)),
    *(dict(loss_type=name, use_weighting=True) for name in ("sigmoid", "ipo", "apo_zero")),
    dict(loss_type="discopop", discopop_tau=0.5),
    dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]),
    dict(loss_type=["ipo", "sigmoid"], use_weighting=True),
    dict(loss_type=["sigmoid", "sft"], f_divergence_type="js_divergence"),
]


@pytest.mark.parametrize("config", CASES, ids=str)
def test_dpo_trainer(config):
    policy, reference, input_ids, completion_mask = draw()
    policy.requires_grad_()
    theirs, their_metrics = trl_dpo(policy, reference, input_ids, completion_mask, **config)
    (their_grad,) = torch.autograd.grad(theirs, policy)
    reference_free = config["loss_type"] == "sft"
    ours, metrics = fused_dpo_loss(
        policy,
        input_ids,
        completion_mask,
        ref_logits=None if reference_free else reference,
        shift=True,
        stats=("entropy", "top1", "mean_logit"),
        **config,
    )
    (our_grad,) = torch.autograd.grad(ours, policy)
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-4, atol=1e-5)

    if config["loss_type"] in ("ipo", "sigmoid_norm", "sft") or "ld_alpha" in config:
        return  # TRL logs rewards of sums; ours are of what the loss compares
    if config["loss_type"] != ["ipo", "sigmoid"]:
        expected = {
            "rewards/chosen": metrics.chosen_rewards.mean(),
            "rewards/rejected": metrics.rejected_rewards.mean(),
            "rewards/margins": metrics.margins.mean(),
            "rewards/accuracies": metrics.accuracies.mean(),
        }
        for name, value in expected.items():
            assert value.item() == pytest.approx(their_metrics[name], rel=1e-4, abs=1e-5), name
    of_tokens = {
        "logps/chosen": metrics.chosen_logps.mean(),
        "logps/rejected": metrics.rejected_logps.mean(),
        "mean_token_accuracy": token_mean(metrics, "chosen", "top1"),
        "logits/chosen": token_mean(metrics, "chosen", "mean_logit"),
        "logits/rejected": token_mean(metrics, "rejected", "mean_logit"),
        "entropy": token_mean(metrics, "chosen", "entropy", "rejected"),
    }
    for name, value in of_tokens.items():
        assert value.item() == pytest.approx(their_metrics[name], rel=1e-4, abs=1e-5), name


def token_mean(metrics, side, name, *more_sides):
    """From means over answers to the mean over their tokens."""
    sides = (side, *more_sides)
    lengths = [getattr(metrics, f"{side}_lengths") for side in sides]
    sums = [metrics.stats[f"{side}_{name}"] * n for side, n in zip(sides, lengths, strict=True)]
    return torch.cat(sums).sum() / torch.cat(lengths).sum()


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("kl", [0.75, -0.5])
@pytest.mark.parametrize("num_desirable", [0, 2, 4])
def test_kto_trainer(loss_type, kl, num_desirable):
    policy, reference, input_ids, completion_mask = (x[:4] for x in draw())
    policy.requires_grad_()
    label = (torch.arange(4) < num_desirable)[torch.randperm(4)]
    of_policy = model_outputs(policy, input_ids, completion_mask)
    ref_logps = model_outputs(reference, input_ids, completion_mask).log_probs.sum(1)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=Accelerator(),
        loss_type=loss_type,
        beta=0.3,
        desirable_weight=1.5,
        undesirable_weight=0.5,
        precompute_ref_logps=True,
        calculate_KL=loss_type == "kto",
        aux_loss_enabled=False,
        _compute_kl_logps=lambda model, batch: torch.full((4,), kl - 20.0),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = dict(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        completion_mask=completion_mask,
        label=label,
        ref_logps=ref_logps,
        ref_KL_logps=torch.full((4,), -20.0),
    )
    theirs = KTOTrainer._compute_loss(trainer, lambda **kwargs: of_policy, inputs, False)
    logps = of_policy.log_probs.sum(1)
    ours = kto_loss(
        logps[label],
        logps[~label],
        ref_logps[label],
        ref_logps[~label],
        kl=torch.tensor(kl) if loss_type == "kto" else 0.0,
        beta=0.3,
        desirable_weight=1.5,
        undesirable_weight=0.5,
    ).losses.mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(x, policy, retain_graph=True)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def cpo_stand_in(**options):
    trainer = SimpleNamespace(accelerator=Accelerator(), label_smoothing=0.0, alpha=0.0, beta=0.1)
    vars(trainer).update(options)
    return trainer


@pytest.mark.parametrize("loss_type", ["simpo", "alphapo", "hinge", "ipo"])
def test_cpo_trainer_without_nll(loss_type):
    """Reference-free hinge and IPO are ours with a reference of 0."""
    chosen, rejected = -3 * torch.rand(5), -3 * torch.rand(5)
    zeros = torch.zeros(5)
    alpha = 0.25 if loss_type == "alphapo" else 0.0
    ours = {
        "simpo": lambda: simpo_loss(
            chosen, rejected, beta=2.0, simpo_gamma=0.7, label_smoothing=0.125
        ),
        "alphapo": lambda: simpo_loss(chosen, rejected, beta=2.0, simpo_gamma=0.7, alpha=alpha),
        "hinge": lambda: hinge_loss(chosen, rejected, zeros, zeros, beta=2.0),
        "ipo": lambda: ipo_loss(chosen, rejected, zeros, zeros, beta=2.0),
    }[loss_type]()
    trainer = cpo_stand_in(
        loss_type="simpo" if loss_type == "alphapo" else loss_type,
        beta=2.0,
        simpo_gamma=0.7,
        alpha=alpha,
        label_smoothing=0.125 if loss_type == "simpo" else 0.0,
    )
    theirs = cpo_trainer.CPOTrainer.cpo_loss(trainer, chosen, rejected)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def run_trainer(module, name, logits, input_ids, labels, **options):
    """get_batch_loss_metrics of the CPO or ORPO trainer; the model returns the logits."""
    trainer_class = getattr(module, name)

    class StandIn:
        accelerator = Accelerator()
        is_encoder_decoder = False
        aux_loss_enabled = False
        pad_token_id = padding_value = 0
        label_smoothing = alpha = 0.0
        concatenated_inputs = staticmethod(trainer_class.concatenated_inputs)
        get_batch_logps = staticmethod(trainer_class.get_batch_logps)
        concatenated_forward = trainer_class.concatenated_forward
        get_batch_loss_metrics = trainer_class.get_batch_loss_metrics

    for method in ("cpo_loss", "odds_ratio_loss"):
        if hasattr(trainer_class, method):
            setattr(StandIn, method, getattr(trainer_class, method))
    trainer = StandIn()
    vars(trainer).update(options)
    batch = {}
    for side, rows in (("chosen", slice(0, PAIRS)), ("rejected", slice(PAIRS, None))):
        batch[f"{side}_input_ids"] = input_ids[rows]
        batch[f"{side}_labels"] = labels[rows]
        # ORPO's NLL is of all tokens that are attended to: of the answers alone here.
        attended = labels[rows] != -100
        attended[:, 0] = True
        batch[f"{side}_attention_mask"] = attended.long()
    return trainer.get_batch_loss_metrics(
        lambda *args, **kwargs: SimpleNamespace(logits=logits), batch
    )


@pytest.mark.parametrize("name", ["cpo", "orpo", "cpo_simpo"])
def test_reference_free_trainers(name):
    logits, _, input_ids, completion_mask = draw()
    logits.requires_grad_()
    labels = torch.where(completion_mask.bool(), input_ids, -100)
    if name == "orpo":
        theirs, metrics = run_trainer(
            orpo_trainer, "ORPOTrainer", logits, input_ids, labels, beta=0.3
        )
        ours = fused_dpo_loss(logits, labels, loss_type="orpo", beta=0.3, shift=True)
    elif name == "cpo":
        theirs, metrics = run_trainer(
            *(cpo_trainer, "CPOTrainer", logits, input_ids, labels),
            loss_type="sigmoid",
            beta=0.3,
            cpo_alpha=0.5,
            label_smoothing=0.125,
        )
        ours = fused_dpo_loss(
            *(logits, labels),
            loss_type="cpo",
            beta=0.3,
            cpo_alpha=0.5,
            label_smoothing=0.125,
            shift=True,
        )
    else:  # CPO-SimPO: SimPO with an NLL, which is a mixture here
        theirs, metrics = run_trainer(
            *(cpo_trainer, "CPOTrainer", logits, input_ids, labels),
            loss_type="simpo",
            beta=2.0,
            simpo_gamma=0.7,
            cpo_alpha=0.5,
        )
        ours = fused_dpo_loss(
            *(logits, labels),
            loss_type=["simpo", "sft"],
            loss_weights=[1.0, 0.5],
            beta=2.0,
            simpo_gamma=0.7,
            shift=True,
        )
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (ours.loss, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    for key, value in (
        ("rewards/chosen", ours.metrics.chosen_rewards),
        ("rewards/rejected", ours.metrics.rejected_rewards),
        ("rewards/accuracies", ours.metrics.accuracies),
        ("rewards/margins", ours.metrics.margins),
    ):
        assert value.mean().item() == pytest.approx(metrics[key], rel=1e-4, abs=1e-6), key
