"""A training that is hit at a chosen moment: python interrupted_training.py FOLDER [OPTIONS]

Checkpoints go to FOLDER/points, the SAE to FOLDER/sae. The activations are made up.
"""

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from synthetic import SparseDirections, made_up
from torch import Tensor

from sae_core.sae.config import SAEConfig
from sae_core.sae_train import SAETrainer
from sae_core.train_config import RuntimeConfig, TrainingConfig
from sae_core.trainer.resume import forget_states
from sae_core.trainer.training_inputs import Settings
from sae_core.training import Observer
from sae_core.utils import cli
from sae_core.utils.run_lock import run_lock


@dataclass(frozen=True)
class Training:
    folder: Annotated[Path, tyro.conf.Positional]
    hit: str = ""
    """What is hit: a step, the `fsync`, `rename` or `rmtree` of a checkpoint's making, or what
    comes after the export."""
    at: int = 1
    """Which one of them."""
    by: str = "KILL"
    """The signal, or `wait` to wait there for one."""
    n_validation: int = 8
    topk: int = 2
    runtime: RuntimeConfig = field(default_factory=lambda: RuntimeConfig(resume_minutes=0.0))


class Hit(Observer):
    """Calls `strike` at every step."""

    def __init__(self, strike: Callable[[], None]) -> None:
        self.strike = strike

    def on_step(self, epoch: int, step: int, loss: Tensor, l0: float) -> None:
        self.strike()


def striker(training: Training) -> Callable[[], None]:
    count = itertools.count(1)

    def strike() -> None:
        if next(count) != training.at:
            return
        if training.by == "wait":
            print("waiting", flush=True)
            time.sleep(1000)
        else:
            os.kill(os.getpid(), getattr(signal, f"SIG{training.by}"))

    return strike


def strike_before(owner: Any, name: str, strike: Callable[[], None]) -> None:
    call = getattr(owner, name)

    def struck(*args: Any, **options: Any) -> Any:
        strike()
        return call(*args, **options)

    setattr(owner, name, struck)


def run(training: Training) -> None:
    strike = striker(training)
    owners = {"fsync": os, "rename": Path, "rmtree": sys.modules["shutil"]}
    if training.hit in owners:
        strike_before(owners[training.hit], training.hit, strike)
    points = training.folder / "points"
    with run_lock(points):
        trainer = SAETrainer(
            made_up(SparseDirections(n_validation=training.n_validation)),
            Settings(
                sae=SAEConfig(topk=training.topk, n_batches_to_dead=3, sae_expansion=4),
                training=TrainingConfig(num_epochs=3, early_stopping_patience=0),
                runtime=replace(training.runtime, device="cpu", log_freq=1),
            ),
            points,
            Hit(strike) if training.hit == "step" else Observer(),
        )
        trainer.train()
        trainer.export(training.folder / "sae")
        if training.hit == "export":
            strike()
        forget_states(points)


if __name__ == "__main__":
    cli.run(run, Training, "")
