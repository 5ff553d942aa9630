"""The best epoch of a training, and when to stop looking for a better one."""

import math
from dataclasses import dataclass


@dataclass
class EarlyStopping:
    """The epoch with the least validation loss, and how many epochs ago that was.

    Args:
        patience: epochs without a better one after which training stops; 0 never stops it.
        min_delta: how much lower a validation loss has to be to count as better.
    """

    patience: int = 0
    min_delta: float = 0.0
    best_epoch: int | None = None
    best_loss: float = math.inf
    epochs_since_best: int = 0

    def take(self, epoch: int, val_loss: float) -> bool:
        """Take an epoch's validation loss, NaN if it has none; whether it is the best so far."""
        improved = val_loss < self.best_loss - self.min_delta
        if improved:
            self.best_epoch, self.best_loss, self.epochs_since_best = epoch, val_loss, 0
        else:
            self.epochs_since_best += 1
        return improved

    def start_over(self) -> None:
        """Compare only later epochs with each other: the loss has changed its meaning."""
        self.best_loss, self.epochs_since_best = math.inf, 0

    @property
    def is_out_of_patience(self) -> bool:
        return 0 < self.patience <= self.epochs_since_best
