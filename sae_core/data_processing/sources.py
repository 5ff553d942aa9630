"""Where texts come from: a file next to the file of texts, which is a plain list of strings.

For every chapter, in the order of the texts, it has the subject and the number of texts. It also
says what was left out and why, and what was put right. The hash of the file of texts ties the two
files together.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sae_core.utils.errors import SAEError
from sae_core.utils.files import file_sha256, write_file


@dataclass(frozen=True)
class Chapter:
    """One file of chapters."""

    subject: str
    file: str
    """Folder and name."""
    texts: int
    """How many texts it gave."""
    words: int
    """In them."""


@dataclass(frozen=True)
class Dropped:
    """What was left out for one reason."""

    pieces: int
    words: int


@dataclass(frozen=True)
class Sources:
    """The origin of every text."""

    chapters: tuple[Chapter, ...]
    """In the order of the texts."""
    dropped: dict[str, Dropped]
    """By reason."""

    repaired: dict[str, int] = field(default_factory=dict)
    """What the conversion of a PDF file had damaged and cleaning put right: how often each."""

    @property
    def subjects(self) -> list[str]:
        """The subjects, each once, in the order of the texts."""
        return list(dict.fromkeys(chapter.subject for chapter in self.chapters))

    def save(self, texts: Path) -> None:
        """Write the sources of the file `texts`, next to it."""
        content = {"texts_sha256": file_sha256(texts), **asdict(self)}
        write_file(sources_path(texts), json.dumps(content, ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, texts: Path) -> "Sources | None":
        """The sources of the file `texts`, or None if they are not known.

        Raises:
            SAEError: they are damaged, or belong to other texts.
        """
        path = sources_path(texts)
        if not path.exists():
            return None
        try:
            stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            sha256 = stored["texts_sha256"]
            chapters = tuple(Chapter(**chapter) for chapter in stored["chapters"])
            dropped = {reason: Dropped(**what) for reason, what in stored["dropped"].items()}
            repaired = {str(what): int(count) for what, count in stored["repaired"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SAEError(
                f"{path}: not a readable file of sources ({error}); create it again, or delete it "
                "to continue without subjects"
            ) from error
        if sha256 != file_sha256(texts):
            raise SAEError(
                f"{path}: belongs to other texts than {texts.name} has now; create both again, or "
                "delete it to continue without subjects"
            )
        return cls(chapters, dropped, repaired)


def sources_path(texts: Path) -> Path:
    """Where the sources of a file of texts are: `<name>.sources.json` next to `<name>.json`."""
    return texts.with_suffix(".sources.json")
