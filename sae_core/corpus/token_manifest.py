"""What a folder of tokenised texts holds, as its manifest says."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sae_core.data_processing.sources import Chapter, Dropped, Sources
from sae_core.utils.files import write_file
from sae_core.utils.records import read_record

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class TokenManifest:
    """The contents of a folder of tokenised texts."""

    tokenizer_sha256: str
    """See `tokenizer_sha256`."""
    bos: int | None
    """The token that windows begin with, if any."""
    end_of_text: int
    data_file: str
    """Name of the file, folder or data set that the texts are from."""
    data_sha256: str
    """Of the JSON list of texts; of texts in another form, see `content_sha256`."""
    n_texts: int
    n_tokens: int
    n_empty: int
    """Texts that are blank, and left out."""
    n_spelled: int
    """Texts that spell out a control token, which is read as text."""
    spelled: str | None
    """The first of these control tokens."""
    commit: str | None
    """Of the data set on the Hub."""
    chapters: list[dict[str, Any]] | None
    """Where the texts are from, if that is known: see `Sources`."""
    dropped: dict[str, dict[str, int]]
    """What the processing left out."""
    files: dict[str, str]
    """SHA-256 of each file."""

    def save(self, folder: Path) -> None:
        """Write the manifest as JSON."""
        content = json.dumps(asdict(self), ensure_ascii=False, indent=1)
        write_file(folder / MANIFEST, content + "\n")

    @classmethod
    def load(cls, folder: Path) -> "TokenManifest":
        """Read a folder's manifest.

        Raises:
            SAEError: it is missing or not a manifest.
        """
        return read_record(
            cls, folder / MANIFEST, "manifest of tokenised texts", "tokenise the texts again"
        )

    @property
    def sources(self) -> Sources | None:
        """The chapters of the texts, and what was left out of them."""
        if self.chapters is None:
            return None
        dropped = {reason: Dropped(**what) for reason, what in self.dropped.items()}
        return Sources(tuple(Chapter(**chapter) for chapter in self.chapters), dropped)
