"""Several SAEs of a tiny model from one stream: python several_saes.py FOLDER [OPTIONS]

FOLDER/<name> gets each SAE, FOLDER/points/<name> its checkpoints. The model and the tokens are
random. Chunks are small, so that an epoch has several.
"""

import itertools
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from synthetic import PROVENANCE
from tiny_model import VOCABULARY, WIDTH, configuration
from torch import Tensor
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from sae_core.activations import shared_stream, store
from sae_core.activations.shared_stream import SharedSource, SharedStream
from sae_core.activations.store import ActivationSource, StreamingSource
from sae_core.activations.token_windows import TokenWindows
from sae_core.lockstep import Training, train_together
from sae_core.models import language_model
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.sae.config import SAEConfig
from sae_core.sae_train import train_sae
from sae_core.train_config import EndToEndConfig, RuntimeConfig, TrainingConfig
from sae_core.trainer.events import Observer
from sae_core.trainer.origin import origin_of
from sae_core.trainer.resume import forget_states
from sae_core.trainer.training_inputs import Activations, Settings
from sae_core.utils import cli

LENGTH, TOKENS_PER_STEP, BATCH = 12, 26, 4
EPOCHS, STEPS = 2, 13
"""Epochs, and steps in each."""

HOOK_NAME = "hook_resid_post"


@dataclass(frozen=True)
class Wanted:
    """One of the SAEs."""

    layer: int
    sae: SAEConfig
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            num_epochs=EPOCHS, tokens_per_step=TOKENS_PER_STEP, early_stopping_patience=0
        )
    )
    end_to_end: EndToEndConfig = field(default_factory=lambda: EndToEndConfig(use_end_to_end=False))
    hook_name: str = HOOK_NAME
    target: str = ""

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.hook_name}.{self.sae.tag}"


def wanted(layer: int, kind: Any = "topk", k: int = 4, **others: Any) -> Wanted:
    sae = SAEConfig(sae_type=kind, topk=k, sae_expansion=2, n_batches_to_dead=3,
                    sparsity_penalty=0.0 if kind != "standard" else 0.01)  # fmt: skip
    return Wanted(layer, sae, **others)


THREE = (wanted(2), wanted(1, "batch_topk"), wanted(1, "standard"))


@cache
def model() -> LanguageModel:
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(configuration("qwen3"))
    with torch.no_grad():
        net.get_input_embeddings().weight.mul_(20)
    return LanguageModel(net, tokenizer=None)


@cache
def windows() -> TokenWindows:
    draw = torch.Generator().manual_seed(3)
    train, held_out = (torch.randint(VOCABULARY, (n,), generator=draw) for n in (400, 130))
    return TokenWindows(train, held_out, LENGTH, seed=5)


def small_chunks(patch: Callable[[Any, str, int], None] = setattr) -> None:
    """Several forward passes, chunks and validation blocks even for so few windows."""
    patch(language_model, "CPU_TOKENS", 100)
    patch(store, "SHUFFLE_TOKENS", 200)
    patch(store, "CALIBRATION_TOKENS", 40)
    patch(shared_stream, "VALIDATION_TOKENS", 60)


def activations(sae: Wanted, source: ActivationSource, hook: Hook) -> Activations:
    target = hook.target(sae.target)
    origin = origin_of(sae.sae, hook, target, WIDTH, PROVENANCE.model_name, Path(sae.name))
    return Activations(source, hook, WIDTH, PROVENANCE, target, model(), windows(), origin=origin)


def settings(sae: Wanted, resume_minutes: float) -> Settings:
    runtime = RuntimeConfig(
        device="cpu", log_freq=1, checkpoint_freq=0, resume_minutes=resume_minutes
    )
    return Settings(sae=sae.sae, training=sae.training, end_to_end=sae.end_to_end, runtime=runtime)


def train_alone(folder: Path, sae: Wanted) -> None:
    """One SAE from a stream of its own."""
    hook = Hook(sae.layer, sae.hook_name)
    source = StreamingSource(
        model(), windows(), hook, batch_size=BATCH, tokens_per_step=TOKENS_PER_STEP, seed=5,
        target=hook.target(sae.target),
    )  # fmt: skip
    points = folder / "points" / sae.name
    made = activations(sae, source, hook)
    train_sae(made, settings(sae, 60), folder / sae.name, points, Observer())
    forget_states(points)


def train_several(
    folder: Path,
    saes: tuple[Wanted, ...],
    observer: Observer | None = None,
    resume_minutes: float = 60.0,
) -> None:
    """All of them from one stream; `observer` is told of the last."""
    stream = SharedStream(model(), windows(), BATCH)

    def training(sae: Wanted) -> Training:
        hook = Hook(sae.layer, sae.hook_name)
        source = SharedSource(
            stream, hook, tokens_per_step=TOKENS_PER_STEP, seed=5, target=hook.target(sae.target)
        )
        told = observer if observer and sae is saes[-1] else Observer()
        return Training(
            sae.name,
            activations(sae, source, hook),
            settings(sae, resume_minutes),
            folder / sae.name,
            folder / "points" / sae.name,
            told,
        )

    train_together([training(sae) for sae in saes], stream)
    for sae in saes:
        forget_states(folder / "points" / sae.name)


@dataclass(frozen=True)
class Run:
    folder: Annotated[Path, tyro.conf.Positional]
    hit: str = ""
    """What is hit: a step of the last SAE, or the `rename` of a state or checkpoint."""
    at: int = 1
    """Which one of them."""
    by: str = "KILL"
    """The signal."""
    resume_minutes: float = 0.0


class Hit(Observer):
    """Calls `strike` at every step."""

    def __init__(self, strike: Callable[[], object]) -> None:
        self.strike = strike

    def on_step(self, epoch: int, step: int, loss: Tensor, l0: float) -> None:
        self.strike()


def main(run: Run) -> None:
    count = itertools.count(1)

    def strike() -> None:
        if next(count) == run.at:
            os.kill(os.getpid(), getattr(signal, f"SIG{run.by}"))

    if run.hit == "rename":
        rename = Path.rename

        def struck(path: Path, target: Path) -> Path:
            strike()
            return rename(path, target)

        Path.rename = struck  # type: ignore[method-assign]
    small_chunks()
    observer = Hit(strike) if run.hit == "step" else Observer()
    train_several(run.folder, THREE, observer, run.resume_minutes)


if __name__ == "__main__":
    cli.run(main, Run, "")
