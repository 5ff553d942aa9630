"""Weights & Biases as an observer of the training loop."""

import hashlib
import json
import re
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from sae_core.model_training.wandb_session import RunNote, finish, is_on, start
from sae_core.settings.services import TrackingConfig
from sae_core.trainer.events import EpochRecord, Observer
from sae_core.utils.errors import one_line
from sae_core.utils.naming import without_paths

TAG_LENGTH = 64
"""Characters that W&B takes in a tag."""


class WandbRun(Observer):
    """One training as a run of W&B, if the settings ask for one; a context that finishes it.

    Args:
        settings: as `log_in` returns them.
        name: the SAE's run name.
        checkpoints: where the run is noted.
        config: the resolved settings, in groups; of paths, W&B gets the last part.
        tags: in addition to the tags of the settings.

    Raises:
        SAEError: the key is missing or wrong, or W&B refuses the run.
    """

    def __init__(
        self,
        settings: TrackingConfig,
        name: str,
        checkpoints: Path,
        config: dict[str, Any],
        tags: tuple[str, ...],
    ) -> None:
        self.settings, self.name, self.checkpoints = settings, name, checkpoints
        self.final: dict[str, float] = {}
        self._run: Any = None
        if not is_on(settings):
            return
        config = without_paths(json.loads(json.dumps(config, default=str)))
        self.note = _note(settings, checkpoints, config)
        self._run = start(
            settings,
            self.note,
            name=name,
            config=config,
            group=settings.wandb_group,
            notes=settings.wandb_notes,
            tags=[tag[-TAG_LENGTH:] for tag in dict.fromkeys((*settings.wandb_tags, *tags))],
            job_type="train",
        )
        self.note.save(checkpoints)

    def on_epoch(self, record: EpochRecord) -> None:
        if record.improved or "val_loss" not in record.metrics:  # the epoch that is exported
            self.final = record.metrics
        # W&B drops steps that it has already, as when a training begins again after its death.
        row: dict[str, float] = {"epoch": record.epoch, "tokens": record.tokens}
        row |= {_path(name): value for name, value in record.metrics.items()}
        self._tell(lambda: self._run.log(row, step=record.epoch, commit=True))

    def configure(self, **groups: dict[str, Any]) -> None:
        """Replace groups of the settings, when more is known of them."""
        self._tell(lambda: self._run.config.update(groups, allow_val_change=True))

    def summarise(self, **values: Any) -> None:
        """Set values of the run's summary."""
        self._tell(lambda: self._run.summary.update(values))

    def exported(self, folder: Path) -> None:
        """Note the final SAE directory, and store it if the settings ask for that."""
        places = {"model_path": str(folder), "checkpoint_path": str(self.checkpoints)}
        self.summarise(**without_paths(places))
        if not self.settings.wandb_log_final_artifact:
            return

        def store() -> None:
            import wandb

            artifact = wandb.Artifact(re.sub(r"[^\w.-]", "_", self.name)[:128], type="sae")
            artifact.add_dir(str(folder))
            self._run.log_artifact(artifact)

        self._tell(store)

    def __enter__(self) -> "WandbRun":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        status = "completed" if kind is None else "failed"
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            status = "interrupted"
        final = {f"final/{name}": value for name, value in self.final.items()}
        self.summarise(status=status, **final)
        if self._run is not None:
            finish(self._run, 0 if kind is None else 1)
            if kind is None:
                replace(self.note, finished=True).save(self.checkpoints)

    def _tell(self, call: Callable[[], Any]) -> None:
        """Send W&B something; if that fails, the run ends there, and the training continues."""
        if self._run is None:
            return
        try:
            call()
        except Exception as error:  # whatever a client's background process may come up with
            print(f"W&B: sending stopped ({one_line(error)}); training continues", flush=True)
            self._run = None


def _path(metric: str) -> str:
    """`val_loss` -> `val/loss`, `loss` -> `train/loss`."""
    if metric.startswith("val_"):
        return f"val/{metric.removeprefix('val_')}"
    return f"train/{metric}"


def _note(settings: TrackingConfig, checkpoints: Path, config: dict[str, Any]) -> RunNote:
    """The run to continue, or a new one."""
    makes = {name: group for name, group in config.items() if name not in ("runtime", "output")}
    fingerprint = hashlib.sha256(json.dumps(makes, sort_keys=True).encode()).hexdigest()
    new = RunNote(
        id=secrets.token_hex(4),
        project=settings.wandb_project,
        entity=settings.wandb_entity,
        fingerprint=fingerprint,
        finished=False,
    )
    old = RunNote.load(checkpoints)
    return old if old and replace(old, id=new.id) == new else new
