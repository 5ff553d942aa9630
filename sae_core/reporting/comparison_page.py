"""A page about two SAEs: the features that each has a twin for in the other, and the orphans."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sae_core.reporting.html import render
from sae_core.reporting.known_features import KnownFeatures

SHOWN = 500
"""Pairs and orphans listed at most, of each SAE."""


@dataclass(frozen=True)
class Side:
    """One of the two SAEs."""

    name: str
    matches: Sequence[tuple[int, float]]
    """For each feature, the nearest one of the other SAE and how near it is; NaN if the feature is
    active on too few tokens."""
    known: KnownFeatures


def comparison_page(sides: Sequence[Side], by: str, twin: Sequence[float]) -> str:
    """The page, self-contained. Pairs are listed from the nearest, orphans from the most alone.

    Args:
        sides: the two SAEs.
        by: what nearness is, `decoder` or `activation`.
        twin: how near a twin is; an orphan is farther than the first of these.
    """
    measure = {"decoder": "cosine", "activation": "correlation"}[by]
    both = [_shown(side, other, twin) for side, other in zip(sides, reversed(sides), strict=True)]
    return render("comparison.html.j2", "text.css.j2", sides=both, measure=measure, most=SHOWN)


def _shown(side: Side, other: Side, twin: Sequence[float]) -> dict[str, Any]:
    """What the page says of one of the two."""
    compared = [
        (feature, nearest, near)
        for feature, (nearest, near) in enumerate(side.matches)
        if not math.isnan(near)
    ]
    compared.sort(key=lambda pair: -pair[2])
    pairs = [pair for pair in compared if pair[2] > twin[0]]
    orphans = compared[len(pairs) :][::-1]
    n_above = [(least, sum(near > least for _, _, near in compared)) for least in twin]
    return {
        "name": side.name,
        "other": other.name,
        "n": len(compared),
        "n_rare": len(side.matches) - len(compared),
        "shares": [(least, n / max(len(compared), 1)) for least, n in n_above],
        "known": side.known,
        "others": other.known,
        "lists": [("Pairs", len(pairs), pairs[:SHOWN]), ("Orphans", len(orphans), orphans[:SHOWN])],
    }
