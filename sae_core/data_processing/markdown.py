"""The Markdown parser, set up for chapters that a conversion or a person wrote.

CommonMark with tables, strikethrough, footnotes and LaTeX, and these differences:

* Indented text is no code, and a list's items are lines of text with their marks: conversions
  indent at will, and have bullets that Markdown does not know.
* A fence, a comment or a script that is not closed is text. By the standard it takes the rest of
  the chapter.
* HTML is inline, so that the text between the tags is Markdown too. Comments, scripts, styles and
  preformatted text are blocks, across blank lines.
* A link's definition names an address: "[Ann]: Yes" is what Ann says.

Everything takes time in proportion to the text, as the parser's own rules do.
"""

import re
from bisect import bisect_right
from collections.abc import MutableMapping
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock, fence, reference
from markdown_it.token import Token
from mdit_py_plugins.footnote import footnote_plugin

from sae_core.data_processing.formulas import ENDS, formulas

DEFINITION = re.compile(
    r" {0,3}\[[^\]^\n]+\]: +(?:<|https?:|mailto:|[./#]|\S+\.(?:html?|md|png|jpe?g|pdf)\b)"
)
SPECIAL = re.compile(r"[\\`*_\[<&$~\n]")
"""What can begin something else than text in a paragraph."""

HIDDEN = [
    (re.compile(opening, re.IGNORECASE), re.compile(closing, re.IGNORECASE))
    for opening, closing in (
        ("<!--", "-->"),
        (r"<script\b", r"</script\s*>"),
        (r"<style\b", r"</style\s*>"),
        (r"<pre\b", r"</pre\s*>"),
        (r"<\?", r"\?>"),
        (r"<!\[CDATA\[", r"\]\]>"),
    )
]

DEEPEST, DEEPEST_IN_A_LINE = 100, 20
"""Quotations in quotations, whose text is lost beyond, and brackets in brackets, which are text."""

Environment = MutableMapping[str, Any]
"""What the parser knows of a chapter: its links' definitions, and what it looked for in vain."""


class _Parser(MarkdownIt):
    """Leaves addresses as they are: they are dropped, or were none."""

    def normalizeLink(self, url: str) -> str:
        return url

    def validateLink(self, url: str) -> bool:
        return True


def _parser(deepest: int) -> MarkdownIt:
    parser = _Parser("commonmark", {"maxNesting": deepest}).enable(["table", "strikethrough"])
    parser.use(footnote_plugin, inline=False, move_to_end=False).use(formulas)
    parser.disable(["code", "list", "html_block", "footnote_ref"])
    parser.core.ruler.disable(["inline", "text_join"])  # see `inline_tokens`
    parser.block.ruler.at("fence", _closed_fence, ENDS)
    parser.block.ruler.at("reference", _definition)
    parser.block.ruler.before("fence", "hidden", _hidden, ENDS)
    return parser


def blocks_of(text: str) -> tuple[list[Token], Environment]:
    """The blocks of a chapter, their content unread, and what `inline_tokens` needs to read it."""
    known: Environment = {}
    return BLOCKS.parse(text, known), known


def inline_tokens(content: str, known: Environment) -> list[Token]:
    """The tokens of a paragraph's content."""
    if not SPECIAL.search(content):
        return [Token("text", "", 0, content=content)]  # as the parser would, in less time
    tokens: list[Token] = []
    INLINE.inline.parse(content, INLINE, {"references": known.get("references", {})}, tokens)
    return tokens


def _line(state: StateBlock, number: int) -> str:
    return state.src[state.bMarks[number] + state.tShift[number] : state.eMarks[number]]


def _definition(state: StateBlock, first: int, end: int, silent: bool) -> bool:
    if not DEFINITION.match(_line(state, first)) or not reference(state, first, end, silent):
        return False
    if not silent:
        found = [_line(state, number) for number in range(first, state.line)]
        state.env.setdefault("definitions", []).extend(found)
    return True


def _closed_fence(state: StateBlock, first: int, end: int, silent: bool) -> bool:
    if not fence(state, first, end, True):
        return False
    line = _line(state, first)
    length = len(line) - len(line.lstrip(line[0]))
    # From a fence that is not closed, no longer one of its kind is.
    unclosed = state.env.setdefault("unclosed fences", {})
    if length >= unclosed.get((line[0], end), length + 1):
        return False
    if silent or not fence(state, first, end, False):
        return silent
    last = state.line - 1
    if last > first and not _line(state, last).strip().strip(line[0]):
        return True
    state.tokens.pop()
    state.line = first
    unclosed[line[0], end] = length
    return False


def _hidden(state: StateBlock, first: int, end: int, silent: bool) -> bool:
    begin = state.bMarks[first] + state.tShift[first]
    if state.src[begin : begin + 1] != "<":
        return False
    closing = next((close for opens, close in HIDDEN if opens.match(state.src, begin)), None)
    missing = state.env.setdefault("not closed", set())
    if closing is None or (closing, end) in missing:
        return False
    found = closing.search(state.src, begin, state.eMarks[end - 1])
    if found is None:
        missing.add((closing, end))
        return False
    if not silent:
        last = bisect_right(state.bMarks, found.end() - 1, first, end) - 1
        token = state.push("hidden", "", 0)
        token.content = state.src[begin : found.end()]
        token.meta = {"rest": state.src[found.end() : state.eMarks[last]]}
        token.map = [first, last + 1]
        state.line = last + 1
    return True


BLOCKS, INLINE = _parser(DEEPEST), _parser(DEEPEST_IN_A_LINE)
