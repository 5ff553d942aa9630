"""Features as a map: decoder directions in two dimensions, and who is active with whom.

Splitting and sharing show in two measures of a pair. Two directions with a high cosine that are
seldom active together are one meaning split up by context. Features that are active together, by
Jaccard's index, pointwise mutual information and correlation, share their texts.

The map is a t-SNE (van der Maaten and Hinton, 2008) of the unit decoder rows by their cosine,
after a PCA that also places the start, so that the same SAE gives the same map. Near features on
it have similar directions; long distances mean little.
"""

import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import sparse
from scipy.cluster.hierarchy import fcluster, leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import squareform
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor

from sae_core.evaluation.features import FeatureTable
from sae_core.evaluation.tally import Together

COMPONENTS = 50
"""Of the PCA that t-SNE reads: the usual number, which takes out noise and saves time."""

PERPLEXITY = 30.0
"""Neighbours that a feature is placed by, about: the usual number."""

FEWEST = 5
"""Features that make a map."""

STEPS = 500

CLUSTERED = 200
"""Features of the table of co-occurrence."""

CLOSE = 0.2
"""Mean Jaccard index from which on two groups of features are one cluster."""

N_NEAR = 100
"""Pairs of features with the nearest directions that are listed."""


def feature_map(W_dec: Tensor, table: FeatureTable, n: int, seed: int) -> dict[str, Any]:
    """The map of the `n` active features with the most activation in total, as JSON values.

    Returns:
        `points`: [feature, x, y]; `together`: see `clustered`; `near`: see `nearest_pairs`.
    """
    strongest = table.tally.total.argsort(descending=True, stable=True).tolist()
    chosen = [feature for feature in strongest if table.active[feature]][:n]
    places = place(W_dec, chosen, seed)
    points = [[feature, *at] for feature, at in zip(chosen, places, strict=True)]
    return {
        "points": points,
        "together": clustered(table.together, chosen),
        "near": nearest_pairs(table, chosen),
    }


def place(W_dec: Tensor, features: list[int], seed: int) -> list[tuple[float, float]]:
    """Where each of `features` lies on the map, between -1 and 1 on both axes.

    Args:
        W_dec: (F, D)
        seed: of the solvers.
    """
    if len(features) < FEWEST:
        return [(0.0, 0.0)] * len(features)
    rows = F.normalize(W_dec[features].float().cpu(), dim=1).numpy()
    n_components = min(COMPONENTS, *rows.shape)
    reduced = PCA(n_components, random_state=seed).fit_transform(rows)
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of defaults that will change
        tsne = TSNE(
            perplexity=perplexity, init="pca", metric="cosine", max_iter=STEPS, random_state=seed
        )
        points = tsne.fit_transform(reduced)
    points = points / np.abs(points).max()
    return [(round(float(x), 4), round(float(y), 4)) for x, y in points]


def clustered(together: Together, features: list[int]) -> dict[str, Any]:
    """How often at most `CLUSTERED` features are active together, in the order of an
    average-linkage clustering by Jaccard's index: groups that are active together stand together.

    Returns:
        `features` in that order; `pairs`: [i, j, Jaccard, PMI in bits, correlation] for each pair
        that is ever active together, where i < j count in that order; `clusters`: [first, end]
        counted likewise, for each group of at least two whose mean index is `close` or more.
    """
    chosen = features[:CLUSTERED]
    jaccard, pmi, correlation = _among(together, chosen)
    order, clusters = _arranged(jaccard)
    jaccard, pmi, correlation = (of[np.ix_(order, order)] for of in (jaccard, pmi, correlation))
    pairs = [
        [int(i), int(j), *(round(float(of[i, j]), 3) for of in (jaccard, pmi, correlation))]
        for i, j in zip(*np.nonzero(np.triu(jaccard, 1)), strict=True)
    ]
    return {
        "features": [chosen[i] for i in order],
        "pairs": pairs,
        "clusters": clusters,
        "close": CLOSE,
    }


def nearest_pairs(table: FeatureTable, features: list[int]) -> list[list[Any]]:
    """[feature, feature, cosine of their decoder rows, Jaccard] of the `N_NEAR` pairs with the
    largest cosine; a feature is in as many of them as it has neighbours in the table."""
    wanted = torch.zeros(len(table.density), dtype=torch.bool)
    wanted[features] = True
    one = torch.arange(len(wanted))[:, None].expand_as(table.neighbours).flatten()
    other, cosines = table.neighbours.flatten(), table.cosines.flatten()
    kept = wanted[one] & wanted[other]
    pairs = torch.stack([torch.minimum(one, other), torch.maximum(one, other)], 1)[kept]
    pairs, inverse = pairs.unique(dim=0, return_inverse=True)
    cosine = cosines.new_full((len(pairs),), -1.0)
    cosine.scatter_reduce_(0, inverse, cosines[kept], "amax")  # a pair may come from both sides
    best = cosine.argsort(descending=True, stable=True)[:N_NEAR]
    jaccard = _jaccard(table.together, pairs[best])
    return [
        [*pair, round(near, 3), round(index, 3)]
        for pair, near, index in zip(
            pairs[best].tolist(), cosine[best].tolist(), jaccard, strict=True
        )
    ]


def _jaccard(together: Together, pairs: Tensor) -> list[float]:
    """The indices of (n, 2) pairs of features, the lower-numbered one first; 0 for those that are
    never active together."""
    at = together.first.numpy(), together.second.numpy()
    n = len(together.active)
    found = sparse.csr_array((together.jaccard.numpy(), at), (n, n))
    return [float(found[a, b]) for a, b in pairs.tolist()]


def _among(together: Together, features: list[int]) -> list[NDArray[Any]]:
    """(n, n) the Jaccard indices, PMI and correlations of n features; 0 for those that are never
    active together."""
    at = torch.full((len(together.active),), -1)
    at[features] = torch.arange(len(features))
    i, j = at[together.first], at[together.second]
    kept = (i >= 0) & (j >= 0)
    found = []
    for measure in (together.jaccard, together.pmi, together.correlation):
        of = torch.zeros(len(features), len(features), dtype=torch.float64)
        of[i[kept], j[kept]] = of[j[kept], i[kept]] = measure[kept].double()
        found.append(of.numpy())
    return found


def _arranged(near: NDArray[Any]) -> tuple[list[int], list[list[int]]]:
    """The order of the rows of a similarity matrix that puts similar ones side by side, and the
    first and the end of each cluster in it."""
    if len(near) < 3:
        return list(range(len(near))), []
    distance = 1 - near
    np.fill_diagonal(distance, 0)
    condensed = squareform(distance, checks=False)
    tree = optimal_leaf_ordering(linkage(condensed, "average"), condensed)
    order = [int(i) for i in leaves_list(tree)]
    cluster = fcluster(tree, 1 - CLOSE, "distance")[order]
    edges = [0, *(np.flatnonzero(np.diff(cluster)) + 1).tolist(), len(order)]
    return order, [[a, b] for a, b in zip(edges, edges[1:], strict=False) if b - a > 1]
