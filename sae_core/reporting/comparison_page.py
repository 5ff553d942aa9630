"""A page about two SAEs: the features that each has a twin for in the other, and the orphans."""

import math
from collections.abc import Sequence

from sae_core.reporting.html import render

SHOWN = 500
"""Pairs and orphans listed at most, of each SAE."""

Matches = Sequence[tuple[int, float]]
"""For each feature, the nearest one of the other SAE and how near it is; NaN if never active."""


def comparison_page(
    names: Sequence[str], by: str, matches: Sequence[Matches], twin: Sequence[float]
) -> str:
    """The page, self-contained. Pairs are listed from the nearest, orphans from the most alone.

    Args:
        names: of the two SAEs.
        by: what nearness is, `decoder` or `activation`.
        matches: of each SAE's features in the other.
        twin: how near a twin is; an orphan is farther than the first of these.
    """
    sides = []
    for name, other, found in zip(names, reversed(names), matches, strict=True):
        active = [(n, m, near) for n, (m, near) in enumerate(found) if not math.isnan(near)]
        active.sort(key=lambda pair: -pair[2])
        sides.append(
            {
                "name": name,
                "other": other,
                "n": len(found),
                "silent": len(found) - len(active),
                "shares": [(least, _above(active, least) / len(found)) for least in twin],
                "pairs": [pair for pair in active if pair[2] > twin[0]][:SHOWN],
                "orphans": [pair for pair in reversed(active) if pair[2] <= twin[0]][:SHOWN],
            }
        )
    measure = {"decoder": "cosine", "activation": "correlation"}[by]
    return render(
        "comparison.html.j2", "text.css.j2", "text.js.j2", sides=sides, measure=measure, most=SHOWN
    )


def _above(active: Sequence[tuple[int, int, float]], least: float) -> int:
    return sum(near > least for _, _, near in active)
