"""Trainings that one process, or several, can do: python shared_training.py FOLDER --gpus N

Each kind of SAE from made-up activations, many features dead from the start, goes to FOLDER/<kind>,
one of them by `active_adam`; one of activations that are not all finite, which stores a state
whenever it can, to FOLDER/not_finite; two with end-to-end losses in half of the steps, streamed
from a tiny model, to FOLDER/end_to_end and, where only some windows and so not every process's have
these losses, to FOLDER/end_to_end_sample.
"""

import atexit
import os
import signal
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from synthetic import HOOK, KINDS, SparseDirections, SparseMap, made_up
from tiny_model import WIDTH

from sae_core import training
from sae_core.activations.store import StreamingSource
from sae_core.activations.token_windows import read_windows
from sae_core.data_processing.texts import read_texts
from sae_core.distributed.process_group import ProcessGroup, join
from sae_core.distributed.torchrun import launched
from sae_core.models.language_model import LanguageModel
from sae_core.sae.config import SAEConfig
from sae_core.sae.reconstruction import Compute
from sae_core.sae_base import SparseAutoencoder
from sae_core.sae_train import SAETrainer
from sae_core.train_config import (
    DataConfig,
    EndToEndConfig,
    ModelConfig,
    OptimizerName,
    RuntimeConfig,
    TrainingConfig,
)
from sae_core.trainer import ahead
from sae_core.trainer.ahead import Stepping
from sae_core.trainer.training_inputs import Settings
from sae_core.training import Observer
from sae_core.utils import cli
from sae_core.utils.errors import SAEError

LAUNCHER = "LAUNCHER_OF_SHARED_TRAINING"
"""The variable with the id of the process that starts the others."""

LEFT = "threads of the group are left"


@dataclass(frozen=True)
class Trainings:
    folder: Annotated[Path, tyro.conf.Positional]
    model: Path
    """Directory of a tiny model."""
    texts: Path
    """Processed JSON file."""
    gpus: int = 1
    device: str = "cpu"
    fail: bool = False
    """The second process fails, and the others wait for it."""
    first_only: bool = False
    """Leave out all trainings but the first."""
    static: bool = False
    """Take steps of fixed sizes, as GPUs do, where there is a top-k."""
    stop_at: int = 0
    """A step of a training after which the launcher gets SIGTERM."""


def as_on_gpus(stepping: Stepping, sae: SparseAutoencoder, compute: Compute) -> Stepping:
    return "static" if sae.spec.sae_type in ahead.KINDS else "ordinary"


class Stop(Observer):
    """Ends all processes after so many steps."""

    def __init__(self, at: int) -> None:
        self.left = at

    def on_step(self, epoch: int, step: int, loss: torch.Tensor, l0: float) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(int(os.environ[LAUNCHER]), signal.SIGTERM)


def train(
    trainings: Trainings, name: str, source: Any, group: ProcessGroup, **options: Any
) -> None:
    kind = name if name in KINDS else "batch_topk"
    sparsity = 0.01 if kind in ("standard", "gated") else 0.0
    optimizer: OptimizerName = "active_adam" if kind == "multi_batch_topk" else "adam"
    end_to_end = EndToEndConfig(
        use_end_to_end="model" in options,
        end_to_end_fraction=0.5,
        end_to_end_stride=4 if name == "end_to_end_sample" else 1,
        use_block_mse=True,
    )
    settings = Settings(
        sae=SAEConfig(
            sae_type=kind,  # type: ignore[arg-type]
            topk=2,
            sae_expansion=8,
            sparsity_penalty=sparsity,
            n_batches_to_dead=1,
        ),
        training=TrainingConfig(num_epochs=2, compute_dtype="float32", optimizer=optimizer),
        end_to_end=end_to_end,
        runtime=RuntimeConfig(
            device=trainings.device,
            batch_size=4,
            checkpoint_freq=1,
            resume_minutes=0.0 if name == "not_finite" else 60.0,
        ),
    )
    trainer = SAETrainer(
        made_up(source, **options),
        settings,
        trainings.folder / f"{name}.points",
        Stop(trainings.stop_at),
        group,
    )
    trainer.train()
    if group.is_first:
        trainer.export(trainings.folder / name)


def join_as_started(device: str) -> ProcessGroup:
    """The group, joined as by a process that has imported nothing but what it needed so far, and
    that loads a model afterwards. At the end each process names the threads that the group left."""
    for name in [name for name in sys.modules if name.startswith("torch.distributed.nn")]:
        del sys.modules[name]
    group = join(device)
    import_module("torch.distributed.nn")
    atexit.register(name_threads)
    return group


def name_threads() -> None:
    names = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
    if left := sorted(name for name in names if "gloo" in name):
        print(f"{LEFT}: {', '.join(left)}", file=sys.stderr)


def run(trainings: Trainings) -> None:
    os.environ.setdefault(LAUNCHER, str(os.getpid()))
    if launched(trainings.gpus):
        return
    group = join_as_started(trainings.device)
    if trainings.static:
        training.picked = as_on_gpus
    if trainings.fail and group.rank == 1:
        raise SAEError("the second process has failed")
    kinds = KINDS[:1] if trainings.first_only else ahead.KINDS if trainings.static else KINDS
    for kind in kinds:
        train(trainings, kind, SparseDirections(), group)
    if not trainings.first_only:
        train_others(trainings, group)
    group.leave()
    print("done")


def train_others(trainings: Trainings, group: ProcessGroup) -> None:
    broken = SparseDirections()
    broken.activations[:64:4, 3] *= 1000
    broken.activations[5, 7, 2] = torch.nan
    train(trainings, "not_finite", broken, group)
    transcoder = {"target": HOOK.target("hook_mlp_out")}
    train(trainings, "transcoder", SparseMap(), group, **transcoder)
    data = DataConfig(max_text_length=24, val_fraction=0.25, seed=5)
    loading = ModelConfig(model_name=str(trainings.model), model_dtype="float32")
    model = LanguageModel.load(loading, torch.device("cpu"))
    windows = read_windows(model.tokenizer, read_texts(trainings.texts)[:12], data)
    source = StreamingSource(
        model, windows, HOOK, batch_size=4, tokens_per_step=100, seed=5, group=group
    )
    for name in ("end_to_end", "end_to_end_sample"):
        train(trainings, name, source, group, d_in=WIDTH, model=model, windows=windows)


if __name__ == "__main__":
    cli.run(run, Trainings, "")
