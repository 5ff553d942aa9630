"""Every kind finds features that are known to be there; a broken one does not."""

import pytest
import torch
from known_features import KnownFeatures, learn, recovery
from synthetic import DENSE_KINDS, KINDS
from torch import Tensor

from sae_core.sae.config import SAEConfig
from sae_core.sae.kinds.topk import TopKSAE
from sae_core.sae.reconstruction import PLAIN, Compute, Reconstruction
from sae_core.train_config import TrainingConfig

N_ACTIVE = 2
SHARE, COSINE = 0.6, 0.85
"""What every kind reaches. By chance the share is 0 and the cosine 0.45."""


def source() -> KnownFeatures:
    """48 features in 32 dimensions, which an SAE of 96 features is to find."""
    return KnownFeatures(
        d_in=32, n_features=48, n_active=N_ACTIVE, n_tokens=2**16, tokens_per_step=256
    )


def settings(kind: str) -> SAEConfig:
    penalty = 0.4 if kind in DENSE_KINDS else 0.0
    return SAEConfig(sae_type=kind, sae_expansion=3, topk=N_ACTIVE, sparsity_penalty=penalty)


TRAINING = TrainingConfig(num_epochs=1, lr=1e-2)


def test_activations_are_what_they_are_said_to_be() -> None:
    known = source()
    assert float(known.frequencies.sum()) == pytest.approx(N_ACTIVE)
    assert known.frequencies[0] / known.frequencies[-1] == pytest.approx(58 / 11)
    torch.testing.assert_close(known.directions.norm(dim=1), torch.ones(48))
    first, again, later = (
        known.read("train", epoch, torch.arange(64)).flatten(0, 1) for epoch in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, later)
    # E x = sum of frequency * mean magnitude * direction, a lognormal's mean being exp(s^2 / 2)
    strength = known.frequencies * known.magnitudes * torch.exp(torch.tensor(0.25**2 / 2))
    mean = torch.stack([known.read("train", e, torch.arange(256)) for e in range(4)]).mean(
        (0, 1, 2)
    )
    torch.testing.assert_close(mean, strength @ known.directions, rtol=0, atol=0.02)


def test_recovery_in_closed_form() -> None:
    true = torch.eye(4)
    decoder = torch.tensor([[5.0, 0, 0, 0], [0, 1, 0.5, 0], [0, 0, 1, 0.1]])
    found = recovery(decoder, true)
    assert found.share == 0.5  # the first and the third; the second at 2 / sqrt(5)
    assert found.mean_cosine == pytest.approx((1 + 0.8944 + 0.995 + 0.0995) / 4, abs=1e-3)


def test_chance() -> None:
    decoder = torch.randn(96, 32, generator=torch.Generator().manual_seed(0))
    found = recovery(decoder, source().directions)
    assert found.share == 0 and found.mean_cosine < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_recovers_the_features(kind: str) -> None:
    known = source()
    trainer = learn(settings(kind), known, TRAINING)
    found = recovery(trainer.sae.W_dec.detach(), known.directions)
    assert found.share > SHARE and found.mean_cosine > COSINE
    l0 = trainer.history["val_sparsity"][-1]
    assert l0 < 2 * N_ACTIVE if kind in DENSE_KINDS else l0 == pytest.approx(N_ACTIVE, rel=0.05)


class WrongTokens(TopKSAE):
    """Reconstructs every token from its neighbour's code."""

    def reconstruct(
        self, x: Tensor, target: Tensor | None = None, compute: Compute = PLAIN
    ) -> Reconstruction:
        made = super().reconstruct(x, target, compute)
        return made._replace(x_hat=made.x_hat.roll(1, 0))


class SmallestKept(TopKSAE):
    """Keeps the smallest pre-activations in place of the largest."""

    def _largest(self, pre: Tensor) -> Tensor:
        return super()._largest(torch.where(pre > 0, -pre, -torch.inf))


@pytest.mark.parametrize("broken", [WrongTokens, SmallestKept])
def test_a_broken_kind_does_not(broken: type[TopKSAE]) -> None:
    known = source()
    trainer = learn(settings("topk"), known, TRAINING, broken)
    found = recovery(trainer.sae.W_dec.detach(), known.directions)
    assert found.share < SHARE / 2 and found.mean_cosine < COSINE
