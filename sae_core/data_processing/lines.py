"""From blocks to lines of plain text: emphasis, links and tags leave their content.

What is not prose is counted as it goes: images, tables, comments; code and formulas as their
settings say.
"""

import re
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from markdown_it.token import Token

from sae_core.data_processing import html_tags
from sae_core.data_processing.blocks import Block
from sae_core.data_processing.characters import count_words
from sae_core.data_processing.counts import (
    CODE,
    FOOTNOTE_MARK,
    FORMULA,
    HIDDEN,
    IMAGE,
    TABLE,
    Counts,
)
from sae_core.data_processing.process_config import Treatment

PLACEHOLDERS = {CODE: "[code]", FORMULA: "[formula]"}

FOOTNOTE = re.compile(r"\[\^[^\[\]\s]+\]:?")
ADDRESS = re.compile(r"[/.#:@]")
TERMINATED = re.compile(r"[.!?…。！？।॥؟۔][\"'”’)\]」』_*]*$")
TAIL = 100
"""Characters at the end of a line that tell how it ends, and with which word."""

LONGEST_HEADING = 400
"""Characters in an underlined heading."""

LineKind = Literal["text", "heading", "blank", "inset", "code"]


class Line(NamedTuple):
    """A line of plain text. A heading is one line, and so is a listing, and an inset: a formula or
    placeholder between the paragraphs of the sentence that it belongs to."""

    text: str
    kind: LineKind = "text"

    wraps: bool = True
    """Whether the next line goes on with it: no hard break follows."""


BLANK = Line("", "blank")


class Settings(NamedTuple):
    """What becomes of what is neither prose nor layout."""

    code: Treatment = "keep"
    latex: Treatment = "keep"


def chapter_lines(blocks: list[Block], settings: Settings, counts: Counts) -> list[Line]:
    """The lines of a chapter's blocks, blank ones between those that stand apart."""
    return _Lines(blocks, settings, counts).found


def is_open(text: str) -> bool:
    """Whether no sentence ends at the end."""
    return not TERMINATED.search(text[-TAIL:])


def _all_tokens(blocks: list[Block]) -> Iterator[Token]:
    for block in blocks:
        for tokens in (block.tokens, *block.cells):
            yield from tokens


class _Lines:
    """Reads the tokens of a chapter's blocks."""

    def __init__(self, blocks: list[Block], settings: Settings, counts: Counts) -> None:
        self.found: list[Line] = []
        self._settings, self._counts = settings, counts
        self._closed = html_tags.matched(_all_tokens(blocks))
        self._text: list[str] = []  # of the line that is being read
        self._after_break = False  # whether a tag ended the line before
        self._in_heading = False  # of HTML
        self._hiding = ""  # the tag whose content is hidden
        self._tables = 0  # that are open
        self._in_markdown_table = False
        self._ends_with_block = False  # whether the open table is never closed
        self._cells: list[list[str]] = []
        self._marks: list[str] = []  # what the open emphasis and links end with
        self._tokens: list[Token] = []
        self._at = 0
        self._readers: dict[str, Callable[[Token], None]] = {
            "text": self._read_text,
            "text_special": lambda token: self._put(token.content),
            "softbreak": lambda _: self._end_line(),
            "hardbreak": lambda _: self._end_line(wraps=False),
            "code_inline": lambda token: self._put(self._treated(CODE, token.content)),
            "formula": lambda token: self._put(self._treated(FORMULA, token.content)),
            "image": lambda token: self._drop_image(
                f"![{token.content}]({token.attrGet('src') or ''})"
            ),
            "html_inline": self._read_tag,
            "link_open": self._open_link,
            "link_close": lambda _: self._put(self._marks.pop()),
            "em_open": self._open_emphasis,
            "em_close": lambda _: self._put(self._marks.pop()),
        }
        for block in blocks:
            self._read(block)
        self._end_table()

    def _read(self, block: Block) -> None:
        if block.apart:
            self._blank()
        if block.kind == "table":
            self._read_table(block)
        elif block.kind == "code":
            self._read_listing(block.content)
        elif block.kind == "formula":
            self._put(self._treated(FORMULA, " ".join(block.content.split())))
            self._end_line(kind="inset")
        else:
            self._read_text_block(block)

    def _read_text_block(self, block: Block) -> None:
        before = len(self.found)
        self._read_tokens(block.tokens)
        self._end_line(kind="heading" if block.kind == "heading" else "text")
        self._in_heading = False
        if block.kind == "underlined" and _is_heading(self.found[before:]):
            self.found[before] = Line(self.found[before].text, "heading")
        if self._ends_with_block:
            self._end_table()

    def _read_tokens(self, tokens: list[Token]) -> None:
        outer = self._tokens, self._at
        self._tokens = tokens
        for self._at, token in enumerate(tokens):
            if reader := self._readers.get(token.type):
                reader(token)
        self._tokens, self._at = outer

    def _put(self, text: str) -> None:
        if text and not self._hiding:
            (self._cells[-1] if self._tables else self._text).append(text)

    def _end_line(self, wraps: bool = True, kind: LineKind = "text") -> None:
        if self._tables or self._hiding:
            self._put(" ")
            return
        text = "".join(self._text).strip()
        self._text = []
        if text:
            self.found.append(Line(text, "heading" if self._in_heading else kind, wraps))
        elif not self._after_break and kind == "text":
            self._blank()
        self._after_break = False

    def _blank(self) -> None:
        if self.found and self.found[-1] is not BLANK:
            self.found.append(BLANK)

    def _treated(self, reason: str, content: str) -> str:
        """What stands in the text for code or a formula."""
        treatment = self._settings.code if reason == CODE else self._settings.latex
        if treatment == "keep":
            return content
        self._counts.dropped[reason].append(content)
        return PLACEHOLDERS[reason] if treatment == "placeholder" else ""

    def _read_text(self, token: Token) -> None:
        text = token.content
        if "[^" in text:
            self._counts.dropped[FOOTNOTE_MARK] += FOOTNOTE.findall(text)
            text = FOOTNOTE.sub("", text)
        self._put(text)

    def _drop_image(self, image: str) -> None:
        if not self._tables and not self._hiding:
            self._counts.dropped[IMAGE].append(image)

    def _open_link(self, token: Token) -> None:
        address = str(token.attrGet("href") or "")
        label = self._tokens[self._at + 1]
        opens, closes = "", ""
        if address and not ADDRESS.search(address):
            opens, closes = "[", f"]({address})"  # [Fe(CN)6](NO3) is no link
        elif label.content.isdigit() and self._tokens[self._at + 2].type == "link_close":
            opens, closes = "[", "]"  # the number of a source
        self._put(opens)
        self._marks.append(closes)

    def _open_emphasis(self, token: Token) -> None:
        line = self._cells[-1] if self._tables else self._text
        before = line[-1][-1] if line else " "
        is_times = token.markup == "*" and before.isascii() and (before.isalnum() or before == "^")
        self._marks.append("*" if is_times else "")
        self._put(self._marks[-1])

    def _read_tag(self, token: Token) -> None:
        tag = token.content
        name, closing = html_tags.name_of(tag), html_tags.is_closing(tag)
        if self._hiding:
            if closing and name == self._hiding:
                self._hiding = ""
        elif tag[1] in "!?":
            self._counts.dropped[HIDDEN].append(tag)
        elif not name:
            self._put(tag)
        elif name in html_tags.HIDING:
            if id(token) in self._closed and not closing:
                self._counts.dropped[HIDDEN].append(tag)
                self._hiding = name
        elif name == "table" and not self._in_markdown_table:
            self._read_table_tag(closing, id(token) in self._closed)
        elif self._tables:
            if name in ("td", "th", "tr", "table"):
                self._cells.append([])
            elif name == "br" or name in html_tags.BLOCKS:
                self._put(" ")
        else:
            self._read_layout(tag, name, closing)

    def _read_layout(self, tag: str, name: str, closing: bool) -> None:
        if name == "br":
            self._end_line(wraps=False)
            self._after_break = True
        elif name == "img":
            self._drop_image(tag)
        elif name in html_tags.BLOCKS:
            self._end_line()
            self._in_heading = name in html_tags.HEADINGS and not closing
            self._blank()

    def _read_table_tag(self, closing: bool, has_other_half: bool) -> None:
        if closing:
            self._tables -= bool(self._tables)
            if not self._tables:
                self._end_table()
            return
        if not self._tables:
            self._end_line()
        self._tables += 1
        self._cells.append([])
        self._ends_with_block |= not has_other_half

    def _read_table(self, block: Block) -> None:
        self._tables += 1
        self._in_markdown_table = True
        for cell in block.cells:
            self._cells.append([])
            self._read_tokens(cell)
        self._in_markdown_table = False
        self._tables -= 1
        if not self._tables:
            self._end_table()

    def _end_table(self) -> None:
        """Keep the cells that are prose, one paragraph each; without cells, end the paragraph."""
        cells = [" ".join("".join(cell).split()) for cell in self._cells]
        is_table = bool(self._cells)
        self._tables, self._cells, self._ends_with_block = 0, [], False
        self._end_line()
        self._blank()
        if is_table:
            dropped = " ".join(cell for cell in cells if not _is_prose_cell(cell))
            self._counts.dropped[TABLE].append(dropped.strip())
        for cell in filter(_is_prose_cell, cells):
            self.found += [Line(cell), BLANK]

    def _read_listing(self, content: str) -> None:
        if not content.strip():
            return
        code = self._treated(CODE, content)
        if self._tables or self._hiding or self._settings.code != "keep":
            self._put(code)
            self._end_line(kind="inset")
        else:
            self.found += [BLANK, Line(code, "code"), BLANK]


def _is_prose_cell(text: str) -> bool:
    if count_words(text) < 8:
        return False
    return text.endswith((".", "。", "।")) or lower_share(text.split()) >= 0.8


def lower_share(words: list[str]) -> float:
    """The share of words that begin in lower case."""
    return sum(word[0].islower() for word in words) / len(words)


def _is_heading(lines: list[Line]) -> bool:
    """Whether what is underlined is a heading: one short line that is no sentence."""
    if len(lines) != 1 or len(lines[0].text) > LONGEST_HEADING:
        return False
    return is_open(lines[0].text) and len(lines[0].text.split()) <= 12
