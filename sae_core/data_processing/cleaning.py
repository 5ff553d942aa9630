"""From one Markdown chapter to paragraphs of prose: pure functions of the text.

What `clean` does, in this order:

1.  Project Gutenberg's header and footer are removed, the modern and the "small print" ones.
2.  HTML: scripts and comments go whole, tables too but for cells that are prose (eight words or
    more, a sentence or nearly all in lower case), other tags leave their content, entities become
    characters. A table glued to a paragraph leaves the paragraph.
3.  Characters: line ends become newlines, form feeds paragraph ends; byte-order marks, zero-width
    characters, soft hyphens and control characters go; ligatures become letters. Nothing else is
    normalised: m² stays m².
4.  Images, tables (Markdown and HTML) and pointers to media ("Click to view content (https://...)")
    are removed; links are reduced to their text.
5.  A heading glued to the end of a paragraph ("... works.# Summary", "... works.Key Terms") becomes
    a separate line; the kind of an exercise after its number is removed ("39. Professional
    Application A car ...").
6.  Line by line, what is not prose goes: headings, rules, code fences, link definitions, lines
    without a letter or digit, page numbers, entries of a table of contents ("1.1 Something"),
    captions that are only "FIGURE 1.2", and running headers, that is, short lines found three
    times or more in the chapter.
7.  A heading that is glued to the start of a paragraph goes, the paragraph's words stay: words in
    capitals before the start of a sentence. A heading that is a caption, a sentence of eight words
    or more with its full stop, or mostly words in lower case from the first on, as the entry of a
    glossary is, stays as prose.
8.  The lines of a paragraph (up to a blank line) become one; only a hard line break (two spaces or
    a backslash at the end) and list items keep their line. Words hyphenated over a line break are
    joined if the second part begins in lower case; the hyphen stays if the chapter elsewhere has
    the word with it and never without.
9.  A figure's or table's caption starts a separate paragraph and is kept: it is prose.
10. A paragraph that ends without a full stop, and the next that begins in lower case, are one
    paragraph broken by a page, picture, formula or caption, and are joined. Not across a heading,
    and not if the first begins in lower case too: such paragraphs are the entries of a glossary.
11. Emphasis, code marks, bullets and quotation marks of Markdown are reduced to their text; runs
    of spaces, and the punctuation around lost formulas, are tidied.

All of it takes time in proportion to the chapter, whatever the chapter contains: no pattern reads a
run of characters again from each of them, and nothing reads a paragraph again for each line.
"""

import html
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

Dropped = defaultdict[str, list[str]]
"""What was taken out: reason to pieces."""

Paragraph = list[str]
"""The lines of a paragraph: one, or several if it is a list."""

Line = list[str]
"""A line of a paragraph that is being put together, in pieces: they are joined once."""

LICENCE, TABLE, IMAGE, HEADING = "Gutenberg licence", "table", "image", "heading"
OUTLINE, RUNNING, PAGE, MARKUP = "outline entry", "running header", "page number", "markup only"
BARE, MEDIA = "bare caption", "pointer to media"

LICENCE_END = re.compile(
    r"^[*\\ ]*START OF (?:THE|THIS) PROJECT GUTENBERG[^*\n]*(?:\n[^*\n]+){0,3}\*[*\\ ]*$"
    r"|^.*\*END ?\* ?THE SMALL PRINT.*$",
    re.IGNORECASE | re.MULTILINE,
)
BOOK_END = re.compile(
    r"^[*\\ ]*END OF (?:THE |THIS )?PROJECT GUTENBERG", re.IGNORECASE | re.MULTILINE
)

TABLE_TAG = re.compile(r"(<table\b)|</table\s*>", re.IGNORECASE)
HTML_CELL = re.compile(r"(</?t[dhr]\b[^<>]*>)", re.IGNORECASE)
MARKDOWN_CELL = re.compile(r"([|\n])")
TAG = re.compile(r"</?[A-Za-z][^<>]*>")
OPEN_TABLE = re.compile(r"<table\b.*?(?=\n[ \t]*\n|\Z)", re.DOTALL | re.IGNORECASE)
HTML_HIDDEN = [
    (re.compile(opening, re.IGNORECASE), re.compile(closing, re.IGNORECASE))
    for opening, closing in (
        ("<!--", "-->"),
        (r"<script\b", r"</script\s*>"),
        (r"<style\b", r"</style\s*>"),
    )
]
HTML_HEADINGS = [
    (
        re.compile(rf"<h{level}\b[^<>\n]*>", re.IGNORECASE),
        re.compile(rf"</h{level}\s*>", re.IGNORECASE),
    )
    for level in range(1, 7)
]
HTML_BREAK = re.compile(r"<br\s*/?>[ \t]*\n?", re.IGNORECASE)
ATTRIBUTES = r"(?:\s+[\w:-]+\s*=[^<>]*|\s*/?)>"
HTML_BLOCK = re.compile(
    r"</?(?:p|div|section|center|figure|figcaption|blockquote|pre|ul|ol|li|dl|dt|dd|hr|table|thead|"
    rf"tbody|caption|tr|td|th){ATTRIBUTES}",
    re.IGNORECASE,
)
HTML_INLINE = re.compile(
    rf"</?(?:a|b|i|u|s|em|strong|small|sub|sup|span|font|cite|code){ATTRIBUTES}", re.IGNORECASE
)
ENTITY = re.compile(r"&(?:#\d{1,9}|#[xX][0-9a-fA-F]{1,8}|[A-Za-z]\w*);")

INVISIBLE = dict.fromkeys(
    [0xAD, 0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF, *range(9), *range(0x0E, 0x20), 0x7F]
)
BREAKS = {"\v": "\n", "\x85": "\n", "\u2028": "\n", "\f": "\n\n", "\u2029": "\n\n"}
LIGATURES = {chr(c): unicodedata.normalize("NFKC", chr(c)) for c in range(0xFB00, 0xFB07)}
CHARACTERS = INVISIBLE | str.maketrans(BREAKS | LIGATURES)

NESTED = r"[^()\n]*(?:\([^()\n]*\)[^()\n]*)*"
IMAGES = re.compile(
    rf"!\[(?:(?!!\[)[^\]])*\](?:\({NESTED}\)|\[[^\]]*\])|<img\b[^<>]*>", re.IGNORECASE
)
LINK = re.compile(rf"\[([^\[\]]+)\]\((?=[^()\n]*[/.#:@]){NESTED}\)")
REFERENCE = re.compile(r"\[([^\[\]]+)\]\[([^\[\]]*)\]")
DEFINITION = re.compile(
    r"^ {0,3}\[([^\]^\n]+)\]: +(?:<|https?:|mailto:|[./#]|\S+\.(?:html?|md|png|jpe?g|pdf)\b).*$",
    re.MULTILINE,
)
FOOTNOTE = re.compile(r"\[\^[^\[\]\s]+\]:?")

TABLE_RULE = re.compile(
    r"(?:\|\s*)?:?-{2,}:?\s*(?:\|\s*:?-{2,}:?\s*)+(?:\|\s*)?$|\|\s*:?-+:?\s*\|\s*$"
)
HEADING_LINE = re.compile(r"#{1,6}(?:\s+((?:.*[^\s#])?))?[\s#]*$")
GLUED_HEADING = re.compile(
    r"(?<=[^\s#])(?<!\b[CF])[ \t]*(#{1,6} +(?:[A-Z]|\d+\.\d).{0,120})$", re.MULTILINE
)
GLUED_SECTION = re.compile(
    r"(?<=[.!?)\]”])(Key (?:Terms|Equations|Concepts)|Glossary|(?:(?:Section|Chapter) )?Summary|"
    r"Chapter Review|(?:Conceptual|(?:Visual|Art) Connection|Review|Critical Thinking) Questions|"
    r"Problems (?:&|and) Exercises|Exercises|Learning Objectives|Further Reading|References)"
    r"[ \t]*$",
    re.MULTILINE,
)
EXERCISE_KIND = re.compile(
    r"^(\d{1,3}[.)][ \t]+)(Professional Application|Integrated Concepts|Unreasonable Results|"
    r"Construct Your Own Problem|Critical Thinking|Challenge Problem)"
    r":?[ \t]*(?:($)|(?<=[ \t])(?=[A-Z“\"(]))",
    re.MULTILINE,
)
MEDIA_POINTER = re.compile(
    r"\b(?:Access multimedia content|Click to view content)"
    r"(?:[ \t]*\n?[ \t]*\([^()]{0,500}\)\.?|[.:]?[ \t]*$)",
    re.IGNORECASE | re.MULTILINE,
)
UNDERLINE = re.compile(r"(?:={3,}|-{3,})$")
FENCE = re.compile(r"(?:`{3,}|~{3,})[^`]*$")
CAPTION = re.compile(
    r"[*_]*(?:FIGURE|TABLE|FIG\.|(?:Figure|Table|Fig\.)(?=\s+[\d.-]+[.:]?[*_]*\s*(?:[A-Z(“\"]|$)))\s+\d"
)
BARE_CAPTION = re.compile(
    r"[*_]*(?:FIGURE|TABLE|Figure|Table|F[Ii][Gg]\.)\s+\d+(?:[.-]\d+)*[.:]?[*_]*$"
)
OUTLINE_ENTRY = re.compile(r"\d+(?:\.\d+)+\.?\s+[A-Z“\"].{0,120}(?<![.!?,;:])$")
LEADERS = re.compile(r"(?:\. ?){4}\d+$")
PAGE_NUMBER = re.compile(
    r"[-–—\[( ]*(?:[Pp](?:age|\.) )?\d{1,4}[-–—\]) ]*$"
    r"|(?=[ivxlc]{2})(?:x[lc]|l?x{0,3})(?:i[xv]|v?i{0,3})$"
)
PAGE_AT_EDGE = re.compile(r"^\d{1,4}\s+|(?<!\s)\s+\d{1,4}$")
CAPITALS = re.compile(r"\d[\d.]*|(?=[\W\d_a-z]*[^\W\d_a-z])[^\da-z]+")

LIST_ITEM = re.compile(r"^(?:[•◦▪‣·*]|[-+](?=\s+\D))\s+")
NUMBERED = re.compile(r"(?:\d{1,3}[.)]|\([a-z]\))\s")
INNER_BULLET = re.compile(r"(?<=\S)[ \t]+•[ \t]+")
QUOTATION = re.compile(r"^(?:>\s?)+(?!\s*\d)")
HARD_BREAK = re.compile(r"(?:(?<! ) {2,}|\\)$")
TERMINATED = re.compile(r"[.!?…][\"'”’)\]*_]*$")
WORDS = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")

EMPHASIS = re.compile(
    r"(?<![\w*^])(?P<star>\*{1,3})(?=[^\s*])(?P<a>[^*\n]*[^*\s])(?P=star)(?!\*)"
    r"|(?<![\w}\])])(?P<bar>_{1,3})(?=[^\s_])(?P<b>[^_\n]*[^_\s])(?P=bar)(?![\w{])"
    r"|(?P<wave>~~)(?=\S)(?P<c>[^~\n]*[^~\s])(?P=wave)"
    r"|(?P<tick>`{1,2})(?=\S)(?P<d>[^`\n]*[^`\s])(?P=tick)"
)
TIDY = (
    (re.compile(r"\\([*_#`.+-])"), r"\1"),
    (re.compile(r"([(\[])\s+|(?<!\s)\s+(?=[)\]])"), r"\1"),
    (re.compile(r"(?<!\w)\(\)|\[\](?!\w)"), ""),
    (re.compile(r"(?<!\s)\s+(?=[,.;:!?]+(?:\s|$|[)\]”’]))"), ""),
    (re.compile(r",(?:\s*,)+"), ","),
    (re.compile(r"^[,;:](?:\s+|$)"), ""),
)
NESTED_MARKS = 8
"""Marks of emphasis around one another that are taken away."""

TAIL = 100
"""Characters at the end of a line that tell how it ends, and with which word."""

LONGEST_HEADING = 400
"""Characters in an underlined heading."""


def clean(text: str, dropped: Dropped) -> list[Paragraph]:
    """The paragraphs of a chapter; what was taken out is added to `dropped`."""
    text = _without_licence(text.replace("\r\n", "\n").replace("\r", "\n"), dropped)
    text = ENTITY.sub(lambda entity: html.unescape(entity[0]), _without_html(text, dropped))
    text = _without_links(_take_out(IMAGES, IMAGE, text.translate(CHARACTERS), dropped, ""))
    text = _take_out(MEDIA_POINTER, MEDIA, text, dropped, "")
    text = GLUED_SECTION.sub(r"\n\n# \1", GLUED_HEADING.sub(r"\n\n\1", text))
    text = INNER_BULLET.sub("  \n• ", _without_kinds(text, dropped))
    assembly = _Assembly(text, dropped)
    tidied = ([_tidy("".join(line)) for line in lines] for lines in assembly.paragraphs)
    return [lines for paragraph in tidied if (lines := [line for line in paragraph if line])]


def _take_out(pattern: re.Pattern, reason: str, text: str, dropped: Dropped, left: str) -> str:
    def note(match: re.Match) -> str:
        dropped[reason].append(match[0])
        return left

    return pattern.sub(note, text)


def _without_kinds(text: str, dropped: Dropped) -> str:
    def number(match: re.Match) -> str:
        alone = match[3] is not None
        dropped[HEADING].append(match[0] if alone else match[2])
        return "" if alone else match[1]

    return EXERCISE_KIND.sub(number, text)


def _without_licence(text: str, dropped: Dropped) -> str:
    end = BOOK_END.search(text)
    stop = end.start() if end else len(text)
    start = max((match.end() for match in LICENCE_END.finditer(text, 0, stop)), default=0)
    for part in filter(None, (text[:start], text[stop:])):
        dropped[LICENCE].append(part)
    return text[start:stop]


def _without_html(text: str, dropped: Dropped) -> str:
    for opening, closing in HTML_HIDDEN:
        text = _replace(text, ((r.start, r.end, "") for r in _regions(text, opening, closing)))
    text = _without_closed_tables(text, dropped)
    text = OPEN_TABLE.sub(lambda table: _prose_of_table(HTML_CELL.split(table[0]), dropped), text)
    text = HTML_BREAK.sub("  \n", text)
    for opening, closing in HTML_HEADINGS:
        found = _regions(text, opening, closing, "\n")
        text = _replace(text, ((r.start, r.end, f"\n\n# {r.inner}\n\n") for r in found))
    return HTML_INLINE.sub("", HTML_BLOCK.sub("\n\n", text))


class _Region(NamedTuple):
    """A piece of a text between two tags, and where it begins and ends with them."""

    start: int
    inner: str
    end: int


def _regions(
    text: str, opening: re.Pattern, closing: re.Pattern, stop: str = ""
) -> Iterator[_Region]:
    """From each opening tag to the next closing one, up to `stop` at most."""
    at = 0
    while opened := opening.search(text, at):
        end = text.find(stop, opened.end()) if stop else -1
        end = len(text) if end < 0 else end
        closed = closing.search(text, opened.end(), end)
        if closed:
            yield _Region(opened.start(), text[opened.end() : closed.start()], closed.end())
        at = closed.end() if closed else end  # without a closing tag, none after it has one


def _replace(text: str, pieces: Iterable[tuple[int, int, str]]) -> str:
    """Replace pieces of a text, given by where they begin and end, with other words."""
    parts, at = [], 0
    for start, end, instead in pieces:
        parts += [text[at:start], instead]
        at = end
    return "".join([*parts, text[at:]])


def _without_closed_tables(text: str, dropped: Dropped) -> str:
    opened: list[int] = []
    tables: list[tuple[int, int]] = []
    for tag in TABLE_TAG.finditer(text):
        if tag[1]:
            opened.append(tag.start())
        elif opened:
            start = opened.pop()
            while tables and tables[-1][0] > start:
                tables.pop()  # within this one
            tables.append((start, tag.end()))
    found = ((a, b, _prose_of_table(HTML_CELL.split(text[a:b]), dropped)) for a, b in tables)
    return _replace(text, found)


def _prose_of_table(cells: list[str], dropped: Dropped) -> str:
    """The cells of a table that are prose, one paragraph each; the rest is dropped."""
    texts = [" ".join(TAG.sub(" ", cell).split()) for cell in cells]
    prose = list(map(_is_prose_cell, texts))
    dropped[TABLE].append(
        "".join(cell for cell, kept in zip(cells, prose, strict=True) if not kept)
    )
    kept = [text for text, kept in zip(texts, prose, strict=True) if kept]
    return "\n\n".join(["", *kept, ""]) if kept else "\n\n"


def _without_links(text: str) -> str:
    defined = {name.casefold() for name in DEFINITION.findall(text)}

    def label(link: re.Match) -> str:
        return link[1] if (link[2] or link[1]).casefold() in defined else link[0]

    return FOOTNOTE.sub("", REFERENCE.sub(label, LINK.sub(r"\1", text)))


def _without_tables(lines: list[str], dropped: Dropped) -> Iterator[str]:
    for piped, run in groupby(lines, key=lambda line: "|" in line):
        rows = list(run)
        if piped and (any(map(_is_rule, rows)) or all(map(_is_row, rows))):
            cells = MARKDOWN_CELL.split("\n".join(rows))
            yield from _prose_of_table(cells, dropped).split("\n")
        else:
            yield from rows


def _is_rule(line: str) -> bool:
    return bool(TABLE_RULE.match(line.strip()))


def _is_row(line: str) -> bool:
    row = line.strip()
    return row.startswith("|") and row.endswith("|") and row.count("|") > 2


class _Assembly:
    """Joins the lines of a chapter into paragraphs."""

    def __init__(self, text: str, dropped: Dropped) -> None:
        self.paragraphs: list[list[Line]] = []
        self._dropped = dropped
        self._words = set(WORDS.findall(text.casefold()))
        self._current: list[Line] | None = None  # the paragraph that the next line belongs to
        self._broken: list[Line] | None = None  # the one that the next paragraph may continue
        self._wrapped = False  # whether the line before runs on into the next
        self._lines = list(_without_tables(text.split("\n"), dropped))
        self._running = _running_headers(self._lines)
        for number in range(len(self._lines)):
            self._read(number)

    def _read(self, number: int) -> None:
        raw = self._lines[number]
        line = QUOTATION.sub("", raw.strip())
        if not line:
            self._current, self._wrapped = None, False
        elif heading := HEADING_LINE.match(line):
            self._head(heading[1] or "", number)
        elif UNDERLINE.match(line) and self._is_underlined():
            self._head("".join(self.paragraphs.pop()[0]), number)
        elif reason := self._furniture(line, number):
            self._dropped[reason].append(line)
        else:
            self._add(line)
            self._wrapped = not HARD_BREAK.search(raw)

    def _is_underlined(self) -> bool:
        """Whether the line before the underline is a heading."""
        current = self._current
        if not current or current is not self.paragraphs[-1] or len(current) > 1:
            return False
        line = current[0]
        if len(line) > 24 or sum(map(len, line)) > LONGEST_HEADING:
            return False
        return _is_open(line[-1]) and len("".join(line).split()) <= 12

    def _furniture(self, line: str, number: int) -> str | None:
        """Why the line is not prose; None if it is."""
        if not any(map(str.isalnum, line)) or FENCE.match(line) or DEFINITION.match(line):
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
        return not any(map(str.strip, self._lines[number + 1 : number + 2]))

    def _runs_on(self) -> bool:
        """Whether the next line is in the middle of a sentence."""
        return self._wrapped and self._current is not None and _is_open(self._current[-1][-1])

    def _head(self, heading: str, number: int) -> None:
        after = (self._lines[at] for at in range(number + 1, len(self._lines)))
        following = next(filter(str.strip, after), "").strip()
        prose = _prose_in_heading(heading, following)
        if head := heading.removesuffix(prose).strip():
            self._dropped[HEADING].append(head)
        self._current, self._broken = None, None
        if prose:
            self._add(prose)
            self._wrapped = True

    def _add(self, line: str) -> None:
        caption = CAPTION.match(line)
        if self._current is None or (caption and not self._runs_on()):
            self._start(line, is_caption=bool(caption))
            return
        last = self._current[-1]
        item = LIST_ITEM.match(line) or (NUMBERED.match(line) and not _is_open(last[-1]))
        if not item and (self._wrapped or _is_hyphenated(last[-1], line)):
            self._glue(last, line)
        else:
            self._current.append([line])

    def _start(self, line: str, is_caption: bool) -> None:
        if is_caption:
            self._current = [[line]]
            self.paragraphs.append(self._current)
            return
        head, rest = _split_capitals(line)
        if any(word[0].islower() for word in rest.split()):
            self._dropped[HEADING].append(head)
            line = rest
        if self._broken and _goes_on(self._broken, line):
            self._glue(self._broken[-1], line)
        else:
            self._broken = [[line]]
            self.paragraphs.append(self._broken)
        self._current = self._broken

    def _glue(self, line: Line, right: str) -> None:
        """Put `right` at the end of a line, a hyphenated word restored."""
        left = line.pop()
        if not _is_hyphenated(left, right):
            line += [HARD_BREAK.sub("", left), " ", right]
            return
        words = WORDS.findall(left[-TAIL:])[-1:] + WORDS.findall(right[:TAIL])[:1]
        parted, joined = "-".join(words).casefold(), "".join(words).casefold()
        keeps = left[-2].isdigit() or (parted in self._words and joined not in self._words)
        left = left if keeps else left[:-1]
        if len(left) > TAIL:
            line.append(left[:-TAIL])
        line.append(left[-TAIL:] + right)  # the last piece has the whole word


def _is_sentence(text: str) -> bool:
    return text.endswith(".") and len(text.split()) >= 8


def _running_headers(lines: list[str]) -> set[str]:
    counts = Counter(_without_page(line) for line in lines if _may_run(line.strip()))
    return {line for line, count in counts.items() if count >= 3}


def _may_run(line: str) -> bool:
    text = PAGE_AT_EDGE.sub("", line)
    return text[:1].isupper() and text[-1] not in ".!?…,;:" and len(text.split()) <= 8


def _without_page(line: str) -> str:
    return PAGE_AT_EDGE.sub("", line.strip()).casefold()


def _prose_in_heading(heading: str, following: str) -> str:
    """The part of a heading that is prose: all, its end, or nothing."""
    words = heading.split()
    if BARE_CAPTION.match(heading):
        return ""
    if CAPTION.match(heading) or _is_sentence(heading) or _is_entry(words):
        return heading
    _, rest = _split_capitals(heading)
    is_sentence = len(rest.split()) >= 5 and TERMINATED.search(rest)
    return rest if is_sentence or following[:1].islower() else ""


def _is_entry(words: list[str]) -> bool:
    """Whether the words are a glossary entry, not a heading."""
    return len(words) >= 5 and words[0][0].islower() and _lower_share(words) > 0.6


def _is_prose_cell(text: str) -> bool:
    words = text.split()
    return len(words) >= 8 and (text.endswith(".") or _lower_share(words) >= 0.8)


def _lower_share(words: list[str]) -> float:
    """The share of words that begin in lower case."""
    return sum(word[0].islower() for word in words) / len(words)


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


def _goes_on(paragraph: list[Line], line: str) -> bool:
    """Whether the line continues a paragraph that a page or a formula broke."""
    return _is_open(paragraph[-1][-1]) and _is_lower(line) and not _is_lower(paragraph[0][0])


def _is_open(line: str) -> bool:
    return not TERMINATED.search(line[-TAIL:])


def _is_lower(line: str) -> bool:
    return line[:TAIL].lstrip("*_")[:1].islower()


def _is_hyphenated(left: str, right: str) -> bool:
    return left[-1:] == "-" and left[-2:-1].isalnum() and right[:1].islower()


def _tidy(line: str) -> str:
    line = " ".join(LIST_ITEM.sub("", HARD_BREAK.sub("", line)).split())
    for _ in range(NESTED_MARKS):
        if (plain := EMPHASIS.sub(_emphasised, line)) == line:
            break
        line = plain
    for pattern, replacement in TIDY:
        line = pattern.sub(replacement, line)
    return " ".join(line.split())


def _emphasised(match: re.Match) -> str:
    return next(filter(None, match.group("a", "b", "c", "d")))
