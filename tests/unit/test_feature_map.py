"""The map and the clusters, on directions and pairs that are planted."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sae_core.evaluation.feature_map import clustered, nearest_pairs, place
from sae_core.evaluation.features import nearest
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
    named = {(found["features"][i], found["features"][j]) for i, j, *_ in found["pairs"]}
    assert {frozenset(pair) for pair in named} == {frozenset(pair) for pair in pairs[:-1]}
    assert found["clusters"] == [[0, 4], [4, 8]]
    jaccard, bits, phi = 5 / 11, math.log2(5 * 80 / 64), (5 / 80 - 0.01) / 0.09
    for _, _, *measures in found["pairs"]:
        assert measures == pytest.approx([jaccard, bits, phi], abs=1e-3)


def test_features_that_are_seldom_together_are_no_cluster() -> None:
    tokens = torch.tensor([1])
    pair = torch.tensor([0]), torch.tensor([1])
    found = clustered(Together(*pair, tokens, torch.full((3,), 8), 80), [0, 1, 2])
    assert found["clusters"] == [] and len(found["pairs"]) == 1


class Near(NamedTuple):
    """What of a table the nearest pairs are read from."""

    neighbours: Tensor
    cosines: Tensor
    density: Tensor
    together: Together


def test_the_nearest_directions_come_first_and_once() -> None:
    """0 and 2 have nearly one direction and are never active together: one meaning split up."""
    W_dec = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0.1, 0], [0, 1, 0.5], [0, 0, 1]])
    pair = torch.tensor([1]), torch.tensor([3])
    together = Together(*pair, torch.tensor([4]), torch.full((5,), 8), 80)
    table = Near(*nearest(W_dec, 3), torch.ones(5), together)
    found = nearest_pairs(table, [0, 1, 2, 3])  # type: ignore[arg-type]
    unit = torch.nn.functional.normalize(W_dec, dim=1)
    assert [pair[:2] for pair in found[:2]] == [[0, 2], [1, 3]]
    assert [jaccard for *_, jaccard in found[:2]] == [0, pytest.approx(1 / 3, abs=1e-3)]
    for a, b, cosine, _ in found:
        assert cosine == pytest.approx(float(unit[a] @ unit[b]), abs=1e-3)
    pairs = [(a, b) for a, b, *_ in found]
    assert len(set(pairs)) == len(pairs) and all(a < b < 4 for a, b in pairs)
