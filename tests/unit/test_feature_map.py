"""The map and the clusters, on directions and pairs that are planted."""

import pytest
import torch

from sae_core.evaluation.feature_map import clustered, place
from sae_core.evaluation.tally import Together

GROUPS, SIZE, D = 4, 30, 32


@pytest.fixture(scope="module")
def W_dec() -> torch.Tensor:
    """Groups of nearly equal directions."""
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(GROUPS, D, generator=draw)
    return centres.repeat_interleave(SIZE, 0) + 0.1 * torch.randn(GROUPS * SIZE, D, generator=draw)


def test_similar_directions_lie_together(W_dec: torch.Tensor) -> None:
    points = torch.tensor(place(W_dec, list(range(len(W_dec))), seed=0))
    assert points.abs().max() == 1
    distances = torch.cdist(points, points).fill_diagonal_(torch.inf)
    nearest = distances.argmin(1) // SIZE
    assert torch.equal(nearest, torch.arange(len(W_dec)) // SIZE)


def test_the_same_seed_gives_the_same_map(W_dec: torch.Tensor) -> None:
    chosen = list(range(0, len(W_dec), 3))
    assert place(W_dec, chosen, seed=1) == place(W_dec, chosen, seed=1)


@pytest.mark.parametrize("n", [0, 1, 4, 5, 7])
def test_a_few_features_have_a_map_too(W_dec: torch.Tensor, n: int) -> None:
    assert len(place(W_dec, list(range(n)), seed=0)) == n


def test_features_that_are_active_together_stand_together() -> None:
    """Features of one parity go together; 9 is not among those asked for."""
    pairs = [(a, b) for a in range(8) for b in range(a + 1, 8) if (a + b) % 2 == 0] + [(0, 9)]
    first, second = torch.tensor(pairs).T
    tokens = torch.full((len(pairs),), 5)
    together = Together(first, second, tokens, torch.full((10,), 8), 80)
    found = clustered(together, list(range(8)))
    parities = [feature % 2 for feature in found["features"]]
    assert parities in ([0] * 4 + [1] * 4, [1] * 4 + [0] * 4)
    named = {(found["features"][i], found["features"][j]) for i, j, _ in found["pairs"]}
    assert {frozenset(pair) for pair in named} == {frozenset(pair) for pair in pairs[:-1]}
