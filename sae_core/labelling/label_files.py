"""`results/labels/<run>.jsonl`: a JSON object a line, for each feature that was to be labelled."""

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from sae_core.labelling.labels import Label
from sae_core.utils.errors import SAEError
from sae_core.utils.files import write_file
from sae_core.utils.records import fits, read_json_lines

SCORES = ("detection", "fuzzing")


def write_labels(path: Path, labels: Sequence[Label]) -> None:
    """Write the file."""
    lines = [json.dumps(label._asdict(), ensure_ascii=False) for label in labels]
    write_file(path, "".join(f"{line}\n" for line in lines))


def write_table(path: Path, labels: Sequence[Label]) -> None:
    """Write the same as CSV."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(Label._fields)
    rows.writerows(labels)
    write_file(path, out.getvalue())


def read_labels(path: Path) -> dict[int, Label]:
    """The labels by feature.

    Raises:
        SAEError: the file is missing, or a line is not a label.
    """
    hints = get_type_hints(Label) | {"status": str}
    found = {}
    for values in read_json_lines(path):
        given = values if isinstance(values, dict) else {}
        wrong = [name for name, k in hints.items() if name not in given or not fits(given[name], k)]
        if wrong:
            raise SAEError(
                f"{path}: not a whole label ({', '.join(wrong)}); create the labels again"
            )
        label = Label(**{name: values[name] for name in Label._fields})
        found[label.feature] = label
    return found


def label_figures(labels: Sequence[Label]) -> dict[str, Any]:
    """How many features have a label, and the mean of each score over those that have it."""
    figures: dict[str, Any] = {"labelled": sum(label.status == "ok" for label in labels)}
    for name in SCORES:
        values = [value for label in labels if (value := getattr(label, name)) is not None]
        figures[name] = sum(values) / len(values) if values else None
    return figures


def in_words(labels: Sequence[Label]) -> str:
    """The figures, and why features have no label, as one line."""
    figures = label_figures(labels)
    parts = [f"{figures['labelled']} of {len(labels)} features are labelled"]
    parts += [f"mean {name} {figures[name]:.2f}" for name in SCORES if figures[name] is not None]
    reasons = Counter(label.status for label in labels if label.status != "ok")
    parts += [f"{count} {status}" for status, count in reasons.items()]
    return "; ".join(parts)
