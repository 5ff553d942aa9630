"""Observers of a training run that any run can use: several at once, and a file of events."""

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_core.formats.checkpoint import History
from sae_core.trainer.events import EpochRecord, Observer
from sae_core.utils.files import writing


class Observers(Observer):
    """Several observers, told one after the other."""

    def __init__(self, *observers: Observer) -> None:
        self.observers = observers

    def on_start(self, n_epochs: int, steps_per_epoch: int) -> None:
        for observer in self.observers:
            observer.on_start(n_epochs, steps_per_epoch)

    def on_resume(self, n_epochs: int, steps_per_epoch: int, step: int) -> None:
        for observer in self.observers:
            observer.on_resume(n_epochs, steps_per_epoch, step)

    def on_step(self, epoch: int, step: int, loss: Tensor, l0: float) -> None:
        for observer in self.observers:
            observer.on_step(epoch, step, loss, l0)

    def on_skip(self, epoch: int, step: int, what: str) -> None:
        for observer in self.observers:
            observer.on_skip(epoch, step, what)

    def on_epoch(self, record: EpochRecord) -> None:
        for observer in self.observers:
            observer.on_epoch(record)

    def on_checkpoint(self, folder: Path, best: bool) -> None:
        for observer in self.observers:
            observer.on_checkpoint(folder, best)

    def on_end(self, history: History, stopped_early: bool) -> None:
        for observer in self.observers:
            observer.on_end(history, stopped_early)


class MetricsFile(Observer):
    """Every event as a line of JSON, added to what earlier trainings left.

    A training that is interrupted and taken up again leaves the same lines as one that is not.

    Args:
        log_freq: steps between two steps that are written, as reading a loss waits for the device.
    """

    def __init__(self, path: Path, log_freq: int) -> None:
        self.path, self.log_freq = path, log_freq

    def on_start(self, n_epochs: int, steps_per_epoch: int) -> None:
        self._write(event="start", n_epochs=n_epochs, steps_per_epoch=steps_per_epoch)

    def on_step(self, epoch: int, step: int, loss: Tensor, l0: float) -> None:
        if step % self.log_freq == 0:
            self._write(event="step", epoch=epoch, step=step, loss=float(loss), l0=l0)

    def on_skip(self, epoch: int, step: int, what: str) -> None:
        self._write(event="skip", epoch=epoch, step=step, not_finite=what)

    def on_epoch(self, record: EpochRecord) -> None:
        self._write(
            event="epoch",
            epoch=record.epoch,
            tokens=record.tokens,
            improved=record.improved,
            **record.metrics,
        )

    def on_checkpoint(self, folder: Path, best: bool) -> None:
        self._write(event="checkpoint", folder=folder.name, best=best)

    def on_end(self, history: History, stopped_early: bool) -> None:
        self._write(event="end", epochs=len(history["epoch"]), stopped_early=stopped_early)

    def length(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size if self.path.exists() else 0

    def rewind(self, length: int) -> None:
        """Take back what was told after the file had this length."""
        if self.length() > length:
            os.truncate(self.path, length)

    def _write(self, **event: Any) -> None:
        line = json.dumps(event) + "\n"
        with writing(self.path, len(line)):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
