"""The windows of text that a feature is labelled and scored with, from the file of features.

A feature's own windows, its strongest and those at its quantiles, are dealt out in turns: the even
ones are shown to the labeller, the odd ones are kept for the scores. Windows that do not activate
it are other features' windows. The file of features does not say in which of them it is active
too, so those of its nearest neighbours and of the features often active together with it are left
out, and so is text that overlaps its own windows. Of what remains a share is wrong that is at most
`1 - (1 - density)^tokens`: little for all but dense features.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sae_core.utils.errors import SAEError
from sae_core.utils.records import read_json_lines

Entry = dict[str, Any]
"""A line of `results/features/<run>.jsonl`, as `evaluation/feature_files.py` writes it."""

KEYS = {"feature", "top", "quantiles", "promoted", "neighbours", "partners"}
"""What is read of it."""

POOL = 2000
"""Windows of other features that are kept in memory."""

CONTRAST = 5
"""Windows without activation that the labeller sees, at most."""

MARKED = 0.3
"""Tokens are marked whose activation is at least this share of the window's largest, as in
delphi."""


class Window(NamedTuple):
    """Consecutive tokens of a text, with one feature's activation on each."""

    feature: int
    text: int
    start: int
    """Position of the first token in its window of the corpus."""
    tokens: tuple[str, ...]
    activations: tuple[float, ...]

    @classmethod
    def of(cls, feature: int, found: dict[str, Any]) -> "Window":
        """A window as the file has it."""
        start = found["position"] - found["peak"]
        tokens, activations = tuple(found["tokens"]), tuple(found["activations"])
        return cls(feature, found["text"], start, tokens, activations)

    @property
    def peak(self) -> float:
        return max(self.activations, default=0.0)

    def marks(self) -> list[bool]:
        """For each token, whether the feature is clearly active on it."""
        return [a > 0 and a >= MARKED * self.peak for a in self.activations]

    def shown(self, marks: Sequence[bool] = ()) -> str:
        """The text, with the tokens of `marks` between << and >>."""
        parts: list[str] = []
        before = False
        for token, mark in zip(self.tokens, [*marks] or [False] * len(self.tokens), strict=True):
            parts.append((">>" if before else "<<") if mark != before else "")
            parts.append(token)
            before = mark
        return "".join([*parts, ">>" if before else ""]).replace("<<>>", "")

    def overlaps(self, other: "Window") -> bool:
        """Whether they may share text."""
        near = abs(self.start - other.start) < max(len(self.tokens), len(other.tokens))
        return (self.text == other.text and near) or self.tokens == other.tokens


@dataclass(frozen=True)
class Material:
    """What is known of one feature."""

    feature: int
    promoted: tuple[str, ...]
    """Tokens that it makes the model predict."""
    shown: tuple[Window, ...]
    """Activating windows for the labeller."""
    contrast: tuple[Window, ...]
    """Windows for the labeller that do not activate it."""
    scored: tuple[Window, ...]
    """Activating windows that the labeller does not see."""
    quiet: tuple[Window, ...]
    """As many windows, if there are, that do not activate it, and that the labeller does not see
    either."""


def read_entries(path: Path) -> Iterator[Entry]:
    """The features of a file, each as it is read.

    Raises:
        SAEError: the file cannot be read, or a line is not a feature with its windows.
    """
    for entry in read_json_lines(path):
        if not isinstance(entry, dict) or not KEYS <= entry.keys():
            raise SAEError(
                f"{path}: not the features of an SAE with their windows; give the file that "
                "scripts/features.py writes as --entries"
            )
        yield entry


class Pool:
    """A random sample of windows of all features, one of each feature, in bounded memory."""

    def __init__(self, entries: Iterable[Entry], seed: int) -> None:
        self.seed = seed
        self.windows: list[Window] = []
        self.n_features = 0
        """All features that were read."""
        chance = random.Random(f"{seed} pool")
        for entry in entries:
            found = entry["top"] + entry["quantiles"]
            slot = (
                len(self.windows)
                if len(self.windows) < POOL
                else chance.randrange(self.n_features + 1)
            )
            self.n_features += 1
            if found and slot < POOL:
                window = Window.of(entry["feature"], chance.choice(found))
                self.windows[slot : slot + 1] = [window]

    def material(self, entry: Entry) -> Material:
        """What there is to label and score a feature with."""
        feature, own = entry["feature"], own_windows(entry)
        shown, seen = own[::2], {window.tokens for window in own[::2]}
        scored = [window for window in own[1::2] if window.tokens not in seen]
        wanted = len(scored) + CONTRAST
        others = [window for window, _ in zip(self._quiet(entry, own), range(wanted), strict=False)]
        n_quiet = min(len(scored), max(len(others) - CONTRAST, len(others) // 2))
        promoted = tuple(token for token, _ in entry["promoted"])
        quiet, contrast = others[:n_quiet], others[n_quiet:][:CONTRAST]
        groups = (shown, contrast, scored, quiet)
        return Material(feature, promoted, *map(tuple, groups))

    def _quiet(self, entry: Entry, own: list[Window]) -> Iterator[Window]:
        """Windows of other features, in an order of this feature's own."""
        related = {entry["feature"], *(row[0] for row in entry["neighbours"] + entry["partners"])}
        order = list(self.windows)
        random.Random(f"{self.seed} {entry['feature']}").shuffle(order)
        for window in order:
            if window.feature not in related and not any(map(window.overlaps, own)):
                yield window._replace(activations=(0.0,) * len(window.tokens))


def own_windows(entry: Entry) -> list[Window]:
    """A feature's windows, the strongest first."""
    return [Window.of(entry["feature"], found) for found in entry["top"] + entry["quantiles"]]
