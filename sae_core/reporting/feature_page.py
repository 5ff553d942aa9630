"""The feature browser: a page about all features of an SAE, from the files of their analysis."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sae_core.labelling.label_files import read_labels
from sae_core.labelling.labels import Label
from sae_core.reporting.feature_data import Entry, data_folder, of_figures, write_data
from sae_core.reporting.html import embedded, render
from sae_core.reporting.map_page import map_page
from sae_core.reporting.summary import read_object
from sae_core.utils.files import write_file
from sae_core.utils.records import read_json_lines

CORPUS_KEYS = (
    "run_name", "model_name", "hook_spec", "d_sae", "active", "n_tokens", "n_texts", "l0",
    "density_histogram", "position", "similarity", "co_occurrence", "subjects", "end_of_text",
    "n_outlier_tokens", "map", "probes", "absorption",
)  # fmt: skip

MAP = "map.html"
"""The page with the map, in the folder of the data."""

SHOWN_PAIRS = 8
"""Number of pairs of features active together that the page shows."""


def read_corpus(path: Path) -> dict[str, Any]:
    """Read the figures of all features together.

    Raises:
        SAEError: the file is missing, not JSON, or lacks a key.
    """
    return read_object(path, "analysis of features", CORPUS_KEYS)


def write_page(
    page: Path, entries: Path, corpus: Path, report: str, labels: Path | None = None
) -> int:
    """Write the page and the folder of its data; gives the number of features.

    Args:
        page: where it goes.
        entries: every active feature, `<run>.jsonl`.
        corpus: the figures of all features together, `<run>.json`.
        report: where the page about all SAEs is, relative to this one.
        labels: what an LLM says of features, JSON lines.

    Raises:
        SAEError: a file cannot be read or written, or the figures are those of another SAE.
    """
    figures, by_llm = read_corpus(corpus), read_labels(labels) if labels else {}
    folder = data_folder(page)
    lines = of_figures(read_json_lines(entries), entries, figures, corpus)
    pages = {MAP: map_page(figures, _labelled(lines, by_llm), f"../{quote(page.name)}").encode()}
    n = write_data(folder, read_json_lines(entries), figures["subjects"], by_llm, pages)
    write_file(page, feature_page(figures, folder.name, report, labelled=bool(by_llm)))
    return n


def _labelled(entries: Iterable[Entry], by_llm: Mapping[int, Label]) -> Iterator[Entry]:
    """The entries, with the label that an LLM gave, if it gave one."""
    for entry in entries:
        said = by_llm.get(entry["feature"])
        yield entry | {"label": (said and said.label) or entry["label"]}


def feature_page(corpus: dict[str, Any], folder: str, report: str, labelled: bool = False) -> str:
    """The page without its data.

    Args:
        corpus: the figures of all features together.
        folder: the name of the folder of its data, which is beside it.
        report: where the page about all SAEs is, relative to this one.
        labelled: there are labels by an LLM.
    """
    data = {
        "folder": folder,
        "subjects": list(corpus["subjects"]),
        "density": corpus["density_histogram"],
        "cosine": corpus["similarity"]["nearest_cosine"],
        "end": corpus["end_of_text"],
        "n_tokens": corpus["n_tokens"],
        "d_sae": corpus["d_sae"],
        "labelled": labelled,
    }
    return render(
        "features.html.j2",
        "features.css.j2",
        "features.js.j2",
        corpus=corpus,
        silent=corpus["d_sae"] - corpus["active"],
        pairs=corpus["co_occurrence"]["pairs"][:SHOWN_PAIRS],
        report=report,
        map=f"{folder}/{MAP}" if corpus["map"]["points"] else None,
        data=embedded(data),
    )
