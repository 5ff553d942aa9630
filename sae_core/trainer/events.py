"""What the training loop tells the outside."""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from sae_core.formats.checkpoint import History


class EpochRecord(NamedTuple):
    """One entry of the history."""

    epoch: int
    """Counted from 1."""
    n_epochs: int
    tokens: int
    """Tokens trained on so far."""
    metrics: dict[str, float]
    improved: bool
    """`val_loss` is the least so far, or since the end-to-end phase began."""


class Observer:
    """What the loop tells the outside; every method may be left as it is."""

    def on_start(self, n_epochs: int, steps_per_epoch: int) -> None:
        """Training begins."""

    def on_resume(self, n_epochs: int, steps_per_epoch: int, step: int) -> None:
        """Training goes on after step `step` (of all), where an interrupted process left it."""

    def on_step(self, epoch: int, step: int, loss: Tensor, l0: float) -> None:
        """Step `step` (from 1) of an epoch (from 1) is done."""

    def on_skip(self, epoch: int, step: int, what: str) -> None:
        """Step `step` (from 1) of an epoch (from 1) was left out: its `what`, activations or loss,
        is not finite."""

    def on_epoch(self, record: EpochRecord) -> None:
        """An epoch and its validation are done."""

    def on_checkpoint(self, folder: Path, best: bool) -> None:
        """An SAE directory was written."""

    def on_end(self, history: History, stopped_early: bool) -> None:
        """Training is over."""
