"""Hashes by which a file of reference log-probabilities knows what it was made from."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..model import language_model

NAMES = ("prompt_ids", "chosen_ids", "rejected_ids")  # TRL's
MASKS = ("chosen_mask", "rejected_mask")  # of a row that has them
SAMPLE = 64  # elements of each tensor of a model that its fingerprint reads
ROW_HASH = np.dtype("V16")
# Of a configuration: where a model came from, not what it computes.
UNRELATED = ("_name_or_path", "transformers_version", "use_cache")

PreferenceRow = Mapping[str, Any]  # prompt_ids, chosen_ids, rejected_ids: each a list of ints


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 of the configuration, and of name, shape, dtype and a sample of each tensor.

    Where the model was loaded from, and by which version of transformers, does not count.
    """
    bare = language_model(model)  # DistributedDataParallel renames every tensor
    config = {k: v for k, v in bare.config.to_dict().items() if k not in UNRELATED}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(bare.state_dict().items()):
        if not isinstance(tensor, Tensor):  # the extra state of a module
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().reshape(-1)
        size = min(SAMPLE, len(flat))
        at = torch.arange(size, device=flat.device) * len(flat) // max(size, 1)
        # float64 holds every narrower dtype exactly.
        digest.update(flat[at].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of vocabulary, special tokens and chat template; "none" for None."""
    if tokenizer is None:
        return "none"
    parts = [
        sorted(tokenizer.get_vocab().items()),
        tokenizer.special_tokens_map,
        getattr(tokenizer, "chat_template", None),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def row_hash(row: PreferenceRow) -> np.void:
    """BLAKE2 of the three lists of ids and their lengths, and of a mask that leaves an id out."""
    digest = hashlib.blake2b(digest_size=ROW_HASH.itemsize)
    for name in NAMES:
        ids = np.asarray(row[name], dtype="<i8")
        digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
    for name in MASKS:
        mask = row.get(name)
        if mask is not None and 0 in mask:
            digest.update(name.encode() + np.asarray(mask, dtype="<i8").tobytes())
    return np.void(digest.digest())
