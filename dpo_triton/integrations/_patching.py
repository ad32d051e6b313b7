"""Puts functions of this package in the place of a framework's own, and back.

Everything is checked before anything is replaced, so that a refusal leaves the framework as it was.
"""

import contextlib
import functools
import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch

Function = Callable[..., Any]
Undo = Callable[[], None]
Untested = Literal["refuse", "warn"]


class Replacement(NamedTuple):
    """A torch.autograd.Function is replaced by what its `apply` shall do.

    The function gets the framework's parameters by name: it may have them in another order, and
    more of its own that have defaults.
    """

    # "package.module" that defines it, or "package.module:Class" for a method. A module that only
    # imports it is changed alone.
    owner: str
    name: str
    function: Function
    versions: tuple[str, ...] = ()  # the tested ones that have it, all if empty


@dataclass(frozen=True)
class Integration:
    """What stands in for what, in which versions of a framework."""

    framework: str
    distribution: str  # its name on the package index
    tested: tuple[str, ...]  # "0.9.5" is that release, "0.9" each 0.9.x; post-releases included
    replacements: tuple[Replacement, ...]

    def enable(self, *, untested: Untested = "refuse") -> Undo:
        """Replace the framework's functions until the returned function is called.

        A function is replaced in every module of the framework that holds it, also in those that
        import it later. May be nested, and undone in any order: the latest that is not undone yet
        is in force. Calling the undo again does nothing.

        Args:
            untested: what to do with a version that was not tested. "refuse" is an error. "warn"
                warns once, and takes it for the newest tested version that is not newer than it;
                names and parameters of what is replaced are checked as ever.

        Raises:
            ModuleNotFoundError: the framework is not installed.
            ValueError: another value of untested.
            RuntimeError: it has a version that was not tested, or lacks the function, or its
                function takes other parameters. Nothing is replaced then.
        """
        version = self._taken_for(untested)
        replacements = [
            replacement
            for replacement in self.replacements
            if not replacement.versions or _is_among(version, replacement.versions)
        ]
        found = [self._find(replacement) for replacement in replacements]
        pending = [
            (slot, _push(slot, replacement.function, names))
            for (slot, names), replacement in zip(found, replacements, strict=True)
        ]

        def undo() -> None:
            for slot, _ in pending:
                _check_untouched(slot)
            while pending:
                _remove(*pending.pop())

        return undo

    @contextmanager
    def fused(self, *, untested: Untested = "refuse") -> Iterator[None]:
        """`enable()` for the length of a `with` block; undone when an exception leaves it, too."""
        undo = self.enable(untested=untested)
        try:
            yield
        finally:
            undo()

    def _taken_for(self, untested: Untested) -> str:
        """The installed version, or the tested one that it is taken for."""
        if untested not in ("refuse", "warn"):
            raise ValueError(f'untested must be "refuse" or "warn", got {untested!r}')
        versions = ", ".join(self.tested)
        try:
            version = metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            raise ModuleNotFoundError(
                f"{self.framework} is not installed: there is no distribution "
                f"{self.distribution!r}; install one of the tested versions, {versions}"
            ) from None
        if _is_among(version, self.tested):
            return version
        nearest = _nearest(version, self.tested)
        if untested == "refuse":
            raise RuntimeError(
                f"{self.framework} {version} was not tested with dpo_triton, and nothing is "
                f"replaced; install {self.distribution} in one of the tested versions, {versions}, "
                f'or pass untested="warn" to have it taken for {nearest}, or call the functions of '
                "dpo_triton.integrations yourself"
            )
        if (self.framework, version) not in _warned:
            _warned.add((self.framework, version))
            warnings.warn(
                f"{self.framework} {version} was not tested with dpo_triton and is taken for "
                f"{nearest}: names and parameters of what is replaced are checked, results were "
                f"not compared; the tested versions are {versions}",
                stacklevel=_stacklevel(),
            )
        return nearest

    def _find(self, replacement: Replacement) -> tuple["_Slot", list[str]]:
        """The place to put the function, and the names of the parameters of what is there now."""
        module_name, _, class_name = replacement.owner.partition(":")
        module = importlib.import_module(module_name)
        owner = vars(module).get(class_name) if class_name else module
        current = vars(owner).get(replacement.name) if owner is not None else None
        if current is None:
            raise RuntimeError(
                f"{self.framework} {metadata.version(self.distribution)} has no "
                f"{replacement.owner}.{replacement.name}, so there is nothing to replace; the "
                f"tested versions are {', '.join(self.tested)}"
            )
        theirs, ours = _parameters(current), _parameters(replacement.function)
        if not _fits(theirs, ours):
            raise RuntimeError(
                f"{replacement.owner}.{replacement.name} of {self.framework} "
                f"{metadata.version(self.distribution)} takes ({', '.join(map(str, theirs))}), and "
                f"what would replace it takes ({', '.join(map(str, ours))}); the tested versions "
                f"are {', '.join(self.tested)}"
            )
        return _Slot(owner, replacement.name), [parameter.name for parameter in theirs]


class _Slot(NamedTuple):
    owner: Any  # a module or a class
    name: str


# What each slot has held, oldest first: the framework's own, then those in the order of enabling.
_held: dict[_Slot, list[Any]] = {}
_warned: set[tuple[str, str]] = set()  # frameworks and versions


def _push(slot: _Slot, function: Function, names: list[str]) -> Any:
    """Put the function there and return the object that now stands in the slot.

    names are those of the framework's parameters, in its order.
    """

    @functools.wraps(function)
    def installed(*args: Any, **kwargs: Any) -> Any:  # an object of its own, to be found again
        surplus = args[len(names) :]  # a mistake, which Python reports
        return function(*surplus, **dict(zip(names, args, strict=False)), **kwargs)

    held = _held.setdefault(slot, [vars(slot.owner)[slot.name]])
    if _is_autograd(held[0]):
        installed.apply = installed  # type: ignore[attr-defined]
    held.append(staticmethod(installed) if isinstance(held[0], staticmethod) else installed)
    _rebind(slot, held[-2], held[-1])
    return held[-1]


def _remove(slot: _Slot, installed: Any) -> None:
    held = _held[slot]
    before = held[-1]
    held.remove(installed)
    if before is installed:
        _rebind(slot, before, held[-1])
    if len(held) == 1:
        del _held[slot]


def _rebind(slot: _Slot, before: Any, after: Any) -> None:
    """Put `after` where `before` is: in its owner, and under any name in the same package."""
    setattr(slot.owner, slot.name, after)
    is_imported = getattr(_held[slot][0], "__module__", None) != slot.owner.__name__
    if not isinstance(slot.owner, ModuleType) or is_imported:
        return
    package = slot.owner.__name__.partition(".")[0]
    for module_name, module in list(sys.modules.items()):
        is_inside = module_name == package or module_name.startswith(package + ".")
        if is_inside and isinstance(module, ModuleType):
            # vars: a getattr could make a lazy module import something
            for name, value in list(vars(module).items()):
                if value is before:
                    setattr(module, name, after)


def _check_untouched(slot: _Slot) -> None:
    if vars(slot.owner)[slot.name] is not _held[slot][-1]:
        raise RuntimeError(
            f"{slot.owner.__name__}.{slot.name} was replaced by something else since it was "
            "enabled; undo that first, so that this does not undo it"
        )


def _is_among(version: str, tested: tuple[str, ...]) -> bool:
    """Whether the version is a tested one, or a part of such a series."""
    release = version.partition("+")[0]  # a local version, as in 2.13.0+cpu, says how it was built
    return any(release == one or release.startswith(one + ".") for one in tested)


def _nearest(version: str, tested: tuple[str, ...]) -> str:
    """The newest tested version that is not newer, or the oldest one."""

    def numbers(version: str) -> list[int]:
        return [int(digits) for digits in re.findall(r"\d+", version.partition("+")[0])]

    not_newer = [one for one in tested if numbers(one) <= numbers(version)]
    return max(not_newer, key=numbers) if not_newer else min(tested, key=numbers)


def _stacklevel() -> int:
    """That of the first caller outside of this file: `enable`, or a `with` block."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_code.co_filename in (__file__, contextlib.__file__):
        frame, level = frame.f_back, level + 1
    return level


def _fits(theirs: list[inspect.Parameter], ours: list[inspect.Parameter]) -> bool:
    """Whether ours can be called with all that their callers pass, and as they mean it."""
    known = {parameter.name: parameter for parameter in ours}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    are_known = all(
        their.kind in named
        and their.name in known
        # one that callers may leave out means the same when it is left out
        and their.default in (inspect.Parameter.empty, known[their.name].default)
        for their in theirs
    )
    passed = {parameter.name for parameter in theirs}
    needed = {our.name for our in ours if our.default is inspect.Parameter.empty}
    return are_known and needed <= passed


def _is_autograd(function: Any) -> bool:
    return isinstance(function, type) and issubclass(function, torch.autograd.Function)


def _parameters(function: Any) -> list[inspect.Parameter]:
    """Names, kinds and defaults; annotations say the same things in many ways."""
    is_autograd = _is_autograd(function)
    parameters = inspect.signature(function.forward if is_autograd else function).parameters
    return [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in list(parameters.values())[is_autograd:]  # forward's ctx is not apply's
    ]
