"""Implementations that are set side by side: those that can run, and why the others cannot."""

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

OURS = "dpo_triton"
TRL_KERNELS = "trl.kernels.logprob_entropy"


class Place(NamedTuple):
    """What a peer may be left out of."""

    is_headline: bool  # where the figures that are quoted come from
    has_backward: bool
    all_scored: bool


@dataclass(frozen=True)
class Peer:
    name: str
    description: str
    make: Callable[[], Callable[..., Any]]  # imports what it needs
    module: str = "torch"  # that must be there, and
    obstacle: str | None = None  # why it cannot run here, whatever is installed
    ours: bool = False
    overwrites_logits: bool = False  # when it is differentiated
    has_own_loss: bool = False  # fn returns the values and a loss, which alone has gradients
    rounds_tokens: bool = False  # a token's log-probability to the dtype of the logits
    on_target: Callable[[str], AbstractContextManager[None]] = lambda target: nullcontext()
    serves: Callable[[Place], bool] = lambda place: True

    @cached_property
    def fn(self) -> Callable[..., Any]:
        return self.make()


P = TypeVar("P", bound=Peer)


def collect(candidates: Iterable[P]) -> tuple[list[P], dict[str, str]]:
    """Return the peers that can run, and for each other name the reason."""
    runnable: list[P] = []
    not_run: dict[str, str] = {}
    for peer in candidates:
        reason = peer.obstacle or why_not(peer.module)
        if reason is not None:
            not_run[peer.name] = reason
            continue
        with forgiven(peer, not_run):
            peer.fn  # noqa: B018  (makes it)
            runnable.append(peer)
    return runnable, not_run


@contextmanager
def forgiven(peer: Peer, not_run: dict[str, str]) -> Iterator[None]:
    """Where another fails, as of another version, the reason is noted; we may not fail."""
    try:
        yield
    except Exception as error:
        if peer.ours:
            raise
        not_run[peer.name] = brief(error)


def why_not(module: str) -> str | None:
    """The reason why a peer's module cannot be imported, or None."""
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # what a package does at import without a GPU is its own affair
        hint = "; needs trl >= 1.14" if module == TRL_KERNELS else ""
        return f"{module}: {brief(error)}{hint}"
    return None


def brief(error: BaseException) -> str:
    """An exception as one short line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"
