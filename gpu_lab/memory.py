"""Memory of an emulated GPU: what may be touched, by whom, and how much of it was."""

import ctypes
from collections import Counter
from collections.abc import Iterable

import numpy as np
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

NUMPY: dict[str, type] = {  # by the type's name in PTX
    "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64,
    "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64,
    "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64,
    "f16": np.float16, "f32": np.float32, "f64": np.float64,
}  # fmt: skip
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # by bytes


class GlobalMemory:
    """The tensors of a launch at their own addresses; what is outside of their views is an error.

    So a kernel that reads the padding between the rows of `logits[..., :50257]` is caught, though
    the memory is there.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        inside: dict[int, np.ndarray] = {}  # storage -> one truth value a byte
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() == 0:
                continue
            mine = inside.setdefault(storage.data_ptr(), np.zeros(storage.nbytes(), np.bool_))
            size = tensor.element_size()
            once = tensor[tuple(slice(0, 1 if s == 0 else None) for s in tensor.stride())]
            view = as_strided(
                mine[once.storage_offset() * size :],
                (*once.shape, size),
                (*(stride * size for stride in once.stride()), 1),
            )
            view[...] = True
        self.starts = np.array(sorted(inside), np.int64)
        self.buffers = []
        self.outside = []  # bytes that belong to no view, before each offset
        for start in sorted(inside):
            num_bytes = inside[start].size
            raw = (ctypes.c_uint8 * num_bytes).from_address(start)
            self.buffers.append(np.ctypeslib.as_array(raw))
            self.outside.append(np.zeros(num_bytes + 1, np.int64))
            np.cumsum(~inside[start], out=self.outside[-1][1:])
        self.lanes: Counter[tuple[str, int]] = Counter()  # ("load", bytes) -> lanes that did it
        self.distinct: Counter[str] = Counter()  # "load" -> bytes, what lanes share counted once

    def load(self, address: np.ndarray, size: int, count: int, text: str) -> list[np.ndarray]:
        """`count` neighbouring words of `size` bytes for each of the addresses."""
        words, index = self._locate("load", address, size, count, text)
        return [words[index + i] for i in range(count)]

    def store(self, address: np.ndarray, values: list[np.ndarray], text: str) -> None:
        words, index = self._locate("store", address, values[0].itemsize, len(values), text)
        for i, value in enumerate(values):
            words[index + i] = value

    def add(self, address: np.ndarray, values: np.ndarray, text: str) -> None:
        """Atomically, in the order of the lanes."""
        words, index = self._locate("atomic", address, values.itemsize, 1, text)
        np.add.at(words.view(values.dtype), index, values)

    def num_bytes(self, kind: str) -> int:
        return sum(size * lanes for (k, size), lanes in self.lanes.items() if k == kind)

    def _locate(
        self, kind: str, address: np.ndarray, size: int, count: int, text: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """The buffer that holds them all, as words of `size` bytes, and the words' indices."""
        width = size * count
        if (address % width).any():
            raise MemoryError(f"misaligned {kind} of {width} bytes: {text}")
        which = int(np.searchsorted(self.starts, address.min(), "right")) - 1
        if which >= 0:
            buffer, outside = self.buffers[which], self.outside[which]
            offset = address - self.starts[which]
            if offset.max() + width <= buffer.size and (
                (outside[offset + width] == outside[offset]).all()
            ):
                self.lanes[kind, width] += address.size
                is_distinct = (address[1:] > address[:-1]).all()
                num_distinct = address.size if is_distinct else np.unique(address).size
                self.distinct[kind] += width * num_distinct
                # A storage starts at a multiple of 8 bytes, so words lie where its addresses do.
                return buffer[: buffer.size // size * size].view(UNSIGNED[size]), offset // size
        raise MemoryError(f"{kind} of {width} bytes outside of the launch's tensors: {text}")


class SharedMemory:
    """Shared memory of the blocks that run together: bounds, and races between barriers.

    A race is an access to what another warp has written, or a write to what another warp has read,
    with no barrier between them. Where several warps write the same bytes with the same values,
    as copies of one sum, there is none.
    """

    MANY = -2  # more than one warp has read it

    def __init__(self, num_blocks: int, size: int) -> None:
        self.size = size
        self.stride = (size + 15) // 16 * 16  # from one block's memory to the next
        self.bytes = np.zeros(num_blocks * self.stride, np.uint8)
        self.writer = np.full(self.bytes.size, -1, np.int32)  # warp that wrote it; -1: nobody
        self.reader = np.full(self.bytes.size, -1, np.int32)  # since the last barrier
        self.is_fresh = np.zeros(self.bytes.size, np.bool_)  # written since the last barrier

    def pass_barrier(self, blocks: np.ndarray) -> None:
        """All warps of these blocks have met: what was written before is everybody's."""
        self.is_fresh.reshape(-1, self.stride)[blocks] = False
        self.reader.reshape(-1, self.stride)[blocks] = -1

    def load(
        self, block: np.ndarray, warp: np.ndarray, address: np.ndarray, size: int, count: int,
        text: str,
    ) -> list[np.ndarray]:  # fmt: skip
        where = self._locate(block, address, size * count, text)
        touched = where[:, None] + np.arange(size * count)
        writer = self.writer[touched]
        if (writer == -1).any():
            raise MemoryError(f"shared memory is read before anything was written: {text}")
        if (self.is_fresh[touched] & (writer != warp[:, None])).any():
            raise MemoryError(f"race: another warp's write is read without a barrier: {text}")
        mine = np.broadcast_to(warp[:, None], touched.shape)
        readers = self.reader[touched]
        self.reader[touched] = np.where((readers == -1) | (readers == mine), mine, self.MANY)
        self.reader[touched[self.reader[touched] != mine]] = self.MANY  # others read it with me
        words = self.bytes.view(UNSIGNED[size])
        return [words[where // size + i] for i in range(count)]

    def store(
        self, block: np.ndarray, warp: np.ndarray, address: np.ndarray, values: list[np.ndarray],
        text: str,
    ) -> None:  # fmt: skip
        size = values[0].itemsize
        where = self._locate(block, address, size * len(values), text)
        touched = where[:, None] + np.arange(size * len(values))
        mine = np.broadcast_to(warp[:, None], touched.shape)
        readers = self.reader[touched]
        if ((readers != -1) & (readers != mine)).any():
            raise MemoryError(f"race: what another warp has read is overwritten: {text}")
        words = self.bytes.view(UNSIGNED[size])

        def differs() -> np.ndarray:
            """Whether what a lane writes is other than what is there."""
            each = [words[where // size + i] != value for i, value in enumerate(values)]
            return np.logical_or.reduce(each)[:, None]

        if (self.is_fresh[touched] & (self.writer[touched] != mine) & differs()).any():
            raise MemoryError(f"race: two warps write the same bytes: {text}")
        self.writer[touched] = mine
        for i, value in enumerate(values):
            words[where // size + i] = value
        if ((self.writer[touched] != mine) & differs()).any():
            raise MemoryError(f"race: two warps write the same bytes at once: {text}")
        self.is_fresh[touched] = True

    def _locate(self, block: np.ndarray, address: np.ndarray, width: int, text: str) -> np.ndarray:
        if (address % width).any():
            raise MemoryError(f"misaligned {width}-byte access to shared memory: {text}")
        if address.min() < 0 or address.max() + width > self.size:
            raise MemoryError(f"outside of the {self.size} bytes of shared memory: {text}")
        return block * self.stride + address
