"""The benchmark of quality's data, and our contenders."""

from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import torch
from machine import DEVICE
from sae_figures import Data, Trained
from step import NoSource

from sae_core.activations.shards import Manifest
from sae_core.activations.store import CachedSource
from sae_core.models.language_model import Hook
from sae_core.sae.config import SAEConfig, SAEType
from sae_core.sae.kinds import build
from sae_core.sae.precision import pick_precision
from sae_core.sae.reconstruction import Compute
from sae_core.train_config import TrainingConfig
from sae_core.trainer.schedule import SAESize, resolved, step_size
from sae_core.trainer.training_inputs import sae_spec
from sae_core.training import Batch, Normalisation, Observer, Trainer, learning_rate
from sae_core.utils.seeding import generator

DRAWN = 4096
"""Tokens of a batch as it is read; each contender cuts it into its own steps."""

TOKENS_TO_DEAD = 3 * DRAWN
"""Trainings are as short as 200 steps."""

RECIPE = TrainingConfig()
ACTIVE_ADAM = TrainingConfig(optimizer="active_adam", lr_decay=0.9)


@dataclass(frozen=True)
class Own:
    """One of our contenders."""

    sae_type: SAEType = "batch_topk"
    settings: TrainingConfig = RECIPE
    """Their learning rate does not count."""
    compute_dtype: str = "auto"


OURS = {
    "ours": Own(),
    "ours, float32": Own(compute_dtype="float32"),
    "ours, active_adam": Own(settings=ACTIVE_ADAM),
    "ours, matryoshka_batch_topk": Own("matryoshka_batch_topk"),
    "ours, matryoshka_batch_topk, active_adam": Own("matryoshka_batch_topk", ACTIVE_ADAM),
    "ours, multi_batch_topk, active_adam": Own("multi_batch_topk", ACTIVE_ADAM),
    "ours, jumprelu": Own("jumprelu"),
    "ours, jumprelu, active_adam": Own("jumprelu", ACTIVE_ADAM),
}
"""By their names in the records."""


@dataclass(frozen=True)
class Harvest:
    """Stored activations at one hook."""

    shards: tuple[Path, ...]
    hook: str

    @property
    def d_in(self) -> int:
        """The width of the activations."""
        return Manifest.load(self.shards[0]).d_in

    @property
    def identity(self) -> str:
        """Which windows they are of, and their number format."""
        manifest = Manifest.load(self.shards[0])
        return f"{manifest.windows_sha256[:16]} {manifest.dtype} x{manifest.passes}"

    def load(self, tokens: int, seed: int) -> Data:
        """About `tokens` activations to train on, over as many epochs as that takes, and the
        held-out ones."""
        hook = Hook.parse(self.hook)
        source = CachedSource(self.shards, hook, tokens_per_step=DRAWN, seed=seed)
        n_batches = max(1, round(tokens / source.tokens_per_step))
        epochs = range(-(-n_batches // source.steps_per_epoch))
        drawn = chain.from_iterable(source.train_batches(epoch) for epoch in epochs)
        raw = [batch.to(DEVICE) for batch in islice(drawn, n_batches)]
        normalise = Normalisation.measure(torch.cat(raw[:8]).float())
        held_out = [
            normalise(source.read("validation", 0, indices).flatten(0, 1))
            for indices in (torch.arange(first, source.n_validation, 2) for first in (0, 1))
        ]
        return Data([normalise(batch) for batch in raw], *held_out)


def two_digits(number: float) -> float:
    """Rounded to these."""
    return float(f"{number:.2g}")


def automatic(own: Own, d_in: int, features: int, k: int, tokens: int) -> tuple[int, float]:
    """Tokens per step and learning rate of a training on about `tokens`, as `auto` has them; the
    rate with two digits, as grids have it."""
    n_tokens = DRAWN * max(1, round(tokens / DRAWN))
    auto = replace(own.settings, num_epochs=1, tokens_per_step="auto", lr="auto")
    size = step_size(auto, n_tokens)
    found = resolved(auto, SAESize(own.sae_type, d_in, features, k), size, n_tokens // size)
    return size, two_digits(float(found.lr))


def in_steps(data: Data, tokens_per_step: int) -> Data:
    """The same tokens in smaller steps."""
    parts = max(1, DRAWN // tokens_per_step)
    return data._replace(batches=[part for batch in data.batches for part in batch.chunk(parts)])


def train(data: Data, features: int, k: int, lr: float, seed: int, own: Own) -> Trained:
    """One of our SAEs, calibrated."""
    d_in = data.held_out.shape[1]
    config = SAEConfig(
        sae_type=own.sae_type,
        topk=k,
        sae_expansion=features // d_in,
        n_batches_to_dead=max(1, TOKENS_TO_DEAD // len(data.batches[0])),
    )
    sae = build(sae_spec(config, Hook(0, "hook_resid_post"), d_in, DEVICE, {}))
    sae.initialise(generator(seed, "weights"))
    sae.to(DEVICE)
    compute = Compute(precision=pick_precision(own.compute_dtype, DEVICE))
    n_steps, size = len(data.batches), len(data.batches[0])
    settings = replace(own.settings, num_epochs=1, lr=lr)
    trainer = Trainer(sae, NoSource(n_steps, 0, size, size, 0), settings, Observer(), compute)
    for step, x in enumerate(data.batches):
        trainer.step(Batch(x), learning_rate(step, n_steps, lr, settings.lr_decay))
    sae.calibrate(iter([data.calibration]))
    if own.sae_type == "jumprelu":  # what its thresholds leave: it has one for each feature
        return Trained(sae.encode, sae.decode, 0.0)
    return Trained(sae.pre_activations, sae.decode, float(sae.known_threshold))
