"""Turn Markdown chapters of several subjects into the texts that the language model reads.

Run from the repository root: `python sae_core/data_processing/textbook_process.py`. The cleaning
is described in `cleaning`; after it, fragments shorter than `min_words` and duplicates are
dropped.
"""

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

if not __package__:  # started as a file: Python then looks for packages here, not in the root
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from sae_core.data_processing import sources  # noqa: E402
from sae_core.data_processing.chapters import find_chapters  # noqa: E402
from sae_core.data_processing.cleaning import Dropped, Paragraph, clean  # noqa: E402
from sae_core.data_processing.sources import Sources, count_words  # noqa: E402
from sae_core.data_processing.texts import read_texts, write_texts  # noqa: E402
from sae_core.train_config import DEFAULT_DATA_PATH  # noqa: E402
from sae_core.utils import cli  # noqa: E402
from sae_core.utils.errors import SAEError  # noqa: E402
from sae_core.utils.limits import NaturalInt, PositiveInt, check_limits  # noqa: E402

RAW_DATA = Path("sae_core/data/raw_data")
SHORT, REPEATED = "too short", "duplicate"

WORD = re.compile(r"[^\W\d_]{2,}")
SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]+[\"'”’)\]]*\s+(?=[“\"'‘(\[]*[^\W_a-z]|\([a-z]\)\s)")
ABBREVIATIONS = set(
    "al approx ca cf ch dr e.g eq eqs fig figs i.e mr mrs ms mt p pp prof ref refs sec st vol vs "
    "viz".split()
)
INITIALS = re.compile(r"(?:[A-Z]\.)*[A-Z]")


@dataclass(frozen=True)
class ProcessConfig:
    """Which chapters to read, and how they become texts."""

    folders: tuple[Path, ...] = (
        RAW_DATA / "physics_chapters",
        RAW_DATA / "chemistry_chapters",
        RAW_DATA / "biology_chapters",
    )
    """Folders of chapters, one per subject; the *.md files of each are read in alphabetical
    order."""

    subjects: tuple[str, ...] = ()
    """Name of each folder's subject; by default the folder's name without `_chapters`."""

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
    at least two letters."""

    def __post_init__(self) -> None:
        if not self.folders:
            raise SAEError("--folders: give at least one folder of chapters")
        if self.subjects and len(self.subjects) != len(self.folders):
            raise SAEError(
                f"--subjects {' '.join(self.subjects)}: {len(self.subjects)} names for "
                f"{len(self.folders)} folders; give one for each, in the same order, or none"
            )
        check_limits(self)
        if self.chunk_overlap >= self.chunk_size:
            raise SAEError(
                f"--chunk-overlap {self.chunk_overlap}: must be below --chunk-size "
                f"{self.chunk_size}"
            )

    def subject_of(self, index: int) -> str:
        """The subject of the folder with that index."""
        name = self.folders[index].resolve().name
        return self.subjects[index] if self.subjects else name.removesuffix("_chapters") or name


class Report(NamedTuple):
    """The result of `process`."""

    chapters: list[Path]
    """The files read, in order."""

    output: Path
    """The file of texts."""

    sources: Sources
    """Where the texts come from, and what was left out."""

    @property
    def texts(self) -> list[str]:
        """The texts written."""
        return read_texts(self.output, "--output")


class _Counts:
    """Counts what was left out."""

    def __init__(self) -> None:
        self.pieces: Counter[str] = Counter()
        self.words: Counter[str] = Counter()

    def add(self, dropped: Dropped) -> None:
        for reason, pieces in dropped.items():
            self.pieces[reason] += len(pieces)
            self.words[reason] += count_words(pieces)

    def by_reason(self) -> dict[str, sources.Dropped]:
        return {
            reason: sources.Dropped(self.pieces[reason], self.words[reason])
            for reason in sorted(self.pieces)
        }


def process(config: ProcessConfig) -> Report:
    """Clean the chapters; write their texts to `config.output`, and the sources next to it.

    One chapter at a time is in memory; of earlier texts only hashes, to detect duplicates.
    """
    found = [
        (config.subject_of(index), file)
        for index, folder in enumerate(config.folders)
        for file in find_chapters(folder, f"--folders {folder}")
    ]
    counts, chapters = _Counts(), []
    seen: set[bytes] = set()

    def texts() -> Iterator[str]:
        for subject, file in found:
            dropped: Dropped = defaultdict(list)
            own = list(_texts_of(_read(file), config, dropped, seen))
            counts.add(dropped)
            name = f"{file.parent.name}/{file.name}"
            chapters.append(sources.Chapter(subject, name, len(own), count_words(own)))
            yield from own
        if not any(chapter.texts for chapter in chapters):
            raise SAEError(
                f"--folders {' '.join(map(str, config.folders))}: nothing is left of the chapters "
                f"after cleaning; give chapters with prose, or lower --min-words {config.min_words}"
            )

    write_texts(config.output, texts())
    origin = Sources(tuple(chapters), counts.by_reason())
    origin.save(config.output)
    return Report([file for _, file in found], config.output, origin)


def _texts_of(
    chapter: str, config: ProcessConfig, dropped: Dropped, seen: set[bytes]
) -> Iterator[str]:
    paragraphs = clean(chapter, dropped)
    if config.method == "chunks":
        kept = _keep((" ".join(lines) for lines in paragraphs), config, dropped, seen)
        yield from chunks("\n".join(kept), config.chunk_size, config.chunk_overlap)
    else:
        yield from _keep(_units(paragraphs, config.method), config, dropped, seen)


def _read(chapter: Path) -> str:
    try:
        return chapter.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise SAEError(f"{chapter}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise SAEError(
            f"{chapter}: cannot be read ({error.strerror}); make it readable or move it away"
        ) from error


def _units(paragraphs: list[Paragraph], method: str) -> Iterator[str]:
    for lines in paragraphs:
        if method == "paragraphs":
            yield " ".join(lines)
        elif method == "lines":
            yield from lines
        else:
            for line in lines:
                yield from sentences(line)


def _keep(
    texts: Iterator[str], config: ProcessConfig, dropped: Dropped, seen: set[bytes]
) -> Iterator[str]:
    """The texts that are long enough and new; `seen` has the hash of each."""
    for text in texts:
        key = blake2b(text.casefold().encode(), digest_size=16).digest()
        if len(WORD.findall(text)) < config.min_words:
            dropped[SHORT].append(text)
        elif key in seen:
            dropped[REPEATED].append(text)
        else:
            seen.add(key)
            yield text


def sentences(text: str) -> Iterator[str]:
    """Split prose into sentences; abbreviations, initials and list numbers do not end one."""
    start = 0
    for end in SENTENCE_END.finditer(text):
        if text[end.start()] != "." or not _is_abbreviated(text, start, end.start()):
            yield text[start : end.end()].strip()
            start = end.end()
    if start < len(text):
        yield text[start:]


def _is_abbreviated(text: str, start: int, end: int) -> bool:
    """Whether the full stop at `end` of a sentence belongs to the word before it."""
    space = text.rfind(" ", start, end)
    word = text[max(start, space + 1) : end]
    is_list_mark = space < 0 and (len(word) == 1 or word.isdigit())
    word = word.lstrip("([“\"'‘")
    return is_list_mark or word.casefold() in ABBREVIATIONS or bool(INITIALS.fullmatch(word))


def chunks(text: str, size: int, overlap: int) -> Iterator[str]:
    """Stretches of at most `size` characters that cut no word and repeat up to `overlap`."""
    words = [match.span() for match in re.finditer(r"\S+", text)]
    first = 0
    while first < len(words):
        last = first
        while last + 1 < len(words) and words[last + 1][1] - words[first][0] <= size:
            last += 1
        yield text[words[first][0] : words[last][1]]
        if last + 1 == len(words):
            return
        following = last + 1
        while following - 1 > first and words[last][1] - words[following - 1][0] <= overlap:
            following -= 1
        first = following


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command line."""
    cli.run(_run, ProcessConfig, "Make one JSON list of texts from Markdown chapters.", argv)


def _run(config: ProcessConfig) -> None:
    report = process(config)
    print(config.output)
    for name, count in (
        ("chapters", len(report.chapters)),
        ("texts", sum(chapter.texts for chapter in report.sources.chapters)),
        ("words", sum(chapter.words for chapter in report.sources.chapters)),
    ):
        print(f"  {name:<18}{count:>10,}")
    print(f"{'left out':<20}{'pieces':>10}{'words':>10}")
    for reason, left_out in report.sources.dropped.items():
        print(f"  {reason:<18}{left_out.pieces:>10,}{left_out.words:>10,}")


if __name__ == "__main__":
    main()
