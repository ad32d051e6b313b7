"""PyTorch's own operators, as they are started, and the bytes that they move."""

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


def traffic(operators: Iterable[Operator], least: int) -> tuple[int, int]:
    """Derive the bytes that operators load and store: each reads its inputs and writes its outputs
    once. Tensors of fewer elements than `least` do not count."""
    loaded = stored = 0
    for operator in operators:
        outputs = [x.nbytes for x in operator.outputs if x.numel >= least]
        if not (operator.moves and outputs):
            continue
        name = operator.name
        inputs = [x.nbytes for x in operator.inputs if x.numel >= least]
        if name.startswith("new_") or name.endswith("_like"):
            inputs = []
        elif operator.is_mutable and name.rstrip("_") in ("copy", "fill", "zero"):
            inputs = inputs[1:]
        loaded += sum(inputs)
        stored += sum(outputs)
        if name == "slice_backward":  # zeros for the whole tensor, then a copy into the slice
            stored += sum(inputs)
    return loaded, stored
