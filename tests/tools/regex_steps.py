"""How many steps a regular expression takes: a slow matcher that counts, in place of a clock.

It tries what Python's matcher tries, in the same order, without its short cuts, so that a count
that doubles with the text shows an expression that takes time in proportion to it.
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from re import _constants as op
from re import _parser
from typing import Any

Goal = Callable[[int], int | None]
"""What is to match from a position on: the end of the match, or None."""

SINGLE = (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN)
CATEGORIES: dict[Any, Callable[[str], bool]] = {
    op.CATEGORY_DIGIT: str.isdecimal,
    op.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    op.CATEGORY_SPACE: str.isspace,
    op.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    op.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    op.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}


@contextmanager
def deep_recursion() -> Iterator[None]:
    """A step calls the next one. The limit goes back to what it was: with this one, a library that
    relies on it would overflow the stack."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


class Steps:
    """Matches a pattern against one text; `count` is what it took."""

    def __init__(self, pattern: re.Pattern[str], text: str) -> None:
        self.text, self.flags, self.count = text, pattern.flags, 0
        self.tree = _parser.parse(pattern.pattern, pattern.flags)
        self.groups: dict[int, tuple[int, int]] = {}

    def match(self, whole: bool = False) -> int | None:
        """Where the match from the beginning of the text ends; `whole` asks for all of it."""

        def ended(position: int) -> int | None:
            return None if whole and position < len(self.text) else position

        with deep_recursion():
            return self._items(list(self.tree), 0, ended)

    def find_all(self) -> list[tuple[int, int]]:
        """Where `finditer` finds it."""
        found, at = [], 0
        while at <= len(self.text):
            with deep_recursion():
                end = self._items(list(self.tree), at, lambda position: position)
            if end is None:
                at += 1
            else:
                found.append((at, end))
                at = end if end > at else at + 1
        return found

    def _items(self, items: list[Any], at: int, then: Goal) -> int | None:
        self.count += 1
        if not items:
            return then(at)
        (kind, value), rest = items[0], items[1:]

        def go_on(position: int) -> int | None:
            return self._items(rest, position, then)

        if kind in SINGLE:
            return go_on(at + 1) if self._fits(kind, value, at) else None
        if kind is op.AT:
            return go_on(at) if self._is_at(value, at) else None
        if kind is op.BRANCH:
            return _first(self._items(list(branch), at, go_on) for branch in value[1])
        if kind is op.SUBPATTERN:
            return self._group(value[0], list(value[3]), at, go_on)
        if kind is op.GROUPREF:
            start, end = self.groups[value]
            known = self.text[start:end]
            self.count += len(known)
            return go_on(at + len(known)) if self.text.startswith(known, at) else None
        if kind in (op.ASSERT, op.ASSERT_NOT):
            found = self._looked(value, at)
            return go_on(at) if found == (kind is op.ASSERT) else None
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            return self._repeat(kind is op.MIN_REPEAT, value, at, go_on)
        raise NotImplementedError(str(kind))

    def _group(self, number: int | None, items: list[Any], at: int, then: Goal) -> int | None:
        def closed(end: int) -> int | None:
            if number is not None:
                self.groups[number] = (at, end)
            return then(end)

        return self._items(items, at, closed)

    def _looked(self, value: tuple[int, Any], at: int) -> bool:
        direction, items = value
        if direction < 0:
            at -= items.getwidth()[0]
            if at < 0:
                return False
        return self._items(list(items), at, lambda position: position) is not None

    def _repeat(self, lazy: bool, value: tuple[int, Any, Any], at: int, then: Goal) -> int | None:
        least, most, items = value
        if not lazy and len(items) == 1 and items[0][0] in SINGLE:
            end = at
            while end - at < most and self._fits(*items[0], end):
                end += 1
            return _first(then(position) for position in range(end, at + least - 1, -1))

        def once_more(done: int, position: int) -> int | None:
            def again(end: int) -> int | None:
                return None if end == position and done >= least else once_more(done + 1, end)

            def one() -> int | None:
                return self._items(list(items), position, again) if done < most else None

            if done < least:
                return one()
            end = then(position) if lazy else one()
            if end is not None:
                return end
            return one() if lazy else then(position)

        return once_more(0, at)

    def _fits(self, kind: Any, value: Any, at: int) -> bool:
        self.count += 1
        if at >= len(self.text):
            return False
        char = self.text[at]
        if kind is op.ANY:
            return char != "\n" or bool(self.flags & re.DOTALL)
        chars = {char.lower(), char.upper()} if self.flags & re.IGNORECASE else {char}
        if kind in (op.LITERAL, op.NOT_LITERAL):
            return (chr(value) in chars) == (kind is op.LITERAL)
        negated = value[0][0] is op.NEGATE
        return any(_is_in(c, item) for c in chars for item in value) != negated

    def _is_at(self, where: Any, at: int) -> bool:
        text, many = self.text, bool(self.flags & re.MULTILINE)
        if where in (op.AT_BEGINNING, op.AT_BEGINNING_STRING):
            return at == 0 or (many and where is op.AT_BEGINNING and text[at - 1] == "\n")
        if where is op.AT_END:
            return at == len(text) or (text[at] == "\n" and (many or at + 1 == len(text)))
        if where is op.AT_END_STRING:
            return at == len(text)
        before, after = text[at - 1 : at] if at else "", text[at : at + 1]
        word = [c.isalnum() or c == "_" for c in (before, after)]
        return (word[0] != word[1]) == (where is op.AT_BOUNDARY)


def _first(ends: Iterable[int | None]) -> int | None:
    return next((end for end in ends if end is not None), None)


def _is_in(char: str, item: tuple[Any, Any]) -> bool:
    kind, value = item
    if kind is op.LITERAL:
        return ord(char) == value
    if kind is op.RANGE:
        return value[0] <= ord(char) <= value[1]
    return kind is op.CATEGORY and CATEGORIES[value](char)
