"""Turn Markdown chapters of several subjects into the texts that the language model reads.

Run from the repository root: `python sae_core/data_processing/textbook_process.py`. The cleaning
is described in `cleaning`; after it, fragments shorter than `min_words` and duplicates are
dropped.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, NoReturn

if not __package__:  # started as a file: Python then looks for packages here, not in the root
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from sae_core.data_processing import sources  # noqa: E402
from sae_core.data_processing.chapters import find_chapters, passed_over  # noqa: E402
from sae_core.data_processing.characters import (  # noqa: E402
    UNSPACED,
    count_long_words,
    count_words,
)
from sae_core.data_processing.cleaning import Paragraph, clean  # noqa: E402
from sae_core.data_processing.counts import REPEATED, SHORT, Counts  # noqa: E402
from sae_core.data_processing.lines import Settings  # noqa: E402
from sae_core.data_processing.process_config import ProcessConfig  # noqa: E402
from sae_core.data_processing.sources import Sources  # noqa: E402
from sae_core.data_processing.texts import read_texts, write_texts  # noqa: E402
from sae_core.utils import cli  # noqa: E402
from sae_core.utils.errors import SAEError  # noqa: E402

NAMED = 20
"""How many files that were passed over are named."""

SENTENCE_END = re.compile(
    r"(?<![.!?…।؟۔])[.!?…।؟۔]+[\"'”’)\]]*\s+(?=[“\"'‘(\[]*[^\W_a-z]|\([a-z]\)\s)"
    r"|[。！？]+[」』”’）】]*\s*"
)
CHUNK_WORD = re.compile(rf"[{UNSPACED}][^\s\w]*|[^\s{UNSPACED}]+")
"""What a chunk does not cut: a word, or a character of a script without spaces."""

ABBREVIATIONS = set(
    "al approx ca cf ch dr e.g eq eqs fig figs i.e mr mrs ms mt p pp prof ref refs sec st vol vs "
    "viz".split()
)
INITIALS = re.compile(r"(?:[A-Z]\.)*[A-Z]")


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


class _Totals:
    """What was left out and put right, of all chapters."""

    def __init__(self) -> None:
        self.pieces: Counter[str] = Counter()
        self.words: Counter[str] = Counter()
        self.repaired: Counter[str] = Counter()

    def add(self, counts: Counts) -> None:
        for reason, pieces in counts.dropped.items():
            self.pieces[reason] += len(pieces)
            self.words[reason] += sum(map(count_words, pieces))
        self.repaired += counts.repaired

    def dropped(self) -> dict[str, sources.Dropped]:
        return {
            reason: sources.Dropped(self.pieces[reason], self.words[reason])
            for reason in sorted(self.pieces)
        }


def process(config: ProcessConfig) -> Report:
    """Clean the chapters; write their texts to `config.output`, and the sources next to it.

    One chapter at a time is in memory; of earlier texts only hashes, to detect duplicates.
    """
    found = [
        (config.subject_of(index), folder, file)
        for index, folder in enumerate(config.folders)
        for file in find_chapters(folder, f"--folders {folder}", config.pattern)
    ]
    totals, chapters = _Totals(), []
    seen: set[bytes] = set()

    def texts() -> Iterator[str]:
        for subject, folder, file in found:
            counts = Counts()
            own = list(_texts_of(_read(file), config, counts, seen))
            totals.add(counts)
            name = f"{folder.name}/{file.relative_to(folder).as_posix()}"
            chapters.append(sources.Chapter(subject, name, len(own), sum(map(count_words, own))))
            yield from own
        if not any(chapter.texts for chapter in chapters):
            raise SAEError(
                f"--folders {' '.join(map(str, config.folders))}: nothing is left of the chapters "
                f"after cleaning; give chapters with prose, or lower --min-words {config.min_words}"
            )

    write_texts(config.output, texts())
    origin = Sources(tuple(chapters), totals.dropped(), dict(sorted(totals.repaired.items())))
    origin.save(config.output)
    return Report([file for *_, file in found], config.output, origin)


def _texts_of(
    chapter: str, config: ProcessConfig, counts: Counts, seen: set[bytes]
) -> Iterator[str]:
    paragraphs = clean(chapter, counts, Settings(config.code, config.latex))
    if config.method == "chunks":
        kept = _keep((" ".join(lines) for lines in paragraphs), config, counts, seen)
        yield from chunks("\n".join(kept), config.chunk_size, config.chunk_overlap)
    else:
        yield from _keep(_units(paragraphs, config.method), config, counts, seen)


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
            yield from (row for line in lines for row in line.split("\n") if row.strip())
        else:
            for line in lines:
                yield from sentences(line)


def _keep(
    texts: Iterator[str], config: ProcessConfig, counts: Counts, seen: set[bytes]
) -> Iterator[str]:
    """The texts that are long enough and new; `seen` has the hash of each."""
    for text in texts:
        key = blake2b(text.casefold().encode(), digest_size=16).digest()
        if count_long_words(text) < config.min_words:
            counts.dropped[SHORT].append(text)
        elif key in seen:
            counts.dropped[REPEATED].append(text)
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
    words = [match.span() for match in CHUNK_WORD.finditer(text)]
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
    if report.sources.repaired:
        print("put right")
    for what, count in report.sources.repaired.items():
        print(f"  {what:<26}{count:>10,}")
    _print_passed_over(config)


def _print_passed_over(config: ProcessConfig) -> None:
    files = [
        (folder / path, why)
        for folder in config.folders
        for path, why in passed_over(folder, config.pattern).items()
    ]
    if files:
        print(f"{'passed over':<20}{len(files):>10,}")
    for path, why in files[:NAMED]:
        print(f"  {path}: {why}")
    if len(files) > NAMED:
        print(f"  and {len(files) - NAMED:,} more")


if __name__ == "__main__":
    main()
