"""What cleaning took out of a chapter, and what it put right."""

from collections import Counter, defaultdict

LICENCE, FRONT_MATTER, TABLE, IMAGE = "Gutenberg licence", "front matter", "table", "image"
HEADING, HIDDEN, CODE, FORMULA = "heading", "comment or script", "code", "formula"
FOOTNOTE_MARK = "footnote mark"
OUTLINE, RUNNING, PAGE, MARKUP = "outline entry", "running header", "page number", "markup only"
BARE, MEDIA, INVISIBLE = "bare caption", "pointer to media", "invisible character"
SHORT, REPEATED = "too short", "duplicate"

HYPHEN, PAGE_BREAK, LIGATURE = "word parted by a hyphen", "paragraph parted by a page", "ligature"
GLUED, CAPTION_APART, LOST = "glued heading", "caption in a paragraph", "lost formula"
BULLET = "bullet within a line"


class Counts:
    """Pieces that were taken out, and repairs, of one chapter."""

    def __init__(self) -> None:
        self.dropped: defaultdict[str, list[str]] = defaultdict(list)
        """Reason to pieces."""

        self.repaired: Counter[str] = Counter()
        """What was put right, and how often. The text that it concerns is kept."""
