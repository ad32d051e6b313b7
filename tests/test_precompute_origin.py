"""What a reference file belongs to: model, tokenizer, autocast; how a difference is told."""

import pytest
import torch
from tiny_reference import (
    VOCAB_SIZE,
    FakeTokenizer,
    TinyModel,
    draw_dataset,
    equal,
    journal_of,
    run,
)
from torch import nn

from dpo_triton.precompute import RefLogps, model_fingerprint, tokenizer_fingerprint
from dpo_triton.precompute._checksum import tensor_checksum

pytest.importorskip("safetensors")


def others(model):
    """What the file was not made for: model, tokenizer, and the complaint."""
    larger = TinyModel()
    larger.head = nn.Linear(8, VOCAB_SIZE + 1, bias=False)
    biased = TinyModel()
    biased.head.bias = nn.Parameter(torch.zeros(VOCAB_SIZE))
    nested = TinyModel(rope=dict(theta=1.0, kind="linear"), layers=2)
    return {
        "weights": (TinyModel(seed=1), None, "2 of 2 tensors have other values, the first embed"),
        "dtype": (
            TinyModel().double(),
            None,
            r"embedding.weight was float32 .*, is float64",
        ),
        "shape": (larger, None, r"head.weight was float32 \(37, 8\), is float32 \(38, 8\)"),
        "bias": (biased, None, "it had no tensor head.bias"),
        "configuration": (TinyModel(rope_theta=2.0), None, r"rope_theta was None, is 2\.0"),
        "more": (nested, None, r"layers was None, is 2 \(and 2 more\)"),
        "tokenizer": (model, FakeTokenizer(), "made for another tokenizer: there was none"),
    }


@pytest.mark.parametrize("is_complete", [True, False], ids=["file", "journal"])
def test_another_model_or_tokenizer_is_refused(is_complete, tmp_path, monkeypatch):
    model, path = TinyModel(), tmp_path / "ref.safetensors"
    dataset = draw_dataset()
    if is_complete:
        run(model, dataset, path)
        kept = path
    else:
        kept = journal_of(model, dataset, path, monkeypatch)
    content = kept.read_bytes()
    for name, (other, tokenizer, complaint) in others(model).items():
        other.batches.clear()
        with pytest.raises(ValueError, match=complaint) as error:
            run(other, dataset, path, tokenizer=tokenizer)
        assert "made for another" in str(error.value), name
        assert "delete" in str(error.value), name
        assert not other.batches, name
        assert kept.read_bytes() == content, name
    run(model, dataset, path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_part_of_what_values_were_made_from(dtype, tmp_path):
    model, dataset, path = TinyModel(), draw_dataset(), tmp_path / "ref.safetensors"
    name = str(dtype).removeprefix("torch.")
    with torch.autocast("cpu", dtype):
        expected = run(model, dataset, path)
        assert equal(run(model, dataset, path), expected)
    with pytest.raises(ValueError, match=f"another autocast: autocast to {name} then, no autocast"):
        run(model, dataset, path)


def test_where_a_model_came_from_does_not_matter(tmp_path):
    dataset, path = draw_dataset(), tmp_path / "ref.safetensors"
    run(TinyModel(_name_or_path="here", transformers_version="5.0"), dataset, path)
    run(TinyModel(_name_or_path="there", transformers_version="5.1"), dataset, path)


def test_what_does_not_change_a_value_does_not_matter(tmp_path):
    """Padding chosen, dropout set to 0, saved by save_pretrained, meanwhile."""
    dataset, path = draw_dataset(), tmp_path / "ref.safetensors"
    before = dict(pad_token_id=None, attention_dropout=0.1, inner=dict(dtype=None, layers=2))
    after = dict(pad_token_id=3, attention_dropout=0.0, inner=dict(dtype="float32", layers=2))
    tokenizer = FakeTokenizer()
    expected = run(TinyModel(**before), dataset, path, tokenizer=tokenizer)
    tokenizer.special_tokens_map = tokenizer.special_tokens_map | {"pad_token": "<pad>"}
    tokenizer.get_vocab = lambda: {"</s>": 0, "a": 1, "<pad>": 2}
    tokenizer.get_added_vocab = lambda: {"<pad>": 2}
    model = TinyModel(**after, architectures=["TinyModel"])
    assert equal(run(model, dataset, path, tokenizer=tokenizer), expected)
    assert not model.batches
    tokenizer.chat_template = "{{ messages[0] }}"
    with pytest.raises(ValueError, match="another tokenizer: its chat template changed"):
        run(model, dataset, path, tokenizer=tokenizer)


def test_a_tokenizer_is_known_by_vocabulary_special_tokens_and_template():
    assert tokenizer_fingerprint(FakeTokenizer()) == tokenizer_fingerprint(FakeTokenizer())
    other_vocab, other_special, other_template = (FakeTokenizer() for _ in range(3))
    other_vocab.get_vocab = lambda: {"</s>": 0, "b": 1}
    other_special.special_tokens_map = {"eos_token": "a"}
    other_template.chat_template = "{{ messages[0] }}"
    every = [FakeTokenizer(), other_vocab, other_special, other_template, None]
    assert len({tokenizer_fingerprint(tokenizer) for tokenizer in every}) == 5


def test_every_element_of_every_tensor_of_a_model_counts():
    base = model_fingerprint(TinyModel())
    assert base == model_fingerprint(TinyModel())
    for name in ("embedding.weight", "head.weight"):
        at = int(torch.randint(VOCAB_SIZE * 8, ()))
        model = TinyModel()
        model.get_parameter(name).data.view(-1)[at] += 1e-3
        assert model_fingerprint(model) != base, (name, at)
    model = TinyModel()
    rows = model.embedding.weight.data[[3, 30]]
    model.embedding.weight.data[[30, 3]] = rows  # which changed places
    assert model_fingerprint(model) != base


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8, bool])
@pytest.mark.parametrize("size", [1, 7, 64, 2**17 * 8 + 3])  # bytes: no word, one, a block and more
def test_a_checksum_of_all_bytes(dtype, size):
    dtype = torch.bool if dtype is bool else dtype
    tensor = torch.randint(-(2**7), 2**7, (size,)).to(dtype)
    checksum = tensor_checksum(tensor)
    assert checksum == tensor_checksum(tensor.clone())
    assert checksum == tensor_checksum(torch.stack([tensor, tensor], 1)[:, 1])  # strided
    offset = torch.cat([tensor[:1], tensor])[1:]
    assert checksum == tensor_checksum(offset)
    a, b = (int(torch.randint(size, ())) for _ in range(2))
    for change in ([a], [0], [-1], list({a, b})):
        changed = tensor.clone()
        raw = changed.view(torch.uint8).view(size, -1)
        raw[change, -1] ^= 1 if dtype == torch.bool else 128  # signs: the highest bits
        assert tensor_checksum(changed) != checksum, change
    if tensor[a] != tensor[b]:
        swapped = tensor.clone()
        swapped[[a, b]] = tensor[[b, a]]
        assert tensor_checksum(swapped) != checksum


def test_a_checksum_of_shards_is_that_of_the_whole():
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        whole = torch.randn(5, 3)
        assert tensor_checksum(distribute_tensor(whole, mesh, [Shard(0)])) == tensor_checksum(whole)
    finally:
        dist.destroy_process_group()


def test_a_checksum_of_what_wraps_tensors_is_of_those_inside():
    from torch.testing._internal.two_tensor import TwoTensor

    inner = torch.randn(3), torch.randn(3)
    base = tensor_checksum(TwoTensor(*inner))
    assert base == tensor_checksum(TwoTensor(*(x.clone() for x in inner)))
    assert base != tensor_checksum(TwoTensor(*reversed(inner)))


def test_weights_that_are_elsewhere_are_named(tmp_path):
    model = TinyModel()
    model.embedding = nn.Embedding(VOCAB_SIZE, 8, device="meta")
    with pytest.raises(ValueError, match=r"embedding.weight must have values.*offloaded"):
        run(model, draw_dataset(), tmp_path / "ref.safetensors")
    model = TinyModel()
    model.embedding.weight.data = torch.empty(0)
    model.embedding.weight.ds_id = 1
    with pytest.raises(ValueError, match=r"embedding.weight must have values.*ZeRO-3"):
        run(model, draw_dataset(), tmp_path / "ref.safetensors")


def test_a_transformers_model_and_its_tokenizer(tmp_path):
    """Peculiar to them: where they were loaded from, and a chat template."""
    transformers = pytest.importorskip("transformers")
    from tiny_llama import save_tiny_llama

    folder = save_tiny_llama(tmp_path / "tiny")
    load = transformers.AutoModelForCausalLM.from_pretrained
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [{k: [i % 19 for i in ids] for k, ids in row.items()} for row in draw_dataset()]
    path = tmp_path / "ref.safetensors"
    expected = run(load(folder), rows, path, tokenizer=tokenizer)
    assert isinstance(expected, RefLogps)
    (folder / "copy").mkdir()
    load(folder).save_pretrained(folder / "copy")  # another place, the same model
    assert equal(run(load(folder / "copy"), rows, path, tokenizer=tokenizer), expected)
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(ValueError, match="another tokenizer: its chat template changed"):
        run(load(folder), rows, path, tokenizer=tokenizer)
