"""A checksum of a whole tensor, at the speed of memory, on the device where it is."""

import hashlib
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

BLOCK = 2**17  # words of 8 bytes: with its products it stays in a CPU's cache


def tensor_checksum(tensor: Tensor) -> str:
    """64 bits of a tensor's bytes, in hexadecimal: BLAKE2 of two sums a block, modulo 2**64.

    A word x[i] counts as k[i] * x[i] with odd random k, and its upper half once more, since of its
    highest bit the first sum keeps only a parity. So a changed element changes it for certain, and
    elements that changed places, or many changes at once, all but for certain.

    Quantised and other wrapped tensors count as the tensors inside; a DTensor is gathered, on
    all its ranks together.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in _plain(tensor.detach()):
        flat = part.reshape(-1)
        if flat.stride(0) != 1 or flat.storage_offset() * flat.element_size() % 8:
            flat = flat.clone(memory_format=torch.contiguous_format)
        raw = flat.view(torch.uint8)
        whole = len(raw) // 8 * 8
        for words in torch.split(raw[:whole].view(torch.int64), 2**10 * BLOCK):
            digest.update(_block_sums(words).cpu().numpy().tobytes())
        digest.update(raw[whole:].cpu().numpy().tobytes())
    return digest.hexdigest()


def _block_sums(words: Tensor) -> Tensor:
    """(blocks, 2) int64 of (n,) int64."""
    factors = _factors(words.device)
    buffer = torch.empty_like(factors)
    sums = []
    for block in torch.split(words, BLOCK):
        k, product = factors[: len(block)], buffer[: len(block)]
        sums.append(torch.mul(block, k, out=product).sum())
        torch.bitwise_right_shift(block, 32, out=product)
        sums.append(product.mul_(k).sum())
    return torch.stack(sums).view(-1, 2) if sums else words.new_empty(0, 2)


@lru_cache
def _factors(device: torch.device) -> Tensor:
    """(BLOCK,) int64, odd, the same for ever."""
    raw = np.random.PCG64(0).random_raw(BLOCK).view(np.int64)
    return torch.from_numpy(raw | 1).to(device)


def _plain(tensor: Tensor) -> list[Tensor]:
    if hasattr(tensor, "full_tensor"):
        return [tensor.full_tensor()]
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in _plain(getattr(tensor, name))]
    return [tensor]
