"""A small page about one text: each token shaded by its strongest feature, with its features."""

from collections.abc import Sequence

from sae_core.reporting.html import render
from sae_core.reporting.known_features import KnownFeatures

SIGNS = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"})
"""What stands for characters that cannot be seen."""

PART = "◌"
"""Stands for a token that is a part of a character; the last part shows the character."""

Reading = tuple[str, Sequence[tuple[int, float]], int]
"""A token, its strongest features with their activations, and how many are active."""


def visible(token: str) -> str:
    """A token with signs for spaces and line breaks, and codes such as `‹U+200D›` for characters
    that cannot be seen or that rule a terminal."""
    shown = (c if c.isprintable() else f"‹U+{ord(c):04X}›" for c in token.translate(SIGNS))
    return "".join(shown) or PART


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
