"""What each feature fires on in a few words, without any LLM: `photosynthesis (84%), biology`.

The names come from the windows in which a feature is most active: what most of their peaks share,
where a window counts by its activation. The share in brackets is that of the feature's whole
activation, on a random sample of the tokens on which it is active. What can be shared, in the order
in which it is looked for:

* up to three words, in lower case: `acid, acids (62%)`
* a class of words: `years (93%)`, `formulas`, `exponents`
* a piece of different words: `…ation (71%)`
* a wider class: `numbers (93%)`, `punctuation`, `capital letters`, white space
* up to three pieces: `paul…, …yl… (35%)`
* the word before: `after “of” (88%)`
* a word in the tokens before: `near “enzyme” (70%)`

The last two count only if chance gives them to one feature in a hundred at most. A feature whose
peaks share nothing is `mixed`, with three of their words: `mixed: steel, reverse, virus (9%)`. A
position or a subject follows if nearly all of the activation is there.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, TypeVar

from sae_core.evaluation.features import DENSE, FEW_WINDOWS, SPECIFIC, FeatureTable
from sae_core.evaluation.tally import Records
from sae_core.evaluation.words import END_SIGN, SIGNS, Words

MOST_NAMES = 3
"""Words in a label."""

SHARED = 0.55
"""Share of the top windows from which on something is common to them."""

CLASS_SHARED = 0.8
"""The same for a class of tokens, of which there are many."""

NEAR = 30
"""Tokens before a peak in which a word is looked for."""

ROUNDING = 1e-9
"""Of sums of shares."""

CHANCE = 0.01
"""A context that the peaks share with more than this probability by chance says nothing."""

YEAR = re.compile("1[0-9]{3}s?|20[0-9]{2}s?")
"""From 1000 to 2099, and decades."""

RAISED, LOWERED = re.compile("[²³¹⁰-ⁿ]"), re.compile("[₀-ₜ]")
"""Superscripts and subscripts."""

UNQUOTED = {*SIGNS.values(), "◌"}
"""What stands for something else: white space, a part of a character."""

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
    heights: list[float]
    """The activations there, with the sum 1."""
    sample: list[int]
    """A random sample of the tokens on which it is active."""
    weights: list[float]
    """Its activations there, with the sum 1."""


class _Pattern(NamedTuple):
    """Something that places have in common."""

    text: str
    cover: float
    """Share of the top windows, each by its activation, that have it."""
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

Key = TypeVar("Key", bound=Hashable)


class DefaultLabels:
    """Labels for the features of a table, which has read the same corpus as `words`.

    `subjects` are the names of the table's subjects.
    """

    def __init__(self, table: FeatureTable, words: Words, subjects: Sequence[str]) -> None:
        self.table, self.words, self.subjects = table, words, subjects
        self.length = len(words.pieces[0])
        self.n_tokens = len(words.ids)
        self._ids, self._before = words.ids.tolist(), words.before.tolist()
        self._counts: list[int] = words.counts.tolist()
        self._windows, self._density = table.tally.windows.numpy(), table.density.numpy()
        self._shares = table.shares.numpy()
        self._end = words.names.index(END_SIGN) if END_SIGN in words.names else None
        self._is_word = [sum(map(str.isalpha, name)) >= 3 for name in words.names]

    def of_all(self) -> list[Label]:
        """One label for each of the F features, in their order."""
        table = self.table
        found = []
        for feature, n in enumerate(table.tally.count.tolist()):
            if n == 0:
                first = int(table.tally.at_first[feature]) > 0
                found.append(Label("position 0 only" if first else "never active", -1.0, []))
                continue
            top, heights = _weighted(table.best, feature)
            found.append(
                self._label(feature, _Peaks(top, heights, *_weighted(table.spread, feature)))
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
        n = int(self._windows[feature])
        score = pattern.bits * min(1.0, n / ENOUGH_WINDOWS)
        score *= max(words.values()) / words.total()
        if len(self.subjects) > 1:
            score *= float(self._shares[feature].max())
        fit = float(self._density[feature]) <= DENSE and n >= FEW_WINDOWS
        says = sum(map(str.isalpha, pattern.text)) >= 4
        return score * (1 if fit else 0.01) * (1 if says else 0.1)

    def _pattern(self, peaks: _Peaks) -> _Pattern:
        """The first kind that most top windows share."""
        found = self._patterns(peaks)
        return next(filter(None, found), None) or self._strongest_words(peaks)

    def _patterns(self, peaks: _Peaks) -> Iterator[_Pattern | None]:
        named = partial(self._named_pieces, peaks.top)
        yield self._shared(peaks, self._word, self._named_words, self._base)
        yield self._class(peaks, self._narrow_class)
        yield self._shared(peaks, self._piece, named, _rare, most=1)
        yield self._class(peaks, self._wide_class)
        yield self._shared(peaks, self._piece_of_word, named, _rare)
        yield self._context(peaks, "after", self._word_before, self._base)
        yield self._context(peaks, "near", self._words_near, self._base_near)

    def _class(self, peaks: _Peaks, keys: Keys) -> _Pattern | None:
        return self._shared(
            peaks, keys, lambda names: str(names[0]), lambda _: 0.1, most=1, least=CLASS_SHARED
        )

    def _context(
        self, peaks: _Peaks, relation: str, keys: Keys, base: Callable[[Any], float]
    ) -> _Pattern | None:
        """A word before nearly all of enough peaks, which chance does not explain."""
        n = len(peaks.top)
        if n < FEW_WINDOWS:
            return None
        words, cover = _common(peaks._replace(heights=[1 / n] * n), keys, 1)
        if cover < CLASS_SHARED - ROUNDING or self._by_chance(base(words[0]), cover, n) > CHANCE:
            return None
        share = _share(map(keys, peaks.sample), peaks.weights, words)
        text = f"{relation} {_quoted(self.words.names[words[0]])}"
        return _Pattern(text, cover, share, base(words[0])) if share >= SHARED else None

    def _shared(
        self,
        peaks: _Peaks,
        keys: Keys,
        named: Callable[[list[Any]], str],
        base: Callable[[Any], float],
        most: int = MOST_NAMES,
        least: float = SHARED,
    ) -> _Pattern | None:
        """The pattern of the keys that come back in the top windows, if at least a share `least`
        of these have one of the `most` best."""
        names, cover = _common(peaks, keys, most)
        if cover < least - ROUNDING:
            return None
        share = _share(map(keys, peaks.sample), peaks.weights, names)
        return _Pattern(named(names), cover, share, sum(map(base, names)))

    def _by_chance(self, base: float, cover: float, n: int) -> float:
        """How often a share `cover` of `n` windows has the same word by chance, at most, if one has
        it with probability `base`: the upper tail of a binomial distribution, times the number of
        words (Bonferroni)."""
        least = round(cover * n)
        tail = sum(math.comb(n, k) * base**k * (1 - base) ** (n - k) for k in range(least, n + 1))
        return tail * len(self.words.names)

    def _strongest_words(self, peaks: _Peaks) -> _Pattern:
        """The words of the strongest peaks."""
        heights: dict[int, float] = {}
        for place, height in zip(peaks.top, peaks.heights, strict=True):
            heights[self._ids[place]] = heights.get(self._ids[place], 0) + height
        names = _largest(heights, MOST_NAMES)
        cover = sum(heights[name] for name in names)
        said = self._named_words(names)
        return _Pattern(
            said if cover >= SHARED else f"mixed: {said}",
            cover,
            _share(map(self._word, peaks.sample), peaks.weights, names),
            sum(map(self._base, names)),
        )

    # What a place has

    def _word(self, place: int) -> list[int]:
        return [self._ids[place]]

    def _word_before(self, place: int) -> list[int]:
        return [self._before[place]] if self._before[place] >= 0 else []

    def _words_near(self, place: int) -> set[int]:
        start = max(place - place % self.length, place - NEAR)
        near = set(self._ids[start:place]) - {self._ids[place]}
        return {word for word in near if self._is_word[word]}

    def _piece(self, place: int) -> list[str]:
        """The token, as a part of its word or the whole of it."""
        text = self._text(place).lower()
        return [text] if text.isalnum() else []

    def _piece_of_word(self, place: int) -> list[str]:
        return [piece for piece in self._piece(place) if not piece.isdigit()]

    def _narrow_class(self, place: int) -> list[str]:
        word = self._name(place)
        if YEAR.fullmatch(word):
            return ["years"]
        if RAISED.search(self._text(place) or word):
            return ["exponents"]
        return ["formulas"] if LOWERED.search(word) else []

    def _wide_class(self, place: int) -> list[str]:
        word, text = self._name(place), self._text(place)
        if word[0] in SIGNS.values():
            return ["line breaks"] if SIGNS["\n"] in word else ["spaces"]
        if any(map(str.isdigit, text or word)):
            return ["numbers"]
        if not any(map(str.isalpha, word)):
            return ["punctuation"]
        return ["capital letters"] if text[:1].isupper() else []

    def _text(self, place: int) -> str:
        window, at = divmod(place, self.length)
        return self.words.pieces[window][at].strip()

    def _name(self, place: int) -> str:
        return self.words.names[self._ids[place]]

    # How it is written, and how frequent it is

    def _named_words(self, words: Sequence[int]) -> str:
        return ", ".join(_said(self.words.names[word]) for word in words)

    def _named_pieces(self, places: Sequence[int], pieces: Sequence[str]) -> str:
        """With dots where the words that they are in go on; of one word only, the word itself."""
        found = []
        for piece in pieces:
            words = {self._name(place) for place in places if self._piece(place) == [piece]}
            before = "" if all(word.startswith(piece) for word in words) else "…"
            after = "" if all(word.endswith(piece) for word in words) else "…"
            found.append(f"{before}{piece}{after}" if len(words) > 1 else words.pop())
        return ", ".join(dict.fromkeys(found))

    def _base(self, word: int) -> float:
        return self._counts[word] / self.n_tokens

    def _base_near(self, word: int) -> float:
        return 1 - (1 - self._base(word)) ** NEAR

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
        return self._end in self._ids[start:place]

    def _subject(self, feature: int) -> Iterator[str]:
        if len(self.subjects) > 1:
            index = self._shares[feature].argmax()
            if self._shares[feature, index] >= SPECIFIC:
                yield self.subjects[index]


def _weighted(records: Records, feature: int) -> tuple[list[int], list[float]]:
    """The places of a feature's records, and its activations there as shares of their sum."""
    places, values = records.place[feature].tolist(), records.value[feature].tolist()
    total = sum(values)
    kept = [
        (place, value / total) for place, value in zip(places, values, strict=True) if place >= 0
    ]
    return [place for place, _ in kept], [share for _, share in kept]


def _common(peaks: _Peaks, keys: Keys, most: int) -> tuple[list[Any], float]:
    """Up to `most` keys that come back in the top windows, the best first, and the share of these
    windows that have one of them."""
    at_top = [keys(place) for place in peaks.top]
    count = Counter(chain.from_iterable(at_top))
    again = min(2, math.ceil(len(peaks.top) / 2))
    heights: dict[Hashable, float] = {}
    for found, height in zip(at_top, peaks.heights, strict=True):
        for key in found:
            if count[key] >= again:
                heights[key] = heights.get(key, 0) + height
    names = _largest(heights, most)
    return names, _share(at_top, peaks.heights, names) if names else 0.0


def _largest(heights: Mapping[Key, float], n: int) -> list[Key]:
    """The `n` keys with the largest values; of equal ones, the first."""
    return sorted(heights, key=heights.__getitem__, reverse=True)[:n]


def _share(
    found: Iterable[Iterable[Hashable]], weights: Sequence[float], names: Sequence[Hashable]
) -> float:
    """The weight of the places where one of the names is found."""
    chosen = set(names)
    pairs = zip(found, weights, strict=True)
    return sum(weight for keys, weight in pairs if not chosen.isdisjoint(keys))


def _rare(_: Hashable) -> float:
    return 0.01


def _said(word: str) -> str:
    """A word as a label names it, other signs than those for white space between quotes."""
    plain = any(map(str.isalnum, word)) or word[0] in UNQUOTED
    return word if plain else _quoted(word)


def _quoted(word: str) -> str:
    return "end of a text" if word == END_SIGN else f"“{word}”"
