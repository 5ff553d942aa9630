"""Features as a map: decoder directions in two dimensions, and who is active with whom.

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
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
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


def feature_map(W_dec: Tensor, table: FeatureTable, n: int, seed: int) -> dict[str, Any]:
    """The map of the `n` active features with the most activation in total, as JSON values.

    Returns:
        `points`: [feature, x, y]; `together`: see `clustered`.
    """
    strongest = table.tally.total.argsort(descending=True, stable=True).tolist()
    chosen = [feature for feature in strongest if table.active[feature]][:n]
    places = place(W_dec, chosen, seed)
    points = [[feature, *at] for feature, at in zip(chosen, places, strict=True)]
    return {"points": points, "together": clustered(table.together, chosen)}


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
    """The Jaccard indices among at most `CLUSTERED` features, in the order of an average-linkage
    clustering, so that groups that are active together stand together.

    Returns:
        `features` in that order, and `pairs`: [i, j, index] for each pair above 0, where i < j
        count in it.
    """
    chosen = features[:CLUSTERED]
    at = {feature: number for number, feature in enumerate(chosen)}
    near = np.zeros((len(chosen), len(chosen)))
    listed = torch.stack([together.first, together.second], 1).tolist()
    for (a, b), jaccard in zip(listed, together.jaccard.tolist(), strict=True):
        if a in at and b in at:
            near[at[a], at[b]] = near[at[b], at[a]] = jaccard
    order = _leaves(near)
    ordered = near[np.ix_(order, order)]
    pairs = [
        [int(i), int(j), round(float(ordered[i, j]), 3)]
        for i, j in zip(*np.nonzero(np.triu(ordered, 1)), strict=True)
    ]
    return {"features": [chosen[i] for i in order], "pairs": pairs}


def _leaves(near: NDArray[Any]) -> list[int]:
    """The order of the rows of a similarity matrix that puts similar ones side by side."""
    if len(near) < 3:
        return list(range(len(near)))
    distance = 1 - near
    np.fill_diagonal(distance, 0)
    condensed = squareform(distance, checks=False)
    tree = optimal_leaf_ordering(linkage(condensed, "average"), condensed)
    return [int(i) for i in leaves_list(tree)]
