r"""LaTeX as two rules of the Markdown parser: `$x$`, `$$x$$`, `\(x\)`, `\[x\]`, `\begin{align}`.

A dollar is more often money than the edge of a formula. So what stands between two dollars is a
formula only if it has no space at its edges or within, or if it has a character that LaTeX uses;
and no digit touches the dollars from outside. Conversions of PDF files write `$ { x } $`.
"""

import re

from markdown_it import MarkdownIt
from markdown_it.ruler import RuleOptionsType
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline

ENDS: RuleOptionsType = {"alt": ["paragraph", "reference", "blockquote"]}
"""What a block that needs no blank line before it may end."""

CLOSINGS = {"$$": "$$", "$": "$", "\\(": "\\)", "\\[": "\\]"}
LATEX = re.compile(r"[\\^_={}+<>]")
DOLLAR = re.compile(r"(?<!\\)\$")
ENVIRONMENT = re.compile(
    r"\\begin\{((?:equation|align|alignat|gather|multline|flalign|eqnarray|displaymath|math)\*?)\}"
)
AFTER = re.compile(r"[.,;]?(?:\([^()]*\)|\{#[^{}]*\})?[.,;]?$")
"""What may follow a display on its last line, spaces apart: a full stop, a number, a label."""


def formulas(parser: MarkdownIt) -> None:
    """The plugin. Tokens of both rules have the type `formula`, and `content` with the marks."""
    parser.inline.ruler.before("escape", "formula", _inline)
    parser.block.ruler.before("fence", "formula", _display, ENDS)


def _inline(state: StateInline, silent: bool) -> bool:
    source, start = state.src, state.pos
    if source[start] not in "$\\":
        return False
    opening = source[start : start + 2]
    if opening not in CLOSINGS:
        opening = source[start]
    closing = CLOSINGS.get(opening)
    if closing is None:
        return False
    content_end = _find(state, closing, start + len(opening))
    end = content_end + len(closing)
    if content_end < 0 or end > state.posMax or not _is_formula(source, start, opening, end):
        return False
    if not silent:
        state.push("formula", "", 0).content = source[start:end]
    state.pos = end
    return True


def _find(state: StateInline, closing: str, start: int) -> int:
    """Where the closing mark is, or -1. That there is none is found once for a text."""
    missing = state.env.setdefault("no closing mark", set())
    if closing in missing:
        return -1
    if closing == "$":
        found = DOLLAR.search(state.src, start)
        at = found.start() if found else -1
    else:
        at = state.src.find(closing, start)
    if at < 0:
        missing.add(closing)
    return at


def _is_formula(source: str, start: int, opening: str, end: int) -> bool:
    content = source[start + len(opening) : end - len(opening)]
    inner = content.strip()
    if opening == "$":
        before, after = source[max(0, start - 1) : start], source[end : end + 1]
        if before.isalnum() or after.isdigit():
            return False
        return bool(inner) and (" " not in inner or bool(LATEX.search(inner)))
    if opening == "$$":
        return bool(inner)
    return bool(LATEX.search(inner)) or (opening == "\\(" and 0 < len(inner) <= 2)


def _display(state: StateBlock, first: int, end: int, silent: bool) -> bool:
    begin = state.bMarks[first] + state.tShift[first]
    opening, closing = _opening(state.src, begin)
    if not opening:
        return False
    # Lines up to which the closing mark was looked for in vain: not to look again from each line.
    missing = state.env.setdefault("no display", {})
    if first < missing.get(closing, 0):
        return False
    at, last = begin + len(opening), first
    while True:
        found = state.src.find(closing, at, state.eMarks[last])
        if found >= 0:
            break
        last += 1
        if last >= end or state.isEmpty(last):
            missing[closing] = last
            return False
        at = state.bMarks[last] + state.tShift[last]
    if not AFTER.match("".join(state.src[found + len(closing) : state.eMarks[last]].split())):
        return False
    if not silent:
        token = state.push("formula", "", 0)
        token.content = state.getLines(first, last + 1, state.blkIndent, False).strip()
        token.map = [first, last + 1]
        state.line = last + 1
    return True


def _opening(source: str, begin: int) -> tuple[str, str]:
    for mark in ("$$", "\\["):
        if source.startswith(mark, begin):
            return mark, CLOSINGS[mark]
    if source.startswith("\\begin", begin) and (named := ENVIRONMENT.match(source, begin)):
        return named[0], f"\\end{{{named[1]}}}"
    return "", ""
