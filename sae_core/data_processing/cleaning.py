"""From one Markdown chapter to paragraphs of prose: pure functions of the text.

What `clean` does, in this order; each step says in `Counts` what it took out or put right:

1.  `cleaning`: Project Gutenberg's header and footer go, the modern and the "small print" ones.
2.  `characters`: line ends become newlines, form feeds paragraph ends; byte-order marks, soft
    hyphens and control characters go, joiners only where they join nothing; ligatures become
    letters. Nothing else is normalised: m² stays m².
3.  `markdown`, `formulas`, `blocks`: the parser finds front matter, headings, paragraphs,
    quotations, tables, fences, footnotes, definitions, comments, scripts and LaTeX.
4.  `conversion`, for each paragraph before its marks are read: pointers to media ("Click to view
    content (https://...)") go; a heading glued to the end of a paragraph ("... works.# Summary",
    "... works.Key Terms") becomes a heading; the kind of an exercise after its number goes ("39.
    Professional Application A car ..."); bullets within a line begin lines.
5.  `lines`: emphasis, links, escapes, entities and tags leave their text; images go, and tables
    but for cells that are prose (eight words or more, a sentence or nearly all in lower case).
    A footnote stays where it is written, as a paragraph. Code and LaTeX are kept, dropped or
    replaced by "[code]" and "[formula]". Code that is kept is a paragraph with its own lines.
6.  `paragraphs`, line by line: what is not prose goes: headings, lines without a letter or digit,
    page numbers, entries of a table of contents ("1.1 Something"), captions that are only "FIGURE
    1.2", and running headers, that is, short lines found three times or more in the chapter.
7.  A heading that is glued to the start of a paragraph goes, the paragraph's words stay: words in
    capitals before the start of a sentence. A heading that is a caption, a sentence of eight words
    or more with its full stop, or mostly words in lower case from the first on, as the entry of a
    glossary is, stays as prose.
8.  The lines of a paragraph (up to a blank line) become one; only a hard line break and list items
    keep their line. Words hyphenated over a line break are joined if the second part begins in
    lower case; the hyphen stays if the chapter elsewhere has the word with it and never without.
9.  A figure's or table's caption starts a separate paragraph and is kept: it is prose.
10. A paragraph that ends without a full stop, and the next that begins in lower case, are one
    paragraph broken by a page, picture, formula or caption, and are joined. Not across a heading,
    and not if the first begins in lower case too: such paragraphs are the entries of a glossary.
    A formula of its own belongs to the sentence around it.
11. Bullets go; runs of spaces, and the punctuation around lost formulas, are tidied.

All of it takes time in proportion to the chapter, whatever the chapter contains: no pattern reads a
run of characters again from each of them, and nothing reads a paragraph again for each line.
"""

import re

from sae_core.data_processing.blocks import chapter_blocks
from sae_core.data_processing.characters import tidied
from sae_core.data_processing.counts import LICENCE, LOST, Counts
from sae_core.data_processing.lines import Settings, chapter_lines
from sae_core.data_processing.paragraphs import LIST_ITEM, Assembly

Paragraph = list[str]
"""The lines of a paragraph: one, or several if it is a list. A listing is one with line breaks."""

LICENCE_END = re.compile(
    r"^[*\\ ]*START OF (?:THE|THIS) PROJECT GUTENBERG[^*\n]*(?:\n[^*\n]+){0,3}\*[*\\ ]*$"
    r"|^.*\*END ?\* ?THE SMALL PRINT.*$",
    re.IGNORECASE | re.MULTILINE,
)
BOOK_END = re.compile(
    r"^[*\\ ]*END OF (?:THE |THIS )?PROJECT GUTENBERG", re.IGNORECASE | re.MULTILINE
)
LOOSE_STRONG = re.compile(r"(?<![0-9A-Za-z*])\*\*(?=[^\s*])([^*\n]*[^*\s])\*\*(?!\*)")
"""Two stars that are none by the standard, which wants no letter after "**Note:**"."""

AT_BRACKETS = re.compile(r"(?<=[(\[]) | (?=[)\]])")
EMPTY_BRACKETS = re.compile(r"(?<!\w)\(\)|\[\](?!\w)")
BEFORE_MARK = re.compile(r" (?=[,.;:!?]+(?:[ )\]”’]|$))")
COMMAS = re.compile(r",(?: ?,)+")
FIRST_MARK = re.compile(r"[,;:](?: |$)")

AS_IT_IS = Settings()


def clean(text: str, counts: Counts, settings: Settings = AS_IT_IS) -> list[Paragraph]:
    """The paragraphs of a chapter; what was taken out and put right is added to `counts`."""
    text = tidied(_without_licence(text.replace("\r\n", "\n").replace("\r", "\n"), counts), counts)
    assembly = Assembly(chapter_lines(chapter_blocks(text, counts), settings, counts), counts)
    found = []
    for number, paragraph in enumerate(assembly.paragraphs):
        lines = ["".join(line) for line in paragraph]
        if number not in assembly.listings:
            lines = [line for line in (_tidy(line, counts) for line in lines) if line]
        if lines:
            found.append(lines)
    return found


def _without_licence(text: str, counts: Counts) -> str:
    end = BOOK_END.search(text)
    stop = end.start() if end else len(text)
    start = max((match.end() for match in LICENCE_END.finditer(text, 0, stop)), default=0)
    for part in filter(None, (text[:start], text[stop:])):
        counts.dropped[LICENCE].append(part)
    return text[start:stop]


def _tidy(line: str, counts: Counts) -> str:
    line = " ".join(LIST_ITEM.sub("", line).split())
    if "**" in line:
        line = LOOSE_STRONG.sub(r"\1", line)
    line, brackets = AT_BRACKETS.subn("", line)
    line, empty = EMPTY_BRACKETS.subn("", line)
    if empty:
        line = " ".join(line.split())
    line, marks = BEFORE_MARK.subn("", line)
    line, commas = COMMAS.subn(",", line)
    if first := FIRST_MARK.match(line):
        line = line[first.end() :]
    if repairs := brackets + empty + marks + commas + bool(first):
        counts.repaired[LOST] += repairs
    return line.strip()
