"""A transformers model's sequence log-probabilities, against its own full logits in float64."""

import copy
from types import SimpleNamespace

import pytest
import torch
from batches import max_error
from processes import run_processes
from tiny_models import (
    FAMILIES,
    SLOW,
    SMALL,
    VOCAB_SIZE,
    by_full_logits,
    tiny_batch,
    tiny_model,
    transformers,
)
from torch import Tensor, nn

from dpo_triton import reference, seq_logprob_from_model
from dpo_triton._language_model import logit_scaling


def gradients(values: Tensor, model: nn.Module, upstream: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(values, list(named.values()), upstream, allow_unused=True)
    return {
        name: torch.zeros_like(p) if grad is None else grad
        for (name, p), grad in zip(named.items(), grads, strict=True)
    }


def in_float64(model: nn.Module, *args: Tensor, **options):
    """On any device: Triton computes in float32, and is what "auto" means on a GPU."""
    return seq_logprob_from_model(model, *args, backend="torch", **options)


def assert_same(model: nn.Module, batch: dict[str, Tensor], rtol: float = 1e-9) -> None:
    upstream = torch.randn(4, dtype=torch.float64, device=batch["mask"].device)
    values = in_float64(model, **batch)
    exact = by_full_logits(model, batch)
    assert values[2] == 0
    assert max_error(values, exact.detach().cpu()) <= rtol * float(exact.detach().abs().max())
    ours, theirs = (gradients(x, model, upstream.to(x.dtype)) for x in (values, exact))
    for name, grad in ours.items():
        truth = theirs[name].cpu()
        assert max_error(grad, truth) <= rtol * (1e-3 + float(truth.abs().max())), name


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[pytest.mark.slow] * (f in SLOW)) for f in FAMILIES]
)
def test_values_and_gradients_of_every_parameter(family, device):
    assert_same(tiny_model(family, device=device), tiny_batch(device))


def test_xlstm():
    """Its own backward pass fails on a CPU, and its logits are float32 whatever its weights are."""
    config = transformers.xLSTMConfig(
        **SMALL | dict(hidden_size=64, head_dim=16),
        output_logit_soft_cap=3.0,
        num_heads=4,
        num_blocks=1,
        qk_dim_factor=1.0,
        chunk_size=11,
        mode="train",
    )
    model, batch = transformers.xLSTMForCausalLM(config).double().eval(), tiny_batch()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
        exact = by_full_logits(model, batch)
        assert max_error(seq_logprob_from_model(model, **batch), exact) <= 1e-5


def test_mpts_scale_in_words():
    """MosaicML's class, which is not in transformers, reads it; other words are refused."""

    class MPTForCausalLM(nn.Module):
        def __init__(self, logit_scale):
            super().__init__()
            self.config = SimpleNamespace(d_model=16, logit_scale=logit_scale)

        def get_output_embeddings(self):
            raise AssertionError

    assert logit_scaling(MPTForCausalLM("inv_sqrt_d_model")).logit_scale == 0.25
    with pytest.raises(ValueError, match=r"logit_scale .* must be a number .*, got 'half'"):
        logit_scaling(MPTForCausalLM("half"))


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_float32(family, device):
    """The dtype that people train in, against the same weights in float64."""
    model, batch = tiny_model(family, torch.float32, device), tiny_batch(device)
    values = seq_logprob_from_model(model, **batch, reduction="sum", temperature=1.3)
    assert values.dtype == torch.float32
    exact = by_full_logits(model.double(), batch, reduction="sum", temperature=1.3)
    assert max_error(values, exact.detach().cpu()) <= 1e-4 * float(exact.detach().abs().max())


def test_defaults_score_every_real_token(device):
    model, batch = tiny_model("llama", device=device), tiny_batch(device)
    ids, attention = batch["input_ids"], batch["attention_mask"]
    values, stats = in_float64(model, ids, attention, stats=("lengths", "token_logps"))
    assert stats["lengths"].tolist() == [10.0, 6.0, 10.0, 10.0]  # all but the first of each
    assert stats["token_logps"].shape == ids.shape
    expected = reference.seq_logprob(model(ids, attention).logits, ids, attention, shift=True)
    assert max_error(values, expected.detach().cpu()) <= 1e-12
    labels = ids.masked_fill(batch["mask"] == 0, -100)
    by_labels = in_float64(model, ids, attention, labels)
    by_mask = in_float64(model, ids, attention, mask=batch["mask"] != 0)
    assert torch.equal(by_labels, by_mask)


def test_the_head_makes_no_logits():
    """Outside of the operator, whose tiles have tests of their own, nothing has V columns."""
    model, batch = tiny_model("llama", torch.float32), tiny_batch()
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape[-1:] == (VOCAB_SIZE,):
                largest = max(largest, out.numel() // VOCAB_SIZE)
            return out

    with Sizes():
        seq_logprob_from_model(model, **batch)
        assert largest == 0
        by_full_logits(model, batch)
        assert largest == 44


def test_autocast(device):
    model, batch = tiny_model("llama", torch.float32, device), tiny_batch(device)
    with torch.autocast(device.type, torch.bfloat16):
        values = seq_logprob_from_model(model, **batch)
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert values.dtype == torch.float32
    exact = reference.seq_logprob(logits.double(), batch["input_ids"], batch["mask"], shift=True)
    assert max_error(values, exact.detach().cpu()) <= 1e-3 * float(exact.detach().abs().max())
    values.sum().backward()
    assert model.lm_head.weight.grad.dtype == torch.float32
    assert model.lm_head.weight.grad.isfinite().all()


def test_autocast_leaves_a_float64_model_alone():
    """As it leaves PyTorch's own products of float64: values are float64, and say so."""
    model, batch = tiny_model("llama"), tiny_batch()
    exact = by_full_logits(model, batch).detach()
    with torch.autocast("cpu", torch.bfloat16):
        values = in_float64(model, **batch)
    assert values.dtype == torch.float64
    assert max_error(values, exact) <= 1e-12


def test_lora_of_the_backbone_and_a_saved_head(device):
    peft = pytest.importorskip("peft")
    for extra in ({}, dict(modules_to_save=["lm_head"])):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **extra)
        model = peft.get_peft_model(tiny_model("llama", device=device), config).double()
        batch = tiny_batch(device)
        assert_same(model, batch)
        if extra:
            with torch.no_grad():
                model.get_output_embeddings().modules_to_save["default"].weight.mul_(2.0)
            assert_same(model, batch)
        with model.disable_adapter(), torch.no_grad():
            plain = by_full_logits(model, batch)
            assert max_error(in_float64(model, **batch), plain.cpu()) <= 1e-12


def test_an_adapter_on_the_head_is_an_error():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    model = peft.get_peft_model(tiny_model("llama"), config)
    with pytest.raises(TypeError, match=r"carries an adapter.*modules_to_save.*merge"):
        seq_logprob_from_model(model, **tiny_batch())
    merged = model.double().merge_and_unload()
    assert_same(merged.requires_grad_(True), tiny_batch())


def test_what_a_model_does_to_its_logits_is_checked():
    class Doubled(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    model = Doubled(tiny_model("llama").config)
    with pytest.raises(ValueError, match=r"Doubled treats its logits.*30.0.*60.0.*logit_scale"):
        seq_logprob_from_model(model, **tiny_batch())
    model.config.logit_scale = 2.0  # now the configuration says so
    assert_same(model.double(), tiny_batch())


def test_errors_and_a_head_left_as_it_was():
    batch = tiny_batch()
    with pytest.raises(TypeError, match="get_output_embeddings"):
        seq_logprob_from_model(nn.Linear(3, 3), **batch)
    model = tiny_model("llama")
    backbone = transformers.AutoModel.from_config(model.config)
    with pytest.raises(TypeError, match=r"got LlamaModel, which ends in hidden states"):
        seq_logprob_from_model(backbone, **batch)
    with pytest.raises(ValueError, match="mask must have the shape of labels"):
        seq_logprob_from_model(model, batch["input_ids"], mask=batch["mask"][:, 1:])
    assert "forward" not in vars(model.lm_head)
    model.lm_head.forward = lambda hidden: hidden
    with pytest.raises(TypeError, match="has been replaced"):
        seq_logprob_from_model(model, **batch)


# Sequences of each rank: one each that is padded or has no answer, and a rank without an answer.
SPLITS = (([0, 2], [1, 3]), ([0, 1, 3], [2]))


def wrapped_gradients(
    wrapper: str, split: tuple[list[int], ...], seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """In a process: values and gradients of this rank's part of the batch under a wrapper."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(seed)
    model, batch = tiny_model("llama"), tiny_batch()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # Its own mesh would be one of GPUs where there are any, and over gloo ranks are on the CPU.
    mesh = init_device_mesh("cpu", (world_size,))
    if wrapper.startswith("ddp"):
        model = DistributedDataParallel(model, find_unused_parameters=wrapper == "ddp unused")
    else:
        if wrapper == "fsdp2 head apart":
            fully_shard(model.lm_head, mesh=mesh)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    values = seq_logprob_from_model(model, **{name: x[split[rank]] for name, x in batch.items()})
    values.sum().backward()
    grads = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        grads[name.removeprefix("module.")] = grad
    return values.detach(), grads


WRAPPERS = ("ddp", "ddp unused", "fsdp2", "fsdp2 head apart")


def all_wrappers(seed: int) -> dict[tuple[str, int], tuple[Tensor, dict[str, Tensor]]]:
    return {
        (name, i): wrapped_gradients(name, split, seed)
        for name in WRAPPERS
        for i, split in enumerate(SPLITS)
    }


@pytest.mark.slow
def test_ddp_and_fsdp2_equal_one_process():
    """DistributedDataParallel and FSDP2 give the mean over ranks of what each has of the batch."""
    seed = int(torch.randint(2**31, ()))
    by_rank = run_processes(all_wrappers, 2, seed)
    torch.manual_seed(seed)
    model, batch = tiny_model("llama"), tiny_batch()
    values = by_full_logits(model, batch)
    exact = gradients(values.sum() / 2, model, torch.ones((), dtype=torch.float64))
    for rank, results in enumerate(by_rank):
        for (wrapper, i), (got, grads) in results.items():
            assert max_error(got, values[SPLITS[i][rank]].detach()) <= 1e-12, wrapper
            for name, grad in exact.items():
                scale = 1e-3 + float(grad.abs().max())
                assert max_error(grads[name], grad) <= 1e-9 * scale, (wrapper, name)


class PartitionedHead:
    """What DeepSpeed's ZeRO-3 does to a module: its weight is there between the hooks of a forward
    pass, and of a backward pass once a gradient comes to what the module returned; no longer."""

    def __init__(self, head: nn.Linear) -> None:
        self.full, self.gathers = head.weight.data, 0
        self.parameter = head.weight
        self.release()
        head.register_forward_pre_hook(lambda module, args: self.gather())
        head.register_forward_hook(self.after_forward)
        head.weight.register_post_accumulate_grad_hook(lambda parameter: self.release())

    def gather(self) -> None:
        self.gathers += 1
        self.parameter.data = self.full

    def release(self) -> None:
        self.parameter.data = self.full.new_empty(0)

    def after_forward(self, module: nn.Module, args: object, output: Tensor) -> Tensor:
        self.release()
        return GatherInBackward.apply(output, self)


class GatherInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, head):
        ctx.head = head
        return output.clone()

    @staticmethod
    def backward(ctx, grad_output):
        ctx.head.gather()
        return grad_output, None


def test_a_partitioned_head_is_gathered_once_a_pass():
    model, batch = tiny_model("llama"), tiny_batch()
    exact = by_full_logits(model, batch)
    exact.sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    head = PartitionedHead(model.lm_head)
    assert model.lm_head.weight.numel() == 0
    values = seq_logprob_from_model(model, **batch)
    assert model.lm_head.weight.numel() == 0
    assert max_error(values, exact.detach()) <= 1e-12
    values.sum().backward()
    assert head.gathers == 2
    assert model.lm_head.weight.numel() == 0
    for name, parameter in model.named_parameters():
        scale = 1e-3 + float(expected[name].abs().max())
        assert max_error(parameter.grad, expected[name]) <= 1e-9 * scale, name


def zero3_gradients(seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """In a process: values and gradients of this rank's part of the batch under DeepSpeed."""
    import deepspeed
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_grad

    torch.manual_seed(seed)
    model, batch = tiny_model("llama", torch.float32), tiny_batch()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    config = dict(
        train_micro_batch_size_per_gpu=len(batch["input_ids"]) // world_size,
        zero_optimization=dict(stage=3, stage3_param_persistence_threshold=0),
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    assert model.lm_head.weight.numel() == 0
    values = seq_logprob_from_model(engine, **{k: x[rank::world_size] for k, x in batch.items()})
    engine.backward(values.sum())
    grads = {name: safe_get_full_grad(p).clone() for name, p in model.named_parameters()}
    return values.detach(), grads


@pytest.mark.slow
def test_zero3_equals_one_process(monkeypatch):
    """DeepSpeed itself, on CPUs; it compiles an operator for that when it first runs."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    seed = int(torch.randint(2**31, ()))
    by_rank = run_processes(zero3_gradients, 2, seed)
    torch.manual_seed(seed)
    model, batch = tiny_model("llama", torch.float32), tiny_batch()
    values = by_full_logits(model, batch)
    exact = gradients(values.sum() / 2, model, torch.ones(()))
    for rank, (got, grads) in enumerate(by_rank):
        assert max_error(got, values[rank::2].detach()) <= 1e-5
        for name, grad in exact.items():
            scale = 1e-3 + float(grad.abs().max())
            assert max_error(grads[name], grad) <= 1e-4 * scale, name


def test_a_copy_of_the_model_is_the_reference(device):
    """Policy equal to its reference, with and without gradients: a loss of exactly ln 2."""
    policy, batch = tiny_model("llama", torch.float32, device), tiny_batch(device)
    # Which of PyTorch's attention kernels runs may depend on what asks for a gradient.
    policy.set_attn_implementation("eager")
    with torch.no_grad():
        ref_logps = seq_logprob_from_model(copy.deepcopy(policy), **batch)
    policy.requires_grad_(False)
    policy.model.layers[0].requires_grad_(True)
    frozen_head = seq_logprob_from_model(policy, **batch)
    policy.requires_grad_(True)
    trained_head = seq_logprob_from_model(policy, **batch)
    assert torch.equal(ref_logps, frozen_head.detach())
    assert torch.equal(ref_logps, trained_head.detach())
