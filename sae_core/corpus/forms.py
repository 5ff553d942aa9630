"""Which files are read as texts, and in which form."""

from pathlib import Path

from sae_core.corpus.records import is_packed, opened, reading
from sae_core.settings.texts import CorpusConfig
from sae_core.utils.errors import SAEError

LIST, LINES, PARQUET, PLAIN = "JSON list", "JSON lines", "Parquet", "text"
SUFFIXES = {
    ".json": LIST,
    ".jsonl": LINES,
    ".ndjson": LINES,
    ".parquet": PARQUET,
    **dict.fromkeys((".txt", ".text", ".md", ".markdown"), PLAIN),
}
PACKED = (".gz", ".zst", ".zstd")
"""Last suffixes of compressed files."""

FORMS = (
    "a JSON list of texts (.json), JSON lines (.jsonl, .jsonl.gz, .jsonl.zst), Parquet (.parquet), "
    "text (.txt, .md), a folder of such files, or with --dataset-id a data set of the Hub"
)
CONVERT = (
    "convert a table, such as CSV, with `python -c \"import datasets; datasets.load_dataset('csv', "
    "data_files='x.csv', split='train').to_parquet('x.parquet')\"`, and a folder that a data set "
    "was saved to with `datasets.load_from_disk('folder').to_parquet('x.parquet')`"
)


def form_of(path: Path) -> str | None:
    """The form of a file, by its name and if need be by its beginning; None if it has none of them.

    Raises:
        SAEError: it cannot be read, or is a JSON list that is compressed.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    form = SUFFIXES.get(suffixes[-1]) if suffixes else None
    if form not in (LIST, None):
        return form
    with reading(str(path)), opened(path) as file:
        beginning = file.read(4096)
    if beginning.startswith(b"PAR1"):
        return PARQUET
    first = beginning.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first == b"{":
        return LINES
    if form != LIST and first != b"[":
        return None
    if is_packed(path):
        raise SAEError(
            f"{path}: a JSON list that is compressed; decompress it, or write JSON lines, which "
            "may be compressed"
        )
    return LIST


def corpus_files(config: CorpusConfig) -> list[Path]:
    """The files of a local corpus, in the order in which they are read.

    Raises:
        SAEError: there are none, or a single one is no file or has no form that is known.
    """
    path, pattern = config.data_path, config.data_pattern
    assert path is not None
    where = f"--data-path {path}"
    if not path.is_dir():
        if path.exists() and not path.is_file():
            raise SAEError(f"{where}: a pipe or a device, and texts are read twice; give a file")
        if path.is_file() and form_of(path) is None:
            raise SAEError(
                f"{where}: none of the forms that are read, which are {FORMS}; {CONVERT}"
            )
        return [path]
    try:
        found = sorted(file for file in path.glob(pattern) if file.is_file())
    except (ValueError, NotImplementedError) as error:
        raise SAEError(f"--data-pattern {pattern}: not a pattern ({error})") from error
    visible = [file for file in found if not _is_hidden(file.relative_to(path))]
    files = [file for file in visible if form_of(file)]
    if not files:
        raise SAEError(f"{where}: no file in it {_why_none(path, pattern)}")
    return files


def passed_over(config: CorpusConfig) -> list[Path]:
    """The files of a folder that no pattern or form makes part of the corpus."""
    assert config.data_path is not None
    if not config.data_path.is_dir():
        return []
    read = set(corpus_files(config))
    return [f for f in sorted(config.data_path.rglob("*")) if f.is_file() and f not in read]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _why_none(folder: Path, pattern: str) -> str:
    nested = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.parent != folder and not _is_hidden(file.relative_to(folder))
    ]
    if nested and "/" not in pattern:
        return (
            f"matches --data-pattern {pattern}, but its subfolders have some, such as {nested[0]}; "
            f"give --data-pattern '**/*{nested[0].suffix}'"
        )
    where = f"that matches --data-pattern {pattern}"
    return f"{where} has a form that is read, which are {FORMS}; {CONVERT}"
