"""The feature browser: one page about the features of an SAE, from the files of its analysis."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_core.reporting.html import embedded, render
from sae_core.reporting.summary import read_object
from sae_core.utils.errors import SAEError

Entry = dict[str, Any]
"""A line of `<run>.jsonl`, as `evaluation/feature_files.py` writes it."""

CORPUS_KEYS = (
    "run_name", "model_name", "hook_spec", "d_sae", "active", "n_tokens", "n_texts", "l0",
    "density_histogram", "position", "similarity", "co_occurrence", "subjects", "end_of_text",
    "n_outlier_tokens",
)  # fmt: skip

SHOWN_PAIRS = 8
"""Number of pairs of features active together that the page shows."""


def read_entries(path: Path) -> list[Entry]:
    """Read the features that are to be shown.

    Raises:
        SAEError: the file is missing, or a line is not JSON.
    """
    try:
        # Not `splitlines`: JSON leaves U+2028 and other line breaks of Unicode as they are.
        return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    except (OSError, ValueError) as error:
        raise SAEError(f"{path}: not readable JSON lines ({error}); create them again") from error


def read_corpus(path: Path) -> dict[str, Any]:
    """Read the figures of all features together.

    Raises:
        SAEError: the file is missing, not JSON, or lacks a key.
    """
    return read_object(path, "analysis of features", CORPUS_KEYS)


def feature_page(entries: Sequence[Entry], corpus: dict[str, Any], report: str) -> str:
    """The page.

    Args:
        entries: the features that are shown.
        corpus: the figures of all features together, `<run>.json`.
        report: where the page about all SAEs is, relative to this one.
    """
    pairs = corpus["co_occurrence"]["pairs"][:SHOWN_PAIRS]
    data = {
        "features": entries,
        "subjects": list(corpus["subjects"]),
        "density": corpus["density_histogram"],
        "cosine": corpus["similarity"]["nearest_cosine"],
        "end": corpus["end_of_text"],
    }
    return render(
        "features.html.j2",
        "features.css.j2",
        "features.js.j2",
        corpus=corpus,
        shown={entry["feature"] for entry in entries},
        n_shown=len(entries),
        pairs=pairs,
        report=report,
        data=embedded(data),
    )
