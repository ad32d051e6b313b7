"""Modelled time of kernels that `driver.emulate` saw; never a measurement.

One that streams takes the time of its loop, as machine code has it, for the bytes that it moves; a
short one that of what it executed.
"""

from typing import NamedTuple

from .codegen import Codegen, inspect_kernel
from .devices import Device
from .driver import Kernel, Launch
from .model import Modelled, launch_seconds, modelled_time, whole


class Streaming(NamedTuple):
    """A kernel that streams logits, read in its machine code: counts are static."""

    kernel: str
    codegen: Codegen
    logits_per_iteration: int  # of its loop

    def instructions(self, way: str) -> float:
        """For each logit: of the whole loop, of what every iteration passes ("hot"), or of the
        "shortest" way round."""
        code = self.codegen.of_shortest_way() if way == "shortest" else self.codegen
        return code.instructions_per_logit(self.logits_per_iteration, hot=way == "hot")

    def exp2(self) -> float:
        """For each logit, of the shortest way."""
        return self.codegen.of_shortest_way().exp2_per_logit(self.logits_per_iteration)

    def time(self, device: Device, num_bytes: float, num_logits: float) -> Modelled:
        """Of so many logits that it consumes and bytes that it moves."""
        code = self.codegen.of_shortest_way()
        return modelled_time(
            device,
            num_bytes=num_bytes,
            num_logits=num_logits,
            instructions_per_logit=self.instructions("shortest"),
            pipe_cycles_per_32_logits=code.pipe_cycles(self.logits_per_iteration),
        )


def read_streaming(kernel: Kernel, itemsize: int) -> Streaming:
    """Read a kernel whose tile is its first constant named BLOCK...; itemsize: bytes of a logit."""
    codegen = inspect_kernel(kernel)
    tile = next(n for name, n in kernel.constants.items() if name.startswith("BLOCK"))
    unrolled = 1
    if codegen.has_loop:
        unrolled = max(1, round(codegen.loop_load_bytes / itemsize / tile))
    return Streaming(kernel.name, codegen, tile * unrolled)


def short_seconds(
    device: Device, launch: Launch, num_blocks: int | None = None, num_bytes: float | None = None
) -> float:
    """Of a launch that ran, its start included.

    Args:
        num_blocks: if there are more than those that ran.
        num_bytes: that cross the memory bus, if not those that were counted.
    """
    counts = launch.counts
    assert counts is not None
    moved = counts.distinct["load"] + counts.distinct["store"]
    return whole(
        launch_seconds(
            device,
            counts,
            num_blocks=counts.num_blocks if num_blocks is None else num_blocks,
            blocks_per_multiprocessor=inspect_kernel(launch.kernel).blocks,
            num_bytes=moved if num_bytes is None else num_bytes,
        )
    )
