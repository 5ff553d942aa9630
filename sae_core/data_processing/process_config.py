"""How chapters become texts: the settings, which the workflow reads without a Markdown parser."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sae_core.data_processing.chapters import EVERYWHERE, HERE
from sae_core.settings.texts import DEFAULT_DATA_PATH
from sae_core.utils.errors import SAEError
from sae_core.utils.limits import NaturalInt, PositiveInt, Text, check_limits

RAW_DATA = Path("sae_core/data/raw_data")

Treatment = Literal["keep", "drop", "placeholder"]
"""What becomes of something that is not prose."""


@dataclass(frozen=True)
class ProcessConfig:
    """Which chapters to read, and how they become texts."""

    folders: tuple[Path, ...] = (
        RAW_DATA / "physics_chapters",
        RAW_DATA / "chemistry_chapters",
        RAW_DATA / "biology_chapters",
    )
    """Folders of chapters, one per subject; the *.md and *.markdown files of each are read in
    alphabetical order."""

    subjects: tuple[str, ...] = ()
    """Name of each folder's subject; by default the folder's name without `_chapters`."""

    pattern: Text = HERE
    """Which files of a folder are looked at, as a glob pattern: `*` those in the folder itself,
    `**/*` those in its subfolders too, `part_*/*` those in some subfolders. Of these, *.md and
    *.markdown files in any case are chapters; the log names the others."""

    output: Path = DEFAULT_DATA_PATH
    """JSON file to write, a list of texts. `<name>.sources.json` next to it says which chapter and
    subject each text comes from."""

    method: Literal["paragraphs", "sentences", "chunks", "lines"] = "paragraphs"
    """What becomes a text: a paragraph, a sentence, a stretch of a chapter of up to --chunk-size
    characters, or a line of the file (an unwrapped paragraph or a list item)."""

    chunk_size: PositiveInt = 1000
    """Maximum characters per chunk, exceeded only by a single longer word (method chunks)."""

    chunk_overlap: NaturalInt = 100
    """Maximum characters that a chunk repeats from the end of the one before (method chunks); must
    be below --chunk-size. If only one of the two chunks is held out, the later one starts without
    the repeated characters."""

    min_words: PositiveInt = 5
    """Minimum length, in words, of a text that is kept (method chunks: of a paragraph); a word has
    at least two letters. In a script without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese,
    Tibetan) each character counts."""

    latex: Treatment = "keep"
    """How LaTeX is treated: `keep` leaves it with its marks, `placeholder` puts `[formula]` in its
    place, `drop` leaves a sentence without it, as the conversion of a PDF file does."""

    code: Treatment = "keep"
    """How code is treated, fenced or within a line: `keep` leaves it (a fenced listing is a text
    with its own line breaks), `placeholder` puts `[code]` in its place, `drop` leaves it out."""

    def __post_init__(self) -> None:
        if not self.folders:
            raise SAEError("--folders: give at least one folder of chapters")
        if self.subjects and len(self.subjects) != len(self.folders):
            raise SAEError(
                f"--subjects {' '.join(self.subjects)}: {len(self.subjects)} names for "
                f"{len(self.folders)} folders; give one for each, in the same order, or none"
            )
        check_limits(self)
        if Path(self.pattern).is_absolute() or ".." in Path(self.pattern).parts:
            raise SAEError(
                f"--pattern {self.pattern}: looks outside the folders; give one relative to each, "
                f'such as "{EVERYWHERE}"'
            )
        if any("**" in part and part != "**" for part in Path(self.pattern).parts):
            raise SAEError(
                f"--pattern {self.pattern}: `**` stands for whole folders, between two `/`; write "
                f'"{EVERYWHERE}" for all subfolders'
            )
        if self.chunk_overlap >= self.chunk_size:
            raise SAEError(
                f"--chunk-overlap {self.chunk_overlap}: must be below --chunk-size "
                f"{self.chunk_size}"
            )

    def subject_of(self, index: int) -> str:
        """The subject of the folder with that index."""
        name = self.folders[index].resolve().name
        return self.subjects[index] if self.subjects else name.removesuffix("_chapters") or name
