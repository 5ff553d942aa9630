"""The planner's operations and memory of steps without fixed sizes, against what steps do."""

from typing import Any

import pytest
import torch
from held_memory import HeldMemory
from short_training import train
from synthetic import DENSE_KINDS, SparseDirections, spec
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sae_core.sae import largest_entries, sparse_ops
from sae_core.sae.config import SAEConfig
from sae_core.sae.dense_start import active_at_start, near_at_start
from sae_core.sae.kinds import build
from sae_core.sae_base import SparseAutoencoder
from sae_core.training import Observer
from sae_core.utils.seeding import generator
from sae_core.workflow import plain_step

SHAPES = [(64, 512, 4), (64, 512, 100), (256, 4096, 16), (512, 2048, 64)]
"""d, F and k."""


def initialised(kind: str, d: int, width: int, k: int) -> SparseAutoencoder:
    sae = build(spec(kind, d_in=d, d_sae=width, top_k=k if kind not in DENSE_KINDS else 0))
    sae.initialise(generator(0, "weights"))
    return sae


def rows(n: int, d: int) -> Tensor:
    """(n, d) with E||x||^2 = 1."""
    return torch.randn(n, d, generator=generator(1)) / d**0.5


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pairs per token of each batch that a JumpReLU SAE encodes."""
    found, encode = [], sparse_ops.encode_above

    def counted(*args: Any, **options: Any) -> sparse_ops.SparseCode:
        code = encode(*args, **options)
        found.append(len(code.value) / code.pairs.n_rows)
        return code

    monkeypatch.setattr(sparse_ops, "encode_above", counted)
    return found


@pytest.mark.parametrize(("d", "width", "k"), SHAPES)
def test_the_pairs_of_jumprelus_first_step(d: int, width: int, k: int, near: list[float]) -> None:
    """Up to half of all features are near their threshold in the first step."""
    made = initialised("jumprelu", d, width, k).reconstruct(rows(512, d))
    assert near[0] == pytest.approx(near_at_start(d, width, k), rel=0.03)
    assert made.l0 == pytest.approx(active_at_start(width, k), rel=0.05)


def test_the_pairs_of_a_jumprelu_training(near: list[float]) -> None:
    """Trainings differ: `THINNING` is from some on a language model."""
    d, width, k, active = 32, 256, 4, []
    shape = {"n_train": 64, "d_in": d, "n_features": 128, "n_active": 4}

    class Watching(Observer):
        def on_step(self, epoch: int, step: int, loss: Tensor, l0: float) -> None:
            active.append(l0)

    source = SparseDirections(**shape, tokens_per_step=32)
    train(initialised("jumprelu", d, width, k), source, Watching(), num_epochs=3, lr=2e-3)
    sae = SAEConfig("jumprelu", width // d, topk=k)
    planned = plain_step.pair_flops(sae, d, as_matrix=False) / d
    n_steps = len(active)  # validations encode, too
    done = (2 * sum(near[:n_steps]) + 6 * sum(active)) / n_steps
    assert 8 * k < done / 2 < planned < 2 * done


def counted_flops(sae: SparseAutoencoder, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        made = sae.reconstruct(x)
        ((x - made.x_hat).pow(2).sum() + made.kind_loss).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", DENSE_KINDS)
def test_the_products_of_dense_codes(kind: str) -> None:
    planned = plain_step.dense_flops(SAEConfig(kind, 8), 64, as_matrix=False)
    assert counted_flops(initialised(kind, 64, 512, 4), rows(100, 64)) == 100 * planned


def step(sae: SparseAutoencoder, x: Tensor) -> None:
    made = sae.reconstruct(x)
    loss = (x - made.x_hat).pow(2).sum() + 0.1 * made.l1 + made.kind_loss
    del made
    loss.backward()


@pytest.mark.parametrize("kind", [*DENSE_KINDS, "jumprelu"])
@pytest.mark.parametrize(
    ("d", "width", "k", "n"),
    [(64, 4096, 16, 512), (256, 4096, 16, 1024), (256, 8192, 64, 512), (128, 2048, 64, 512)],
)
def test_the_memory_of_a_step(kind: str, d: int, width: int, k: int, n: int) -> None:
    """Against what its tensors hold at once, to which a process adds up to a third."""
    sae, x = initialised(kind, d, width, k), rows(n, d)
    with HeldMemory() as memory:
        step(sae, x)
    gradients = 4 * sum(parameter.numel() for parameter in sae.parameters())
    planned = plain_step.step_bytes(SAEConfig(kind, width // d, topk=k), d, n, True, True)
    assert 0.95 < (planned + gradients) / memory.most < 1.45


def test_its_formula_has_the_numbers_of_the_code() -> None:
    assert plain_step.GPU_BLOCK == largest_entries.GPU_FACTOR * largest_entries.BLOCK_BYTES
