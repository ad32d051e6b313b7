"""Threads that share the rows of a call."""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch

# Logits of a thread below which waking another one costs more than it saves.
GRAIN = 1 << 16


class _Pool:
    """Threads of this process: a fork leaves them behind."""

    executor: ThreadPoolExecutor | None = None

    def get(self) -> ThreadPoolExecutor:
        if self.executor is None:
            self.executor = ThreadPoolExecutor(os.cpu_count(), "dpo_triton")
        return self.executor

    def forget(self) -> None:
        self.executor = None


_pool = _Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.forget)


def share_rows(loop: Callable[..., None], num_rows: int, row_size: int, *inputs: Any) -> None:
    """Run a loop over num_rows rows on as many threads as PyTorch would use, this one among them.

    `loop(counter, step, num_rows, *inputs)` claims rows from the counter until there are none, so
    that a thread which is held up, or does not come at all, leaves its rows to the others.
    """
    num_threads = min(torch.get_num_threads(), num_rows, num_rows * row_size // GRAIN)
    counter = ctypes.c_int64()
    step = max(1, GRAIN // row_size)
    inputs = (ctypes.addressof(counter), step, num_rows, *inputs)
    if num_threads <= 1:
        loop(*inputs)
        return
    helpers: list[Future[None]] = []
    with suppress(RuntimeError):  # at the interpreter's end no thread starts: this one does it all
        helpers += [_pool.get().submit(loop, *inputs) for _ in range(num_threads - 1)]
    try:
        loop(*inputs)
    finally:
        for helper in helpers:
            if not helper.cancel():
                helper.result()
