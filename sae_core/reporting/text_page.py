"""A small page about one text: each token shaded by its strongest feature, with its features."""

from collections.abc import Sequence

from sae_core.reporting.html import render
from sae_core.reporting.known_features import KnownFeatures

SIGNS = {" ": "␣", "\n": "↵", "\t": "⇥"}
"""What stands for characters that cannot be seen."""

Reading = tuple[str, Sequence[tuple[int, float]], int]
"""A token, its strongest features with their activations, and how many are active."""


def visible(token: str) -> str:
    """A token with signs for its spaces and line breaks."""
    return "".join(SIGNS.get(character, character) for character in token)


def text_page(name: str, readings: Sequence[Reading], known: KnownFeatures) -> str:
    """The page, self-contained."""
    most = max((value for _, found, _ in readings for _, value in found), default=1.0)
    tokens = [
        {
            "text": visible(token),
            "share": round(found[0][1] / most, 3) if found else 0,
            "features": [(n, known.link(n), value, known.labels.get(n, "")) for n, value in found],
            "n_active": n_active,
        }
        for token, found, n_active in readings
    ]
    return render("text.html.j2", "text.css.j2", name=name, tokens=tokens)
