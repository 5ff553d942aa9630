"""How well a label tells a feature's texts apart: detection and fuzzing.

As in Paulo et al., "Automatically Interpreting Millions of Features in Large Language Models"
(arXiv 2410.13928): a scorer is given the label and windows that the labeller has not seen, with the
feature active in half of them. In detection it says in which the feature is active. In fuzzing
tokens are marked, and it says where these are the tokens that the feature is active on; a window
without activation has as many marked tokens, at random places, as the others have on average. The
score is the balanced accuracy, the mean of the shares of either class that are judged rightly: 1 is
perfect, and 0.5 is what a scorer gets that ignores the windows.
"""

import math
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sae_core.labelling.windows import Material, Window


class Sample(NamedTuple):
    """A window as a scorer sees it."""

    text: str
    is_active: bool


def balanced_accuracy(truth: Sequence[bool], judged: Sequence[bool]) -> float | None:
    """The mean of the shares of active and of inactive samples that are judged rightly; None if
    there are none of either."""
    shares = []
    for kind in (True, False):
        right = [j == t for t, j in zip(truth, judged, strict=True) if t == kind]
        if not right:
            return None
        shares.append(sum(right) / len(right))
    return sum(shares) / 2


def detection_samples(material: Material, seed: int) -> list[Sample]:
    """The windows of a feature that are scored, in random order."""
    active = [Sample(window.shown(), True) for window in material.scored]
    quiet = [Sample(window.shown(), False) for window in material.quiet]
    return _shuffled(active + quiet, f"{seed} {material.feature} detection")


def fuzzing_samples(material: Material, seed: int) -> list[Sample]:
    """The same windows with marked tokens."""
    chance = random.Random(f"{seed} {material.feature} marks")
    active = [Sample(window.shown(window.marks()), True) for window in material.scored]
    n_marks = [sum(window.marks()) for window in material.scored]
    n = math.ceil(sum(n_marks) / max(1, len(n_marks)))
    quiet = [Sample(w.shown(_random_marks(w, n, chance)), False) for w in material.quiet]
    return _shuffled(active + quiet, f"{seed} {material.feature} fuzzing")


def batches(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    """The samples of each request."""
    for first in range(0, len(samples), size):
        yield samples[first : first + size]


def _random_marks(window: Window, n: int, chance: random.Random) -> list[bool]:
    """`n` marked tokens, none of them without a text of its own."""
    visible = [i for i, token in enumerate(window.tokens) if token]
    marked = set(chance.sample(visible, min(n, len(visible))))
    return [i in marked for i in range(len(window.tokens))]


def _shuffled(samples: list[Sample], purpose: str) -> list[Sample]:
    random.Random(purpose).shuffle(samples)
    return samples
