"""A training of three epochs that tells W&B of itself: python tracked_training.py FOLDER [OPTIONS]

The loop's events are made up. FOLDER gets the checkpoints; `FOLDER/pause` makes the training wait
after each epoch until `FOLDER/go` is there, and a line is printed for each epoch.
"""

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from sae_core.model_training import wandb_exit, wandb_session
from sae_core.model_training.wandb_utils import WandbRun
from sae_core.settings.services import TrackingConfig
from sae_core.training import EpochRecord
from sae_core.utils import cli

EPOCHS = 3
PAUSE = 60.0
"""Seconds that a pause may take."""


@dataclass(frozen=True)
class Training:
    folder: Annotated[Path, tyro.conf.Positional]
    seed: int = 0
    fails: bool = False
    beside: bool = False
    """Another training is told of at the same time, with its checkpoints in FOLDER/beside."""
    start_seconds: float = wandb_session.START_TIMEOUT
    """What W&B has to log in and to start a run, where an outage is to be known sooner."""
    finish_seconds: float = wandb_session.FINISH_TIMEOUT
    """Likewise, to send the rest."""
    exit_seconds: float = wandb_exit.EXIT_TIMEOUT
    """Likewise, for its background process to end."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def metrics(epoch: int) -> dict[str, float]:
    return {"loss": 1 / epoch, "dead_features": epoch, "val_loss": abs(2 - epoch) + 0.5}


def run(training: Training) -> None:
    folder = training.folder
    wandb_session.START_TIMEOUT = training.start_seconds
    wandb_session.FINISH_TIMEOUT = training.finish_seconds
    wandb_exit.EXIT_TIMEOUT = training.exit_seconds
    login = wandb_session.log_in(training.tracking)
    config = {"data": {"seed": training.seed}, "runtime": {"device": "cpu"}}
    tags = ("standard", "layer 1", "x" * 80)
    with ExitStack() as stack:
        tracking = stack.enter_context(WandbRun(login, "a.run", folder, config, tags))
        told = [tracking]
        if training.beside:
            points = folder / "beside"
            points.mkdir()
            told.append(stack.enter_context(WandbRun(login, "b.run", points, config, tags)))
        for epoch in range(1, EPOCHS + 1):
            record = EpochRecord(epoch, EPOCHS, 10 * epoch, metrics(epoch), epoch <= 2)
            for each in told:
                each.on_epoch(record)
            print(f"epoch {epoch}", flush=True)
            wait(folder)
        if training.fails:
            raise RuntimeError("the training failed")
        sae = folder / "final"
        sae.mkdir(exist_ok=True)
        (sae / "weights.pt").write_text("the SAE")
        tracking.exported(sae)
        ended = time.monotonic()
    print(f"the end took {time.monotonic() - ended:.1f} s", flush=True)
    told = time.monotonic()
    wandb_session.add_to_summary(
        login, folder, wandb_session.evaluation_summary({"fvu": 0.25, "run_name": "x"})
    )
    print(f"the evaluation took {time.monotonic() - told:.1f} s", flush=True)


def wait(folder: Path) -> None:
    end = time.monotonic() + PAUSE
    while (folder / "pause").exists() and time.monotonic() < end:
        if (folder / "go").exists():
            (folder / "go").unlink()
            return
        time.sleep(0.02)


if __name__ == "__main__":
    cli.run(run, Training, "")
