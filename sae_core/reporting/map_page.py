"""The page with the map of an SAE's features: which are active together, and which are alike."""

from collections.abc import Iterable, Mapping
from typing import Any

from sae_core.reporting.html import embedded, render

HALF = 0.5
"""Share of a feature's activation from which on it has the colour of a subject."""

SHOWN_NEAR = 30
"""Pairs of features with the nearest directions that the page shows."""


def map_page(corpus: Mapping[str, Any], entries: Iterable[Mapping[str, Any]], browser: str) -> str:
    """The page as HTML.

    Args:
        corpus: figures of all features together, whose `map` has the places.
        entries: figures of single features, at least of the features on the map.
        browser: where the page of single features is, relative to this one.
    """
    places = {feature: (x, y) for feature, x, y in corpus["map"]["points"]}
    subjects = list(corpus["subjects"])
    points = [
        {
            "feature": entry["feature"],
            "x": places[entry["feature"]][0],
            "y": places[entry["feature"]][1],
            "subject": _subject(entry["subjects"], subjects),
            "density": entry["density"],
            "label": entry["label"],
        }
        for entry in entries
        if entry["feature"] in places
    ]
    labels = {point["feature"]: point["label"] for point in points}
    together = corpus["map"]["together"]
    clusters = [together["features"][first:end] for first, end in together["clusters"]]
    data = {"points": points, "subjects": subjects, "together": together, "browser": browser}
    return render(
        "map.html.j2",
        "map.css.j2",
        "map.js.j2",
        run_name=corpus["run_name"],
        browser=browser,
        subjects=subjects,
        n_points=len(points),
        n_clustered=len(together["features"]) if together["pairs"] else 0,
        labels=labels,
        clusters=sorted(clusters, key=len, reverse=True),
        close=together["close"],
        near=corpus["map"]["near"][:SHOWN_NEAR],
        data=embedded(data),
    )


def _subject(shares: Mapping[str, float], subjects: list[str]) -> int:
    """The index of the subject with at least half of the activation, -1 if none has."""
    best = max(shares, key=lambda subject: shares[subject], default=None)
    return subjects.index(best) if best in subjects and shares[best] >= HALF else -1
