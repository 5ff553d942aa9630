"""What each feature fires on in a few words, without any LLM: `photosynthesis (84%), biology`.

The names come from the windows in which a feature is most active: what most of their peaks share.
The share is that of the feature's whole activation, on a random sample of the tokens on which it
is active. What can be shared, in the order in which it is looked for:

* up to three words, in lower case: `acid, acids (62%)`
* a piece of different words: `…ation (71%)`
* a class of tokens: `numbers (93%)`
* the word before: `after “of” (88%)`
* a word in the tokens before: `near “enzyme” (70%)`

A feature whose peaks share nothing is named by three of their words. A position or a subject
follows if nearly all of the activation is there.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

from sae_core.evaluation.features import DENSE, FEW_WINDOWS, SPECIFIC, FeatureTable
from sae_core.evaluation.words import END_SIGN, SIGNS, Words

MOST_NAMES = 3
"""Words in a label."""

SHARED = 0.6
"""Share of the top windows from which on something is common to them."""

CLASS_SHARED = 0.8
"""The same for a class of tokens, of which there are many."""

NEAR = 30
"""Tokens before a peak in which a word is looked for."""

COMMON = 0.3
"""A word that stands in a larger share of stretches of `NEAR` tokens says nothing."""

AT_START = 4
"""Tokens at the start of a text or a window."""

ENOUGH_WINDOWS = 16
"""A feature in fewer windows counts as less telling."""


class Label(NamedTuple):
    """What a feature fires on."""

    text: str
    score: float
    """How much it says: larger for features that are active on a few rare words only."""
    peaks: list[tuple[str, int]]
    """The words on which the top windows peak, and how often."""


class _Peaks(NamedTuple):
    """Where a feature is active: places are tokens counted through all windows."""

    top: list[int]
    """The peaks of its top windows, the strongest first."""
    sample: list[int]
    """A random sample of the tokens on which it is active."""
    weights: list[float]
    """Its activations there, with the sum 1."""


class _Pattern(NamedTuple):
    """Something that places have in common."""

    text: str
    cover: float
    """Share of the top windows that have it."""
    share: float
    """Share of the activation."""
    base: float
    """Share of all tokens."""

    @property
    def bits(self) -> float:
        """What the activation says about it beyond chance: its part of a relative entropy."""
        return self.share * math.log2(max(self.share, self.base) / self.base)


Keys = Callable[[int], Iterable[Hashable]]
"""What a place has, of one kind."""


class DefaultLabels:
    """Labels for the features of a table, which has read the same corpus as `words`.

    `subjects` are the names of the table's subjects.
    """

    def __init__(self, table: FeatureTable, words: Words, subjects: Sequence[str]) -> None:
        self.table, self.words, self.subjects = table, words, subjects
        self.length = len(words.pieces[0])
        self.n_tokens = len(words.ids)
        self._ids, self._before = words.ids.tolist(), words.before.tolist()
        self._counts: dict[Hashable, int] = dict(enumerate(words.counts.tolist()))

    def of_all(self) -> list[Label]:
        """One label for each of the F features, in their order."""
        table = self.table
        best, spread = table.best, table.spread
        found = []
        for feature, n in enumerate(table.tally.count.tolist()):
            if n == 0:
                first = int(table.tally.at_first[feature]) > 0
                found.append(Label("position 0 only" if first else "never active", -1.0, []))
                continue
            places, values = spread.place[feature].tolist(), spread.value[feature].tolist()
            total = sum(values)
            found.append(
                self._label(
                    feature,
                    _Peaks(
                        [p for p in best.place[feature].tolist() if p >= 0],
                        [p for p in places if p >= 0],
                        [v / total for p, v in zip(places, values, strict=True) if p >= 0],
                    ),
                )
            )
        return found

    def _label(self, feature: int, peaks: _Peaks) -> Label:
        pattern = self._pattern(peaks)
        share = f"{pattern.share:.0%}" if pattern.share >= 0.005 else "<1%"
        parts = [f"{pattern.text} ({share})", *self._position(peaks), *self._subject(feature)]
        words = Counter(self.words.names[self._ids[place]] for place in peaks.top)
        score = self._score(feature, pattern, words)
        return Label(", ".join(parts), score, words.most_common())

    def _score(self, feature: int, pattern: _Pattern, words: Counter[str]) -> float:
        """Its bits, times how far it is about one word and one subject."""
        n = int(self.table.tally.windows[feature])
        score = pattern.bits * min(1.0, n / ENOUGH_WINDOWS)
        score *= max(words.values()) / words.total()
        if len(self.subjects) > 1:
            score *= float(self.table.shares[feature].max())
        fit = float(self.table.density[feature]) <= DENSE and n >= FEW_WINDOWS
        says = sum(map(str.isalpha, pattern.text)) >= 4
        return score * (1 if fit else 0.01) * (1 if says else 0.1)

    def _pattern(self, peaks: _Peaks) -> _Pattern:
        """The first kind that most top windows share."""
        words = self._shared(peaks, self._word, self._named_words, self._base)
        if words and words.cover >= SHARED:
            return words
        for pattern in self._other_patterns(peaks):
            if pattern and pattern.cover >= SHARED:
                return pattern
        return self._strongest_words(peaks)

    def _other_patterns(self, peaks: _Peaks) -> Iterator[_Pattern | None]:
        yield self._shared(peaks, self._piece, lambda keys: str(keys[0]), _rare, most=1)
        kinds = self._shared(peaks, self._kind, lambda keys: str(keys[0]), lambda _: 0.1, most=1)
        yield kinds if kinds and kinds.cover >= CLASS_SHARED else None
        yield self._shared(
            peaks, self._word_before, lambda keys: f"after {self._quoted(keys)}", self._base
        )
        yield self._shared(
            peaks, self._words_near, lambda keys: f"near {self._quoted(keys)}", self._base_near,
            most=1,
        )  # fmt: skip

    def _shared(
        self,
        peaks: _Peaks,
        keys: Keys,
        named: Callable[[list[Hashable]], str],
        base: Callable[[Hashable], float],
        most: int = MOST_NAMES,
    ) -> _Pattern | None:
        """The pattern of the keys that come back in the top windows."""
        count = Counter(key for place in peaks.top for key in keys(place))
        again = min(2, math.ceil(len(peaks.top) / 2))
        names = [key for key, n in count.most_common(most) if n >= again]
        if not names:
            return None
        chosen = set(names)
        cover = sum(not chosen.isdisjoint(keys(place)) for place in peaks.top) / len(peaks.top)
        return _Pattern(
            named(names), cover, self._share(peaks, keys, chosen), sum(map(base, names))
        )

    @staticmethod
    def _share(peaks: _Peaks, keys: Keys, chosen: set[Hashable]) -> float:
        places = zip(peaks.sample, peaks.weights, strict=True)
        return sum(w for place, w in places if not chosen.isdisjoint(keys(place)))

    def _strongest_words(self, peaks: _Peaks) -> _Pattern:
        """The words of the most peaks; of those on as many, the strongest."""
        words = Counter(self._ids[place] for place in peaks.top).most_common(MOST_NAMES)
        names = [word for word, _ in words]
        cover = sum(self._ids[place] in names for place in peaks.top) / len(peaks.top)
        share = self._share(peaks, self._word, set(names))
        return _Pattern(self._named_words(names), cover, share, sum(map(self._base, names)))

    # What a place has

    def _word(self, place: int) -> list[int]:
        return [self._ids[place]]

    def _word_before(self, place: int) -> list[int]:
        return [self._before[place]] if self._before[place] >= 0 else []

    def _words_near(self, place: int) -> set[int]:
        start = max(place - place % self.length, place - NEAR)
        near = set(self._ids[start:place]) - {self._ids[place]}
        return {word for word in near if self._base_near(word) < COMMON and self._is_word(word)}

    def _piece(self, place: int) -> list[str]:
        """The token, if it is only a part of its word."""
        window, at = divmod(place, self.length)
        piece = self.words.pieces[window][at]
        text, word = piece.strip().lower(), self.words.names[self._ids[place]]
        if not text or text == word or not text.isalnum():
            return []
        first = "" if word.startswith(text) and piece != piece.lstrip() else "…"
        return [f"{first}{text}" + ("" if word.endswith(text) and first else "…")]

    def _kind(self, place: int) -> list[str]:
        word = self.words.names[self._ids[place]]
        if word[0] in SIGNS.values():
            return ["line breaks"] if SIGNS["\n"] in word else ["spaces"]
        if any(c.isdigit() for c in word):
            return ["numbers"]
        if not any(c.isalpha() for c in word):
            return ["punctuation"]
        window, at = divmod(place, self.length)
        return ["capital letters"] if self.words.pieces[window][at].strip()[:1].isupper() else []

    # How it is written, and how frequent it is

    def _named_words(self, keys: Sequence[Hashable]) -> str:
        return ", ".join(_said(self.words.names[key]) for key in keys)  # type: ignore[call-overload]

    def _quoted(self, keys: Sequence[Hashable]) -> str:
        return ", ".join(f"“{self._named_words([key])}”" for key in keys)

    def _base(self, word: Hashable) -> float:
        return self._counts[word] / self.n_tokens

    def _base_near(self, word: Hashable) -> float:
        return 1 - (1 - self._base(word)) ** NEAR

    def _is_word(self, word: int) -> bool:
        return sum(map(str.isalpha, self.words.names[word])) >= 3

    def _position(self, peaks: _Peaks) -> Iterator[str]:
        """Where nearly all top windows peak and nearly all activation is."""
        for name, at_start in (
            ("start of a window", lambda place: place % self.length <= AT_START),
            ("start of a text", self._after_end),
        ):
            places = zip(peaks.sample, peaks.weights, strict=True)
            if (
                sum(map(at_start, peaks.top)) >= SPECIFIC * len(peaks.top)
                and sum(w for place, w in places if at_start(place)) >= SPECIFIC
            ):
                yield name
                return

    def _after_end(self, place: int) -> bool:
        start = max(place - place % self.length, place - AT_START)
        return any(self.words.names[word] == END_SIGN for word in self._ids[start:place])

    def _subject(self, feature: int) -> Iterator[str]:
        if len(self.subjects) > 1:
            share, index = self.table.shares[feature].max(0)
            if float(share) >= SPECIFIC:
                yield self.subjects[int(index)]


def _rare(_: Hashable) -> float:
    return 0.01


def _said(word: str) -> str:
    return "end of a text" if word == END_SIGN else word
