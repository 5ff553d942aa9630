"""A chapter's blocks in the order of its lines, with the tokens of what they contain."""

import html
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from markdown_it.token import Token

from sae_core.data_processing.conversion import pieces_of
from sae_core.data_processing.counts import FRONT_MATTER, HIDDEN, MARKUP, Counts
from sae_core.data_processing.markdown import blocks_of, inline_tokens

FRONT = re.compile(
    r"\s*(?:---[ \t]*\n\s*[\w\"'-][\w\"' .-]*:(?:[ \t].*)?\n(?:.*\n)*?(?:---|\.\.\.)"
    r"|\+\+\+[ \t]*\n\s*[\w\"'[-][\w\"' .\[\]-]*(?:=.*)?\n(?:.*\n)*?\+\+\+)[ \t]*(?:\n|\Z)"
)
"""YAML or TOML at the start: between its marks, the first line is a key."""

PROSE_DIRECTIVE = re.compile(
    r"\{(?:admonition|attention|caution|danger|epigraph|error|exercise|hint|important|margin|note|"
    r"seealso|sidebar|solution|tip|warning)\}"
)
DIRECTIVE_OPTIONS = re.compile(r"\A(?::[\w-]+:.*\n)+")
FENCES_IN_FENCES = 8
NUMBER = re.compile(r"\s*\d")
CELL_MARK = re.compile(r"[|\n]")
TAG = re.compile(r"</?[A-Za-z][^<>]*>")


Kind = Literal["text", "heading", "underlined", "table", "code", "formula"]


@dataclass
class Block:
    """A paragraph, heading, table, listing or formula."""

    kind: Kind

    apart: bool
    """Whether a blank line or another paragraph's end comes before it."""

    tokens: list[Token] = field(default_factory=list)
    """Of text and headings."""

    cells: list[list[Token]] = field(default_factory=list)
    """Of a table, row by row."""

    content: str = ""
    """Of code and formulas."""


def chapter_blocks(text: str, counts: Counts) -> list[Block]:
    """The blocks of a chapter; what is hidden in it, and its front matter, is counted."""
    if front := FRONT.match(text):
        counts.dropped[FRONT_MATTER].append(front[0])
        text = text[front.end() :]
    return _Blocks(text, counts, FENCES_IN_FENCES).found


class _Blocks:
    """Reads the parser's tokens of one text."""

    def __init__(self, text: str, counts: Counts, depth: int) -> None:
        self.found: list[Block] = []
        self._counts, self._depth = counts, depth
        self._lines = text.split("\n")
        self._end, self._apart = 0, False  # the line after the block before; is there a gap since?
        self._cells: list[list[Token]] = []
        self._row_is_text = False
        self._parents: list[Token] = []  # the blocks that are open
        tokens, self._known = blocks_of(text)
        for token in tokens:
            if token.nesting > 0:
                self._open(token)
            elif token.nesting < 0:
                self._close(token)
            else:
                self._leaf(token)
        if definitions := self._known.get("definitions"):
            counts.dropped[MARKUP] += definitions

    def _open(self, token: Token) -> None:
        self._parents.append(token)
        if token.type == "tr_open" and token.map:
            self._row_is_text = "|" not in self._lines[token.map[0]]
        elif token.type == "table_open":
            self._goes_to(token)
        elif token.type == "footnote_reference_open":
            self._apart = True

    def _close(self, token: Token) -> None:
        self._parents.pop()
        if token.type == "table_close":
            self._end_table()
        elif token.type in ("heading_close", "footnote_reference_close"):
            self._apart = True

    def _goes_to(self, token: Token) -> None:
        """Note the block's lines, and whether they stand apart from the block before."""
        start, end = token.map or (self._end, self._end)
        self._apart |= start > self._end
        self._end = max(end, self._end)

    def _add(self, kind: Kind, **what: Any) -> None:
        self.found.append(Block(kind, self._apart, **what))
        self._apart = kind not in ("text", "formula")

    def _leaf(self, token: Token) -> None:
        parent = self._parents[-1] if self._parents else token
        if parent.type in ("th_open", "td_open"):
            self._cell(token)
            return
        self._goes_to(token)
        if token.type == "inline":
            underlined = parent.type == "heading_open" and parent.markup in ("=", "-")
            kind: Kind = "text" if parent.type == "paragraph_open" else "heading"
            self._text(self._quoted(token), "underlined" if underlined else kind)
        elif token.type == "fence":
            self._fence(token)
        elif token.type == "hidden":
            self._hidden(token)
        elif token.type == "formula":
            self._add("formula", content=token.content)
        elif token.type == "hr":
            self._counts.dropped[MARKUP].append(self._lines[self._end - 1].strip())
            self._apart = True

    def _quoted(self, token: Token) -> str:
        """The content; with the mark of a quotation if it is one line, and a number: "> 5 kg"."""
        quotation = next((p for p in self._parents if p.type == "blockquote_open"), None)
        if not quotation or not quotation.map or not NUMBER.match(token.content):
            return token.content
        lines = self._lines[slice(*quotation.map)]
        alone = sum(line.lstrip().startswith(">") for line in lines) == 1
        return f"> {token.content}" if alone else token.content

    def _text(self, content: str, kind: Kind) -> None:
        for piece in pieces_of(content, self._counts):
            if piece.is_table:
                self._apart = True
                cells = CELL_MARK.split(piece.text)
                self._add("table", cells=[inline_tokens(cell, self._known) for cell in cells])
                continue
            if piece.is_heading:
                kind, self._apart = "heading", True
            self._add(kind, tokens=inline_tokens(piece.text, self._known))
            kind = "text"

    def _cell(self, token: Token) -> None:
        if not self._row_is_text:
            self._cells.append(inline_tokens(token.content, self._known))
        elif token.content:
            self._end_table()
            self._text(token.content, "text")

    def _end_table(self) -> None:
        self._apart = True
        if self._cells:
            self._add("table", cells=self._cells)
        self._cells = []

    def _fence(self, token: Token) -> None:
        name = token.info.strip()
        if name == "{math}":
            self._add("formula", content=token.content.strip())
        elif self._depth and PROSE_DIRECTIVE.match(name):
            content = DIRECTIVE_OPTIONS.sub("", token.content)
            self._apart = True
            self.found.append(Block("text", True))
            self.found += _Blocks(content, self._counts, self._depth - 1).found
        else:
            self._add("code", content=token.content.rstrip())

    def _hidden(self, token: Token) -> None:
        if token.content[:4].lower() == "<pre":
            self._add("code", content=html.unescape(TAG.sub("", token.content)).strip("\n"))
        else:
            self._counts.dropped[HIDDEN].append(token.content)
        if rest := token.meta["rest"].strip():
            self._text(rest, "text")
