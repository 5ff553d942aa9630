"""From the lines of a chapter to its paragraphs: what the conversion of a PDF file parted is
joined, and what is not prose goes."""

import re
from collections import Counter
from functools import cached_property

from sae_core.data_processing.characters import joint
from sae_core.data_processing.counts import (
    BARE,
    CAPTION_APART,
    HEADING,
    HYPHEN,
    MARKUP,
    OUTLINE,
    PAGE,
    PAGE_BREAK,
    RUNNING,
    Counts,
)
from sae_core.data_processing.lines import TAIL, TERMINATED, Line, is_open, lower_share

Pieces = list[str]
"""A line of a paragraph that is being put together, in pieces: they are joined once."""

UNCLOSED_FENCE = re.compile(r"(?:`{3,}|~{3,})[^`]*$")
TEMPLATE = re.compile(
    r"(?:\{%.*%\}|\{\{[<%].*[>%]\}\}|\{[:#.][^{}]*\}|\([\w.-]+\)=|:{3,}[^:]*|\[![A-Z]+\])$"
)
"""A line for a site generator: Jekyll, Hugo, Quarto, MyST, pandoc; the kind of an alert."""

CAPTION = re.compile(
    r"(?:FIGURE|TABLE|FIG\.|(?:Figure|Table|Fig\.)(?=\s+[\d.-]+[.:]?\s*(?:[A-Z(“\"]|$)))\s+\d"
)
BARE_CAPTION = re.compile(r"(?:FIGURE|TABLE|Figure|Table|F[Ii][Gg]\.)\s+\d+(?:[.-]\d+)*[.:]?$")
OUTLINE_ENTRY = re.compile(r"\d+(?:\.\d+)+\.?\s+[A-Z“\"].{0,120}(?<![.!?,;:])$")
LEADERS = re.compile(r"(?:\. ?){4}\d+$")
PAGE_NUMBER = re.compile(
    r"[-–—\[( ]*(?:[Pp](?:age|\.) )?\d{1,4}[-–—\]) ]*$"
    r"|(?=[ivxlc]{2})(?:x[lc]|l?x{0,3})(?:i[xv]|v?i{0,3})$"
)
PAGE_AT_EDGE = re.compile(r"^\d{1,4}\s+|(?<!\s)\s+\d{1,4}$")
CAPITALS = re.compile(r"\d[\d.]*|(?=[\W\d_a-z]*[^\W\d_a-z])[^\da-z]+")
LIST_ITEM = re.compile(r"^(?:[•◦▪‣·*]|[-+](?=\s+\D))\s+(?:\[[ xX]\]\s+)?")
NUMBERED = re.compile(r"(?:\d{1,3}[.)]|\([a-z]\))\s")
WORDS = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")


class Assembly:
    """Joins the lines of a chapter into paragraphs."""

    def __init__(self, lines: list[Line], counts: Counts) -> None:
        self.paragraphs: list[list[Pieces]] = []
        """The lines of each; of a listing, one line."""

        self.listings: set[int] = set()
        """Which of the paragraphs are listings."""

        self._lines, self._counts = lines, counts
        self._current: list[Pieces] | None = None  # the paragraph that the next line belongs to
        self._broken: list[Pieces] | None = None  # the one that the next paragraph may continue
        self._wrapped = False  # whether the line before runs on into the next
        self._running = _running_headers(lines)
        for number in range(len(lines)):
            self._read(number)

    @cached_property
    def _words(self) -> set[str]:
        return {word for line in self._lines for word in WORDS.findall(line.text.casefold())}

    def _read(self, number: int) -> None:
        line, kind, wraps = self._lines[number]
        if kind == "blank":
            self._current, self._wrapped = None, False
        elif kind == "heading":
            self._head(line, number)
        elif kind == "code":
            self._current, self._broken = None, None
            self.listings.add(len(self.paragraphs))
            self.paragraphs.append([[line]])
        elif kind == "inset":
            self._add_inset(line)
        elif reason := self._furniture(line, number):
            self._counts.dropped[reason].append(line)
        else:
            self._add(line)
            self._wrapped = wraps

    def _furniture(self, line: str, number: int) -> str | None:
        """Why the line is not prose; None if it is."""
        if not any(map(str.isalnum, line)) or UNCLOSED_FENCE.match(line) or TEMPLATE.match(line):
            return MARKUP
        if PAGE_NUMBER.match(line):
            return PAGE
        if _without_page(line) in self._running:
            return RUNNING
        if (OUTLINE_ENTRY.match(line) or LEADERS.search(line)) and not self._runs_on():
            return OUTLINE
        if BARE_CAPTION.match(line) and not self._runs_on() and self._is_last(number):
            return BARE
        return None

    def _is_last(self, number: int) -> bool:
        """Whether no line of the same paragraph follows."""
        return all(line.kind == "blank" for line in self._lines[number + 1 : number + 2])

    def _runs_on(self) -> bool:
        """Whether the next line is in the middle of a sentence."""
        return self._wrapped and self._current is not None and is_open(self._current[-1][-1])

    def _head(self, heading: str, number: int) -> None:
        after = (self._lines[at] for at in range(number + 1, len(self._lines)))
        following = next((line for line in after if line.kind != "blank"), Line(""))
        prose = _prose_in_heading(heading, following.text if following.kind == "text" else "")
        if head := heading.removesuffix(prose).strip():
            self._counts.dropped[HEADING].append(head)
        self._current, self._broken = None, None
        if prose:
            self._add(prose)
            self._wrapped = True

    def _add_inset(self, inset: str) -> None:
        """Put a formula of its own into the sentence that it is in the middle of."""
        if self._current is None and self._broken and is_open(self._broken[-1][-1]):
            self._current = self._broken
            self._counts.repaired[PAGE_BREAK] += 1
        if self._current is None:
            self._current = self._broken = [[inset]]
            self.paragraphs.append(self._broken)
        else:
            self._glue(self._current[-1], inset)
        self._wrapped = True

    def _add(self, line: str) -> None:
        caption = CAPTION.match(line)
        if self._current is None or (caption and not self._runs_on()):
            self._start(line, is_caption=bool(caption))
            return
        last = self._current[-1]
        item = LIST_ITEM.match(line) or (NUMBERED.match(line) and not is_open(last[-1]))
        if not item and (self._wrapped or _is_hyphenated(last[-1], line)):
            self._glue(last, line)
        else:
            self._current.append([line])

    def _start(self, line: str, is_caption: bool) -> None:
        if is_caption:
            self._counts.repaired[CAPTION_APART] += self._current is not None
            self._current = [[line]]
            self.paragraphs.append(self._current)
            return
        head, rest = _split_capitals(line)
        if any(word[0].islower() for word in rest.split()):
            self._counts.dropped[HEADING].append(head)
            line = rest
        if self._broken and _goes_on(self._broken, line):
            self._counts.repaired[PAGE_BREAK] += 1
            self._glue(self._broken[-1], line)
        else:
            self._broken = [[line]]
            self.paragraphs.append(self._broken)
        self._current = self._broken

    def _glue(self, line: Pieces, right: str) -> None:
        """Put `right` at the end of a line, a hyphenated word restored."""
        left = line.pop()
        if not _is_hyphenated(left, right):
            line += [left, joint(left, right), right]
            return
        words = WORDS.findall(left[-TAIL:])[-1:] + WORDS.findall(right[:TAIL])[:1]
        parted, joined = "-".join(words).casefold(), "".join(words).casefold()
        keeps = left[-2].isdigit() or (parted in self._words and joined not in self._words)
        left = left if keeps else left[:-1]
        self._counts.repaired[HYPHEN] += not keeps
        if len(left) > TAIL:
            line.append(left[:-TAIL])
        line.append(left[-TAIL:] + right)  # the last piece has the whole word


def _running_headers(lines: list[Line]) -> set[str]:
    counts = Counter(
        _without_page(line.text) for line in lines if line.kind == "text" and _may_run(line.text)
    )
    return {line for line, count in counts.items() if count >= 3}


def _may_run(line: str) -> bool:
    text = PAGE_AT_EDGE.sub("", line)
    return text[:1].isupper() and text[-1] not in ".!?…,;:" and len(text.split()) <= 8


def _without_page(line: str) -> str:
    return PAGE_AT_EDGE.sub("", line).casefold()


def _prose_in_heading(heading: str, following: str) -> str:
    """The part of a heading that is prose: all, its end, or nothing."""
    words = heading.split()
    if BARE_CAPTION.match(heading):
        return ""
    is_sentence = heading.endswith(".") and len(words) >= 8
    if CAPTION.match(heading) or is_sentence or _is_entry(words):
        return heading
    _, rest = _split_capitals(heading)
    has_sentence = len(rest.split()) >= 5 and TERMINATED.search(rest)
    return rest if has_sentence or following[:1].islower() else ""


def _is_entry(words: list[str]) -> bool:
    """Whether the words are a glossary entry, not a heading."""
    return len(words) >= 5 and words[0][0].islower() and lower_share(words) > 0.6


def _split_capitals(line: str) -> tuple[str, str]:
    """A heading in capitals (eight letters or more) and the sentence after it, or neither."""
    words = line.split(" ")
    count = next((i for i, word in enumerate(words) if not CAPITALS.fullmatch(word)), 0)
    if count and words[count - 1] in ("A", "I"):
        count -= 1
    head, rest = " ".join(words[:count]), " ".join(words[count:])
    if sum(map(str.isalpha, head)) < 8 or not rest.lstrip("“\"'(")[:1].isupper():
        return "", ""
    return head, rest


def _goes_on(paragraph: list[Pieces], line: str) -> bool:
    """Whether the line continues a paragraph that a page or a formula broke."""
    return is_open(paragraph[-1][-1]) and line[:1].islower() and not paragraph[0][0][:1].islower()


def _is_hyphenated(left: str, right: str) -> bool:
    return left[-1:] == "-" and left[-2:-1].isalnum() and right[:1].islower()
