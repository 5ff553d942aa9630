"""Short trainings on activations of known directions, and a record of what the loop tells."""

from pathlib import Path
from typing import Any

from synthetic import SparseDirections, spec
from torch import Tensor

from sae_core.formats.checkpoint import History
from sae_core.sae.kinds import build
from sae_core.sae.reconstruction import Compute
from sae_core.sae_base import SparseAutoencoder
from sae_core.train_config import TrainingConfig
from sae_core.training import EpochRecord, Observer, Trainer
from sae_core.utils.seeding import generator

D, FEATURES, K = 16, 64, 2


class Recorder(Observer):
    """Every event, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def on_start(self, n_epochs: int, steps_per_epoch: int) -> None:
        self.events.append(("start", n_epochs, steps_per_epoch))

    def on_step(self, epoch: int, step: int, loss: Tensor, l0: float) -> None:
        self.events.append(("step", epoch, step, float(loss)))

    def on_skip(self, epoch: int, step: int, what: str) -> None:
        self.events.append(("skip", epoch, step, what))

    def on_epoch(self, record: EpochRecord) -> None:
        self.events.append(("epoch", record.epoch, record.metrics["loss"]))

    def on_checkpoint(self, folder: Path, best: bool) -> None:
        self.events.append(("checkpoint",))

    def on_end(self, history: History, stopped_early: bool) -> None:
        self.events.append(("end", len(history["loss"]), stopped_early))


def make_sae(
    kind: str = "batch_topk", cls: type | None = None, n_dead: int = 0, **changes: Any
) -> Any:
    """An SAE as training begins; the first `n_dead` features too quiet for a top-k, and dead."""
    wanted = spec(kind, d_in=D, d_sae=FEATURES, n_batches_to_dead=1000, **changes)
    if wanted.top_k:
        wanted.top_k = K
    if wanted.matryoshka_sizes:
        wanted.matryoshka_sizes = [16, 32, FEATURES]
    sae: SparseAutoencoder = cls(wanted) if cls else build(wanted)
    sae.initialise(generator(0, "weights"))
    sae.W_enc.data[:, :n_dead] *= 0.01
    sae.num_batches_not_active[:n_dead] = 2000
    return sae


def train(
    sae: SparseAutoencoder | None = None,
    source: SparseDirections | None = None,
    observer: Observer | None = None,
    row_block: int | None = None,
    **config: Any,
) -> Trainer:
    settings = TrainingConfig(**{"num_epochs": 4, "early_stopping_patience": 0, **config})
    trainer = Trainer(
        sae or make_sae(),
        source or SparseDirections(),
        settings,
        observer or Observer(),
        Compute(row_block),
    )
    for _ in trainer.train():
        pass
    return trainer
