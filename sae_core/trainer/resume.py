"""Where an interrupted training is taken up again: its newest state, on disk.

A state is a folder named by a number. It is written under another name, synced and renamed, and
only then is the one before it deleted. So whatever dies at any instant, the newest state is whole.
It records which training it belongs to; a state of another training is moved aside.
"""

import copy
import json
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_core.formats.checkpoint import read_tensors
from sae_core.trainer.training_state import TrainingState
from sae_core.utils.errors import SAEError, one_line
from sae_core.utils.files import file_sha256, sync
from sae_core.utils.naming import STALE_STATES, STATES
from sae_core.utils.transfer import Moment, host_like

TENSORS, VALUES = "tensors.pt", "state.json"


class SavedStates:
    """The states of one training.

    Args:
        folder: theirs alone.
        fingerprint: all that makes the result, as nested dicts of JSON values.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        self.folder = folder
        self.fingerprint: dict[str, Any] = json.loads(json.dumps(fingerprint))

    def newest(self) -> TrainingState | None:
        """The state to go on from, if there is one.

        States of another training, or damaged ones, are moved aside, and a line says so.
        """
        numbers = self._numbers()
        if not numbers:
            return None
        folder = self.folder / str(max(numbers))
        try:
            stored = json.loads((folder / VALUES).read_text(encoding="utf-8"))
            if file_sha256(folder / TENSORS) != stored["sha256"]:
                raise SAEError(f"{TENSORS} has changed")
            tensors, values = read_tensors(folder / TENSORS), stored["values"]
            changed = _differences(stored["fingerprint"], self.fingerprint)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SAEError) as error:
            self.set_aside(f"cannot be read ({one_line(error)})")
            return None
        if changed:
            self.set_aside(f"is of another training: {', '.join(changed)} differ")
            return None
        return TrainingState(tensors, values)

    def save(self, state: TrainingState) -> None:
        """Store a state in place of the one before it.

        Raises:
            SAEError: it cannot be written; the one before it is still there.
        """
        numbers = self._numbers()
        target = self.folder / str(max(numbers, default=0) + 1)
        staging = self.folder / ".writing"
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            with (staging / TENSORS).open("wb") as file:
                torch.save(state.tensors, file)
            content = {
                "fingerprint": self.fingerprint,
                "sha256": file_sha256(staging / TENSORS),
                "values": state.values,
            }
            (staging / VALUES).write_text(json.dumps(content), encoding="utf-8")
            for path in (staging / VALUES, staging / TENSORS, staging):
                sync(path)
            staging.rename(target)
            for path in (self.folder, self.folder.parent):
                sync(path)
        except (OSError, RuntimeError) as error:  # torch.save has its own class for a full disk
            shutil.rmtree(staging, ignore_errors=True)
            reason = error.strerror if isinstance(error, OSError) else one_line(error)
            raise SAEError(
                f"{target}: a state of {_n_bytes(state.tensors):,} bytes cannot be written "
                f"({reason}); free some space or choose another folder for the checkpoints"
            ) from error
        for number in numbers:
            shutil.rmtree(self.folder / str(number), ignore_errors=True)

    def set_aside(self, reason: str) -> None:
        """Move the states away, as they are not to be used, and say why."""
        stale = self.folder.with_name(STALE_STATES)
        shutil.rmtree(stale, ignore_errors=True)
        self.folder.rename(stale)
        sync(stale.parent)
        print(
            f"{self.folder}: the saved state {reason}; it is now in {stale}, and the training "
            "starts over",
            flush=True,
        )

    def _numbers(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        return [int(path.name) for path in self.folder.iterdir() if path.name.isdigit()]


class StateWriter:
    """Stores states in a thread while their training goes on.

    A state is copied first: a GPU does this between two steps, and the program does not wait.
    """

    def __init__(self, states: SavedStates, device: torch.device) -> None:
        self.states, self.device = states, device
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._copies: dict[str, Tensor] = {}

    def begin(self, state: TrainingState) -> None:
        """Begin to store a state, once the one before it is stored.

        Raises:
            SAEError: that one could not be written.
        """
        self.wait()
        copied = TrainingState(self._copied(state.tensors), copy.deepcopy(state.values))
        self._writing = self._thread.submit(self._save, copied, Moment.now(self.device))

    def wait(self) -> None:
        """Wait until the state that was given last is stored.

        Raises:
            SAEError: it cannot be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _copied(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies in the machine's memory, which is used again for the next state."""
        for name, tensor in tensors.items():
            if name not in self._copies or self._copies[name].shape != tensor.shape:
                self._copies[name] = host_like(tensor, self.device)
            self._copies[name].copy_(tensor.detach(), non_blocking=True)
        return {name: self._copies[name] for name in tensors}

    def _save(self, state: TrainingState, copied: Moment) -> None:
        copied.wait()
        self.states.save(state)


def forget_states(checkpoints: Path) -> None:
    """Delete the states next to a training's checkpoints; nothing can be resumed afterwards."""
    shutil.rmtree(checkpoints / STATES, ignore_errors=True)


class Timer:
    """Says when a state is due: so many minutes after the last one."""

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self.restart()

    def restart(self) -> None:
        self._last = time.monotonic()

    @property
    def is_due(self) -> bool:
        return time.monotonic() >= self._last + 60 * self.minutes


def _n_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _differences(stored: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """The keys, with dots, whose values are not the same."""
    found: list[str] = []
    for key in sorted({*stored, *wanted}):
        a, b = stored.get(key), wanted.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found.extend(_differences(a, b, f"{prefix}{key}."))
        elif a != b:
            found.append(f"{prefix}{key}")
    return found
