"""The state of a training on disk, and the lock of the folder that it is in."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Step(NamedTuple):
    """What a step gave."""

    loss: float
    margin: float  # mean reward of chosen over rejected
    accuracy: float  # share of the pairs with a margin above 0; a tie counts as half
    seconds: float


class NotFinite(ArithmeticError):
    """A loss or a weight is NaN or infinite, and nothing that comes after could be used."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder, made if it is not there. The system lets go of it when the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError as error:
            raise ValueError(
                f"--output {folder} is in use by another run; wait for it, or pass another --output"
            ) from error
        yield


class Checkpoint(NamedTuple):
    """Where the state is kept, every so many steps."""

    path: Path
    every: int
    settings: dict[str, str]  # by command-line option; a run resumes with the same

    def save(
        self,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        steps: Sequence[Step],
    ) -> None:
        """Replace the last one by a whole one; the last one stays where that fails."""
        bad = [name for name, p in parameters.items() if not torch.isfinite(p).all()]
        if bad:
            raise NotFinite(f"step {len(steps)}: {bad[0]} is not finite, of {len(bad)} weights")
        state = dict(
            settings=self.settings,
            parameters={name: p.detach() for name, p in parameters.items()},
            optimizer=optimizer.state_dict(),
            steps=[tuple(step) for step in steps],
        )
        written = self.path.with_name(self.path.name + ".tmp")
        try:
            torch.save(state, written)
            os.replace(written, self.path)
        except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of PyTorch's
            raise OSError(f"{self.path} cannot be written, the last one stays: {error}") from error
        finally:
            written.unlink(missing_ok=True)

    def load(
        self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> list[Step]:
        """Restore the last one and return its steps; none where a run was stopped before it."""
        if not self.path.exists():
            print(f"{self.path} is not there: stopped before the first; starting at step 0")
            return []
        state = self.read()
        wanted, once = self.settings["steps"], state["settings"]["steps"]
        if wanted != once:
            print(f"--steps {wanted}, once {once}: from step {len(state['steps'])} on the learning "
                  "rate goes down anew")  # fmt: skip
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state["parameters"][name])
        optimizer.load_state_dict(state["optimizer"])
        return [Step(*step) for step in state["steps"]]

    def read(self) -> dict[str, Any]:
        """Return the state, which must be whole and have these settings; --steps may be more."""
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            found, done = state["settings"], len(state["steps"])
        except Exception as error:  # what torch.load makes of a cut file is of many kinds
            raise ValueError(
                f"{self.path} is no whole checkpoint ({str(error).partition(chr(10))[0]}); delete "
                "it to start at step 0, or copy it anew"
            ) from error
        other = [k for k, value in self.settings.items() if found.get(k) != value and k != "steps"]
        if other:
            raise ValueError(
                f"--{other[0].replace('_', '-')} must be {found.get(other[0])}, as in "
                f"{self.path}, got {self.settings[other[0]]}; a run resumes with its own settings: "
                "repeat them, or pass another --output"
            )
        if int(self.settings["steps"]) < done:
            raise ValueError(f"--steps must be at least {done}, which {self.path} has done")
        return dict(state)
