"""PyTorch's operators, as they are started."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Size(NamedTuple):
    """Of a tensor."""

    numel: int
    nbytes: int


class Operator(NamedTuple):
    name: str
    inputs: list[Size]
    outputs: list[Size]
    is_mutable: bool  # it writes to its inputs
    is_view: bool

    @property
    def moves(self) -> bool:
        """Whether it launches a kernel that reads or writes its tensors."""
        return bool(self.outputs) and not self.is_view and "empty" not in self.name


class Operators(TorchDispatchMode):
    """Notes the operators of aten that are started in its context, views too.

    One of torch.library is one call to a mode, and none here: call its body to see what it starts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.started: list[Operator] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten":
            inputs = _tensors(args)
            outputs = _tensors(result if isinstance(result, (tuple, list)) else [result])
            is_mutable = func._schema.is_mutable
            known = {x.untyped_storage().data_ptr() for x in inputs}
            shares = any(x.untyped_storage().data_ptr() in known for x in outputs)
            name = func.overloadpacket.__name__
            sizes = ([Size(x.numel(), x.nbytes) for x in some] for some in (inputs, outputs))
            self.started.append(Operator(name, *sizes, is_mutable, shares and not is_mutable))
        return result


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [x for x in values if isinstance(x, torch.Tensor) and x.numel() > 0]
