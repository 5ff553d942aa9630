"""What the workflow's results say about the features of a run: their labels, and their page."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from sae_core.utils.errors import SAEError
from sae_core.utils.records import read_json_lines


@dataclass(frozen=True)
class KnownFeatures:
    """The features of one run, for pages that name some of them."""

    labels: dict[int, str] = field(default_factory=dict)
    page: str = ""
    """Address of the page of features, relative to the page that leads there; "" without one."""

    def link(self, feature: int) -> str:
        """Where the page shows a feature; "" without a page."""
        return self.page and f"{self.page}#feature={feature}"


def known_features(
    run: str, label_files: Iterable[Path] = (), page: Path | None = None
) -> KnownFeatures:
    """What is known of a run's features.

    Args:
        run: its name.
        label_files: JSON lines with labels; by default results/features/<run>.jsonl and, of an LLM,
            results/labels/<run>.jsonl, if they are there.
        page: the page that is to lead to the features.

    Raises:
        SAEError: a file of labels is missing or holds something else.
    """
    usual = [Path(f"results/{folder}/{run}.jsonl") for folder in ("features", "labels")]
    labels = read_labels(tuple(label_files) or filter(Path.is_file, usual))
    features = Path(f"results/features/{run}.html")
    if page is None or not features.is_file():
        return KnownFeatures(labels)
    relative = os.path.relpath(features.resolve(), page.resolve().parent)
    return KnownFeatures(labels, quote(Path(relative).as_posix()))


def read_labels(paths: Iterable[Path]) -> dict[int, str]:
    """The labels in files of JSON lines, by feature; of two labels of a feature, the later one.

    Raises:
        SAEError: a file is missing or holds something else.
    """
    labels: dict[int, str] = {}
    for path in paths:
        try:
            labels |= {int(e["feature"]): e["label"] for e in read_json_lines(path) if e["label"]}
        except (ValueError, KeyError, TypeError) as error:
            raise SAEError(f"{path}: not lines with a feature and its label") from error
    return labels
