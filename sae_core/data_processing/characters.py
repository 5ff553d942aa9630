"""Characters: which go, which stay, and what counts as a word in which script.

Invisible characters that a conversion leaves go. Joiners stay where they carry meaning: after a
letter of a script that joins letters (Persian, Hindi), and in emoji. Scripts that are written
without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan) have no words to count, so
that each of their characters counts as one.
"""

import re
import unicodedata

from sae_core.data_processing.counts import INVISIBLE, LIGATURE, Counts

INDIC = "".join(
    f"{chr(block)}-{chr(block + 3)}{chr(block + 0x3A)}-{chr(block + 0x57)}"
    f"{chr(block + 0x62)}{chr(block + 0x63)}"
    for block in range(0x900, 0xE00, 0x80)
)
MARKS = re.compile(
    "[\u0300-\u036f\u0483-\u0489\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed\u200c"
    f"\u200d{INDIC}]"
)
"""Signs that belong to the letter before them; Python does not take them for letters."""

UNSPACED = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ece\u0f40-\u0fbc\u1000-\u103f\u1050-\u109f\u1780-\u17d3"
    "\u3005-\u3007\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff"
)
"""Letters of scripts without spaces, for a class of a regular expression."""

UNSPACED_LETTER = re.compile(f"[{UNSPACED}]")
NO_SPACE_BETWEEN = re.compile(f"[{UNSPACED}\u3001-\u3030\uff01-\uff65]")
LONG_WORD = re.compile(r"[^\W\d_]{2,}")

JOINS = (
    "\u0600-\u109f\u1780-\u18af\u1b00-\u1c4f\ua800-\ua9ff\uabc0-\uabff\ufb50-\ufdff\ufe70-\ufefc"
    "\U00010a00-\U00011fff\U0001e900-\U0001e95f\ufe0f\u20e3\u2190-\u2bff\U0001f000-\U0001faff"
)
"""What a joiner may follow: letters of scripts that join them, and emoji."""

GONE = re.compile(
    "[\xad\u200b\u2060\ufeff\x00-\x08\x0e-\x1f\x7f]|(?<![" + JOINS + "])[\u200c\u200d]"
)
LIGATURES = re.compile("[\ufb00-\ufb06]")
BREAKS = re.compile("\r\n?|[\v\x85\u2028\f\u2029]")
PARAGRAPH_ENDS = {"\f", "\u2029"}


def tidied(text: str, counts: Counts) -> str:
    """The text with newlines alone as line ends, ligatures as letters, nothing invisible."""
    text = BREAKS.sub(lambda end: "\n\n" if end[0] in PARAGRAPH_ENDS else "\n", text)
    text, gone = GONE.subn("", text)
    if gone:
        counts.repaired[INVISIBLE] += gone
    text, ligatures = LIGATURES.subn(lambda one: unicodedata.normalize("NFKC", one[0]), text)
    if ligatures:
        counts.repaired[LIGATURE] += ligatures
    return text


def count_words(text: str) -> int:
    """Words separated by spaces, and the characters of scripts without spaces."""
    if text.isascii():
        return len(text.split())
    spaced, characters = UNSPACED_LETTER.subn(" ", text)
    words = spaced.split()
    if characters:  # what is left between them is punctuation
        words = [word for word in words if any(map(str.isalnum, word))]
    return characters + len(words)


def count_long_words(text: str) -> int:
    """The same without numbers and words of one letter."""
    if text.isascii():
        return len(LONG_WORD.findall(text))
    spaced, characters = UNSPACED_LETTER.subn(" ", text)
    return characters + len(LONG_WORD.findall(MARKS.sub("a", spaced)))


def joint(left: str, right: str) -> str:
    """What goes between two lines that become one: a space, if the script has spaces."""
    between = NO_SPACE_BETWEEN.fullmatch(left[-1:]) and NO_SPACE_BETWEEN.fullmatch(right[:1])
    return "" if between else " "
