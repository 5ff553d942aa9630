"""The data of a feature page: script files in a folder beside it, which browsers load from disk.

`index.js` has what the list, its sorting and the search for peaks need of every feature.
`features-<n>.js` has `CHUNK` features with their windows, in the order of the index.
`words-<a>-<b>.js` has the words that begin with two characters, given as hexadecimal numbers, and
for each the features that show it: rows of the index, as differences in base 36.

Bytes in memory: some 1,500 per feature, plus one chunk: its row, and 4 for each distinct word.
"""

import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sae_core.labelling.labels import Label
from sae_core.utils.errors import SAEError
from sae_core.utils.files import new_folder, writing

Entry = dict[str, Any]
"""A line of `<run>.jsonl`, as `evaluation/feature_files.py` writes it."""

CHUNK = 64
"""Features in a file: some half a megabyte."""

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
"""What a search compares; `features.js.j2` has the same."""

SCORES = ("detection", "fuzzing", "confidence")
"""Of a label by an LLM."""


def of_figures(
    entries: Iterable[Entry], path: Path, corpus: Mapping[str, Any], corpus_path: Path
) -> Iterator[Entry]:
    """The entries of a file; at its end it is known whether they are of the SAE of the figures.

    Raises:
        SAEError: there are more or fewer of them, or they are active on more or fewer tokens.
    """
    n = tokens = 0
    for entry in entries:
        n, tokens = n + 1, tokens + entry["tokens"]
        yield entry
    l0 = float(f"{tokens / max(1, corpus['n_tokens']):.4g}")  # as the figures are rounded
    if (n, l0) != (corpus["active"], corpus["l0"]):
        raise SAEError(
            f"{path} has {n} features and an L0 of {l0}, but {corpus_path}, of "
            f"{corpus['run_name']}, has {corpus['active']} and {corpus['l0']}: these are different "
            "analyses; give both files of one"
        )


def data_folder(page: Path) -> Path:
    """Where the data of a page is."""
    return page.with_name(f"{page.stem}.files")


def write_data(
    folder: Path,
    entries: Iterable[Entry],
    subjects: Iterable[str],
    labels: Mapping[int, Label],
    pages: Mapping[str, bytes],
) -> int:
    """Write all files, one chunk in memory at a time; gives the number of features.

    Args:
        entries: the features.
        subjects: whose shares the index has.
        labels: what an LLM says of some of them, by feature.
        pages: further files, by name.

    Raises:
        SAEError: the folder cannot be written.
    """
    index, words, n_bytes = Index(subjects, labels), ShownWords(), 0
    with writing(folder, lambda: n_bytes), new_folder(folder) as new:

        def write(name: str, value: Any) -> None:
            nonlocal n_bytes
            content = script(name, value)
            n_bytes += len(content)
            (new / f"{name}.js").write_bytes(content)

        for name, content in pages.items():
            n_bytes += len(content)
            (new / name).write_bytes(content)
        for number, chunk in enumerate(chunks(entries, CHUNK)):
            for entry in chunk:
                words.add(len(index), entry)
                index.add(entry)
            write(f"features-{number}", chunk)
        shards = words.shards()
        for name, shard in shards.items():
            write(f"words-{name}", shard)
        write("index", index.content() | {"shards": list(shards), "chunk": CHUNK})
    return len(index)


def script(name: str, value: Any) -> bytes:
    """A script that hands a value to the page."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"received({json.dumps(name)},{text})\n".encode()


class Index:
    """Columns with an entry for each feature."""

    def __init__(self, subjects: Iterable[str], labels: Mapping[int, Label]) -> None:
        self.subjects, self.labels = list(subjects), labels
        self.columns: dict[str, list[Any]] = {
            name: [] for name in ("feature", "label", "peaks", "density", "max", "shares")
        }
        if labels:
            self.columns |= {name: [] for name in SCORES}

    def __len__(self) -> int:
        return len(self.columns["feature"])

    def add(self, entry: Entry) -> None:
        """Add a row; an LLM's label takes the place of the default one."""
        said = self.labels.get(entry["feature"])
        if said is not None:
            entry["explained"] = said._asdict()
        row = {
            "feature": entry["feature"],
            "label": (said and said.label) or entry["label"],
            "peaks": " ".join(f"{word} {n}" for word, n in entry["peaks"]),
            "density": entry["density"],
            "max": entry["max"],
            "shares": [round(entry["subjects"].get(subject, 0), 3) for subject in self.subjects],
        }
        row |= {score: said and getattr(said, score) for score in SCORES}
        for name, column in self.columns.items():
            column.append(row[name])

    def content(self) -> dict[str, Any]:
        return {"columns": self.columns}


class ShownWords:
    """Which features show a word: in a window, a promoted or suppressed token, a chapter's name."""

    def __init__(self) -> None:
        self.rows: dict[str, array[int]] = {}

    def add(self, row: int, entry: Entry) -> None:
        windows = [*entry["top"], *entry["quantiles"]]
        texts = ["".join(window["tokens"]) for window in windows]
        texts += [window["chapter"] or "" for window in windows]
        texts += [token for token, _ in [*entry["promoted"], *entry["suppressed"]]]
        for word in set(WORD.findall("\n".join(texts).lower())):
            self.rows.setdefault(word, array("I")).append(row)

    def shards(self) -> dict[str, list[list[str]]]:
        """The words and their rows, by the first two characters of the word."""
        found: dict[str, list[list[str]]] = {}
        for word in sorted(self.rows):
            name = "-".join(f"{ord(character):x}" for character in word[:2])
            found.setdefault(name, []).append([word, _differences(self.rows[word])])
        return found


def _differences(rows: Iterable[int]) -> str:
    """Ascending numbers, each as what it exceeds the one before by."""
    before, found = 0, []
    for row in rows:
        found.append(_base_36(row - before))
        before = row
    return " ".join(found)


def _base_36(number: int) -> str:
    digits = ""
    while number or not digits:
        number, digit = divmod(number, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return digits


def chunks(entries: Iterable[Entry], size: int) -> Iterator[list[Entry]]:
    """The entries in lists of `size`, the last of which may be shorter."""
    chunk: list[Entry] = []
    for entry in entries:
        chunk.append(entry)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
