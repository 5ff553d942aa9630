"""Processing takes time in proportion to its input: doubled inputs, counted in steps of the regular
expressions, in characters that are given to them, and in lines of Python, not in seconds."""

import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from regex_steps import Steps

from sae_core.corpus.repetition import overlap
from sae_core.data_processing import (
    blocks,
    characters,
    cleaning,
    conversion,
    formulas,
    html_tags,
    lines,
    markdown,
    paragraphs,
    textbook_process,
)
from sae_core.data_processing.cleaning import clean
from sae_core.data_processing.counts import Counts
from sae_core.data_processing.textbook_process import sentences

MODULES = (
    *(blocks, characters, cleaning, conversion, formulas, html_tags, lines, markdown, paragraphs),
    textbook_process,
)

AT_START = {
    *("AFTER", "BARE_CAPTION", "CAPTION", "DEFINITION", "ENVIRONMENT", "FIRST_MARK", "FRONT"),
    *("HEADING_LINE", "LIST_ITEM", "NAME", "NUMBER", "NUMBERED", "OUTLINE_ENTRY", "PAGE_NUMBER"),
    *("PROSE_DIRECTIVE", "TABLE_RULE", "TEMPLATE", "UNCLOSED_FENCE"),
    *(f"HIDDEN[{number}][0]" for number in range(9)),
}
"""Patterns that are matched with the start of a line, and not looked for in it."""

WORDS = {"CAPITALS", "INITIALS", "NO_SPACE_BETWEEN"}
"""Patterns that are matched with whole words."""

PIECES = (
    *(" ", "\n", " \n", "#", "# ", "*", "*a ", "_", "`", "~", "|", "|-", "-", ".", ". ", ",", "()"),
    *("(", ")", "![", "![a](", "[", "[^", "[a](", "[a][", "[a\n", "<table", "<p ", "<p a=", "<br"),
    *("<!--", "<h1>", "&", "&#1", ">", "A", "a", "É", "1", "1.", "a-", "”", "\t", "e.g. ", "(x)"),
    "START OF THE PROJECT GUTENBERG\n",
)
BEFORE = ("", "a", "# ", "<p a=")
AFTER = "1<"


def patterns(name: str, value: Any) -> Iterator[tuple[str, re.Pattern[str]]]:
    if isinstance(value, re.Pattern):
        yield name, value
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from patterns(f"{name}[{number}]", item)


PATTERNS = {
    name: pattern
    for module in MODULES
    for variable, value in vars(module).items()
    for name, pattern in patterns(variable, value)
}


def steps(name: str, text: str) -> int:
    counted = Steps(PATTERNS[name], text)
    if name in AT_START | WORDS:
        counted.match(whole=name in WORDS)
    else:
        counted.find_all()
    return counted.count


@pytest.mark.parametrize("name", PATTERNS)
def test_twice_the_run_takes_twice_the_steps(name: str) -> None:
    for piece in PIECES:
        for before in BEFORE:
            once, twice = (steps(name, before + piece * n + AFTER) for n in (9, 18))
            assert twice < 2.5 * once + 20, (before, piece, once, twice)


def test_the_steps_show_a_pattern_that_is_slow() -> None:
    slow = re.compile(r"\s+\d$")
    counts = [Steps(slow, "a" + " " * n + "b") for n in (12, 24)]
    assert [counted.find_all() for counted in counts] == [[], []]
    assert counts[1].count > 3 * counts[0].count


class Reads:
    """A pattern that counts the characters it is given to read."""

    total = 0

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self.pattern = pattern

    def __getattr__(self, method: str) -> Any:
        def counted(*arguments: Any) -> Any:
            found = getattr(self.pattern, method)(*arguments)
            if method in ("sub", "subn"):
                Reads.total += len(arguments[-1])
            elif len(arguments) == 1:
                Reads.total += len(arguments[0])
            elif method in ("search", "match"):
                # From where the last one ended, up to what is found or an end that may be given.
                text, start, *stop = arguments
                end = stop[0] if stop else len(text)
                Reads.total += found.end() if found else end if method == "search" else start
                Reads.total -= start
            return found

        return counted


LINE = "The force that acts on the body is the mass times the acceleration"
CHAPTERS = {
    "lines without a blank one": f"{LINE}\n",
    "lines that end in a hyphen": "well-\n",
    "paragraphs that go on": f"the {LINE[3:]}\n\n",
    "headings": "# On stars\n",
    "outline entries after a paragraph": "1.1 On Stars\n",
    "rules after a paragraph": "---\n",
    "captions": "FIGURE 1.2 A star.\n",
    "abbreviations": "e.g. A ",
    "tables in tables": "<table>",
    "comments that do not end": "<!-- ",
    "headings that do not end": "<h1>",
    "marks around marks": "*_",
    "formulas that do not end": "$$a\n\n",
    "dollars": "$1 ",
    "fences that do not end": "```a\n\n",
    "footnotes": "[^a]: b\n",
    "tags": "<b>",
    "Chinese": "细胞。",
}


@pytest.mark.parametrize("piece", CHAPTERS.values(), ids=CHAPTERS.keys())
def test_twice_the_chapter_is_read_twice_as_much(
    piece: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(value: Any) -> Any:
        if isinstance(value, re.Pattern):
            return Reads(value)
        return tuple(map(counted, value)) if isinstance(value, (list, tuple)) else value

    for module in MODULES:
        for name in {name.partition("[")[0] for name in PATTERNS} & set(vars(module)):
            monkeypatch.setattr(module, name, counted(getattr(module, name)))
    totals = []
    for n in (200, 400):
        Reads.total = 0
        paragraphs = clean("A paragraph of many words " + LINE * n + "\n" + piece * n, Counts())
        for line in (line for paragraph in paragraphs for line in paragraph):
            list(sentences(line))
        totals.append(Reads.total)
    assert totals[1] < 2.2 * totals[0]


def lines_run(work: Callable[[], object]) -> int:
    """How many lines of Python some work takes, those of libraries among them."""
    count = 0

    def trace(*_: Any) -> Any:
        nonlocal count
        count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


MARKDOWN = (
    *("[", "![", "*a ", "*_", "a**b", "`a``b```", "~~a", "<", "<!-- ", "<a b=", "&#", "\\", "\\("),
    *("$", "$ ", "$a$1 ", "$$a\n", "$$a\n\n", "\\[a\n", "\\begin{align}\n", "[a](", "[a][", "[^a]"),
    *("[^a]: b\n", "[a]: /b\n", "> ", ">", "> a\n", "a\n", "a | b\n", "| a |\n|--|\n", "a\n---\n"),
    *("```\n", "~~~a\n", "```a\n\n~~~a\n\n", "<!--\n", "<script>\n\n", "<pre>\n", "<table><td>"),
    *("</table>", "<table>\n\n", "<h1>a\n", "# a\n", "a.# B\n", "a.Summary\n", "a • b ", "a-\n"),
    *("FIGURE 1\n", "the a\n\n", "```{note}\na\n```\n", "---\n", "<b c=d>e</b> ", "\\*", "细"),
)


@pytest.mark.parametrize("piece", MARKDOWN)
def test_twice_the_markdown_takes_twice_the_lines_of_python(piece: str) -> None:
    texts = ("x " + piece * n + "\n\nend" for n in (0, 40, 80))
    none, once, twice = (lines_run(partial(clean, text, Counts())) for text in texts)
    assert twice - once < 1.5 * (once - none) + 400


def test_texts_that_begin_alike_are_not_read_character_by_character() -> None:
    licence = "This text is in the public domain. "
    texts = [licence + f"{word} " * 1000 for word in ("one", "two")]
    assert lines_run(lambda: overlap(*texts)) < 20
