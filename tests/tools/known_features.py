"""Activations whose features are known, and how many of them an SAE recovers.

A token is a sum of unit directions, more of them than dimensions. Feature i is present with a
probability that falls as a power law, as words and concepts do, independently of the others; its
magnitude varies from token to token, and features differ in their mean magnitude.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_core.activations.store import ActivationSource
from sae_core.models.language_model import Hook
from sae_core.sae.config import SAEConfig
from sae_core.sae.kinds import build
from sae_core.sae_base import SparseAutoencoder
from sae_core.train_config import TrainingConfig
from sae_core.trainer.training_inputs import sae_spec
from sae_core.training import Observer, Trainer
from sae_core.utils.devices import pick_device
from sae_core.utils.seeding import generator

RANK_SHIFT = 10
"""Frequencies fall as 1 / (rank + this), so that the most frequent features are not constant."""

SPREAD = 0.25
"""Standard deviation of the logarithm of the magnitudes, over features and over tokens each."""

NOISE = 0.02
"""Standard deviation of the noise in every dimension."""

POSITIONS = 64
"""Tokens in a window, which means nothing here."""

HELD_OUT = 2**13
"""Tokens that validate."""

ROWS = 2**14
"""Tokens that are drawn at once."""

RECOVERED = 0.9
"""A feature counts as recovered when a decoder row's cosine with it exceeds this."""


class KnownFeatures(ActivationSource):
    """Fresh tokens in every epoch.

    Args:
        n_active: mean number of features in a token.
    """

    def __init__(
        self,
        *,
        d_in: int,
        n_features: int,
        n_active: float,
        n_tokens: int,
        tokens_per_step: int,
        seed: int = 0,
    ) -> None:
        positions = 64
        super().__init__(
            n_tokens // positions, 2**13 // positions, positions, tokens_per_step, seed
        )
        draw = generator(seed, "features")
        self.directions = F.normalize(torch.randn(n_features, d_in, generator=draw), dim=1)
        rates = 1 / (torch.arange(n_features) + 1 + RANK_SHIFT)
        self.frequencies = rates * (n_active / rates.sum())
        self.magnitudes = torch.exp(SPREAD * torch.randn(n_features, generator=draw))

    def read(self, part: str, epoch: int, indices: Tensor) -> Tensor:
        draw = generator(self.seed, part, epoch, int(indices[0]))
        blocks = torch.arange(len(indices) * self.positions).split(ROWS)
        rows = torch.cat([self._tokens(len(block), draw) for block in blocks])
        return rows.view(len(indices), self.positions, -1)

    def _tokens(self, n: int, draw: torch.Generator) -> Tensor:
        """(n, D)"""
        shape = (n, len(self.frequencies))
        present = torch.rand(shape, generator=draw) < self.frequencies
        strength = self.magnitudes * torch.exp(SPREAD * torch.randn(shape, generator=draw))
        noise = NOISE * torch.randn(n, self.directions.shape[1], generator=draw)
        return (present * strength) @ self.directions + noise


class Recovery(NamedTuple):
    """How well decoder rows match the true features."""

    share: float
    """Of the true features, those with a decoder row at a cosine above `RECOVERED`."""
    mean_cosine: float
    """Mean over the true features of the largest cosine with a decoder row."""


def recovery(decoder: Tensor, directions: Tensor) -> Recovery:
    """Of (F, D) decoder rows and (G, D) unit directions."""
    best = (directions @ F.normalize(decoder.cpu(), dim=1).T).max(dim=1).values
    return Recovery(float((best > RECOVERED).float().mean()), float(best.mean()))


def learn(
    config: SAEConfig,
    source: KnownFeatures,
    training: TrainingConfig,
    cls: type[SparseAutoencoder] | None = None,
) -> Trainer:
    """A whole training on known features of an SAE of the configured kind, or of class `cls`."""
    hook, device = Hook(0, "hook_resid_post"), pick_device("auto")
    spec = sae_spec(config, hook, source.directions.shape[1], device, metadata={})
    sae = cls(spec) if cls else build(spec)
    sae.initialise(generator(source.seed, "weights"))
    sae.to(device)
    trainer = Trainer(sae, source, training, Observer())
    for _ in trainer.train():
        pass
    return trainer
