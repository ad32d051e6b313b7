"""What a file of reference log-probabilities was made from, and in words what differs."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .._language_model import language_model
from ._checksum import tensor_checksum
from ._model_tensors import model_tensors

# Of a configuration: where a model came from, how it trains, and what is said of its tokens and
# its outputs; the tensors themselves say which of them are tied, and of what dtype.
UNRELATED = re.compile(
    r"_?name_or_path|_commit_hash|transformers_version|architectures|(torch_)?dtype|use_cache"
    r"|(_?attn|_?experts)_implementation|tie_word_embeddings"
    r"|initializer_\w+|gradient_checkpointing|router_aux_loss_coef|\w*(dropout|pdrop|layerdrop)"
    r"|(pad|bos|eos|sep|cls|mask|unk|decoder_start)_token_id|id2label|label2id|num_labels|problem_type|task_specific_params"
    r"|return_dict|output_(attentions|hidden_states|router_logits)"
)


def origin(model: nn.Module, tokenizer: Any) -> dict[str, str]:
    """All that values depend on but the rows, as texts by which two origins can be compared."""
    return {
        "model": json.dumps(_model_parts(model)),
        "autocast": _autocast(model),
        "tokenizer": json.dumps(_tokenizer_parts(tokenizer)),
    }


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 of the configuration, and of name, dtype, shape and all values of each tensor.

    Only what changes a log-probability counts: not where the model was loaded from, its dropout,
    its special tokens, or adapters that are off (`model.disable_adapter()`).
    """
    return hashlib.sha256(json.dumps(_model_parts(model)).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of vocabulary, special tokens but the padding, and chat template; "none" for None."""
    parts = _tokenizer_parts(tokenizer)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest() if parts else "none"


def difference(name: str, found: str | None, now: str) -> str:
    """Say how a part of an origin differs from the present one, which it does."""
    try:
        before, after = (json.loads(text or "{}") for text in (found, now))
    except ValueError:  # "autocast", which is no JSON
        return f"{found} then, {now} now"
    if name == "tokenizer":
        if before and after:
            parts = [part for part in after if before.get(part) != after[part]]
            return f"its {' and its '.join(parts)} changed"
        return "there was none" if after else "there was one, now there is none"
    told = [
        _changed_tensors(before.get("tensors", {}), after["tensors"]),
        _changed_entries(before.get("configuration", {}), after["configuration"]),
    ]
    return "; ".join(text for text in told if text)


def _model_parts(model: nn.Module) -> dict[str, dict[str, Any]]:
    configuration = _flat(language_model(model).config.to_dict())
    tensors = {
        name: f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} "
        + tensor_checksum(tensor)
        for name, tensor in model_tensors(model).items()
    }
    return {"configuration": dict(sorted(configuration.items())), "tensors": tensors}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Entries that count, those of inner configurations under "outer.inner"."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if UNRELATED.fullmatch(str(name)):
            continue
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = json.loads(json.dumps(value, default=str))
    return flat


def _tokenizer_parts(tokenizer: Any) -> dict[str, str]:
    if tokenizer is None:
        return {}
    vocabulary = dict(tokenizer.get_vocab())
    for token in getattr(tokenizer, "get_added_vocab", dict)():  # a padding token, often
        vocabulary.pop(token, None)
    special = {k: v for k, v in tokenizer.special_tokens_map.items() if k != "pad_token"}
    parts = {
        "vocabulary": sorted(vocabulary.items()),
        "special tokens": special,
        "chat template": getattr(tokenizer, "chat_template", None),
    }
    return {
        name: hashlib.sha256(json.dumps(part, sort_keys=True, default=str).encode()).hexdigest()
        for name, part in parts.items()
    }


def _autocast(model: nn.Module) -> str:
    device = next(model.parameters()).device.type
    if not torch.is_autocast_enabled(device):
        return "no autocast"
    return f"autocast to {str(torch.get_autocast_dtype(device)).removeprefix('torch.')}"


def _changed_entries(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    names = [k for k in {**before, **after} if before.get(k) != after.get(k)]
    if not names:
        return ""
    name = names[0]
    return f"{name} was {before.get(name)!r}, is {after.get(name)!r}" + _and_more(len(names) - 1)


def _changed_tensors(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    added = [name for name in after if name not in before]
    gone = [name for name in before if name not in after]
    for names, told in (
        (added, "an adapter is on; call this inside of model.disable_adapter()"),
        (gone, "an adapter was on, and now is not"),
    ):
        if any(".base_layer." in name or name.startswith("prompt_encoder.") for name in names):
            return told
    if added or gone:
        name, *_ = added or gone
        had = "had no" if added else "had a"
        return f"it {had} tensor {name}" + _and_more(len(added) + len(gone) - 1)
    changed = [name for name in after if before[name] != after[name]]
    kinds = {name: [t[name].rpartition(" ")[0] for t in (before, after)] for name in changed}
    for name, (was, now) in kinds.items():
        if was != now:
            return f"{name} was {was}, is {now}" + _and_more(len(changed) - 1)
    if changed:
        return f"{len(changed)} of {len(after)} tensors have other values, the first {changed[0]}"
    return ""


def _and_more(count: int) -> str:
    return f" (and {count} more)" if count else ""
