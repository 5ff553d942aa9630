"""What the conversion of a PDF file leaves in a paragraph, put right before Markdown is read."""

import re
from itertools import groupby
from typing import NamedTuple

from sae_core.data_processing.counts import BULLET, GLUED, HEADING, IMAGE, MEDIA, Counts

GLUED_HEADING = re.compile(
    r"(?<=[^\s#\\])(?<!\b[CF])[ \t]*(#{1,6} +(?:[A-Z]|\d+\.\d).{0,120})$", re.MULTILINE
)
GLUED_SECTION = re.compile(
    r"([.!?)\]”])(Key (?:Terms|Equations|Concepts)|Glossary|(?:(?:Section|Chapter) )?Summary|"
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
LOOSE_IMAGE = re.compile(r"!\[[^\[\]]*\](?:\([^()\n\"<> ]* [^()\n\"<>]*\)|\[[^\[\]]*\])")
"""An image that is none by the standard: spaces in its address, or an address nobody gives."""

HEADING_LINE = re.compile(r"#{1,6} ")
INNER_BULLET = re.compile(r"(?<=\S)[ \t]+•[ \t]+")
TABLE_RULE = re.compile(
    r"(?:\|\s*)?:?-{2,}:?\s*(?:\|\s*:?-{2,}:?\s*)+(?:\|\s*)?$|\|\s*:?-+:?\s*\|\s*$"
)


class Piece(NamedTuple):
    """A part of a paragraph."""

    text: str
    is_heading: bool = False
    is_table: bool = False


def pieces_of(content: str, counts: Counts) -> list[Piece]:
    """A paragraph's text in Markdown, repaired; what was glued to it in pieces of its own."""
    if "![" in content:
        content = _without(LOOSE_IMAGE, IMAGE, content, counts)
    headings = 0
    if "#" in content:
        content, headings = GLUED_HEADING.subn(r"\n\n\1\n\n", content)
    content, sections = GLUED_SECTION.subn(r"\1\n\n# \2\n\n", content)
    if headings + sections:
        counts.repaired[GLUED] += headings + sections
    found = []
    for part in content.split("\n\n"):
        if headings + sections and HEADING_LINE.match(part):
            found.append(Piece(part.strip("# \t"), is_heading=True))
        elif part.strip():
            found += _tables_apart(_repaired(part, counts))
    return found


def _without(pattern: re.Pattern[str], reason: str, text: str, counts: Counts) -> str:
    def note(match: re.Match[str]) -> str:
        counts.dropped[reason].append(match[0])
        return ""

    return pattern.sub(note, text)


def _repaired(text: str, counts: Counts) -> str:
    def number(match: re.Match[str]) -> str:
        alone = match[3] is not None
        counts.dropped[HEADING].append(match[0] if alone else match[2])
        return "" if alone else match[1]

    if "content" in text.lower():
        text = _without(MEDIA_POINTER, MEDIA, text, counts)
    text = EXERCISE_KIND.sub(number, text)
    if "•" in text:
        text, bullets = INNER_BULLET.subn("  \n• ", text)
        counts.repaired[BULLET] += bullets
    return text


def _tables_apart(text: str) -> list[Piece]:
    """Tables that are none by the standard: without a line of dashes, or of uneven rows."""
    if "|" not in text:
        return [Piece(text)]
    pieces: list[Piece] = []
    for piped, run in groupby(text.split("\n"), key=lambda line: "|" in line):
        rows = list(run)
        is_table = piped and (any(map(_is_rule, rows)) or all(map(_is_row, rows)))
        if pieces and not is_table and not pieces[-1].is_table:
            pieces[-1] = Piece("\n".join([pieces[-1].text, *rows]))
        else:
            pieces.append(Piece("\n".join(rows), is_table=is_table))
    return pieces


def _is_rule(line: str) -> bool:
    return bool(TABLE_RULE.match(line.strip()))


def _is_row(line: str) -> bool:
    row = line.strip()
    return row.startswith("|") and row.endswith("|") and row.count("|") > 2
