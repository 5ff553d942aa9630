"""The results of many SAEs: read from their JSON files, and put side by side as CSV and as text."""

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sae_core.utils.errors import SAEError

Evaluation = dict[str, Any]
"""The contents of one `results/evaluations/<run_name>.json`."""

History = dict[str, list[float | None]]
"""The contents of one `history.json`: one list per metric, one entry per epoch; null if an epoch
has no end-to-end losses."""

SUMMARY_COLUMNS = (
    "run_name",
    "model_name",
    "hook_spec",
    "sae_type",
    "d_sae",
    "top_k",
    "l0",
    "fvu",
    "ce_clean",
    "ce_sae",
    "ce_mean_ablation",
    "ce_zero_ablation",
    "loss_recovered",
    "kl",
    "dead_fraction",
    "n_tokens",
    "n_left_alone",
    "ce_sae_all_spliced",
    "loss_recovered_all_spliced",
    "kl_all_spliced",
    "n_left_alone_all_spliced",
    "ce_sae_sinks_kept",
    "loss_recovered_sinks_kept",
    "kl_sinks_kept",
    "n_left_alone_sinks_kept",
    "ce_sae_by_norm",
    "loss_recovered_by_norm",
    "kl_by_norm",
    "n_left_alone_by_norm",
)

EVALUATION_KEYS = (
    *SUMMARY_COLUMNS,
    "d_in",
    "l0_quantiles",
    "fvu_with_outliers",
    "density_histogram",
    "block_mse",
    "block_mse_mean",
    "block_mse_min",
    "block_mse_max",
    "n_windows",
    "n_outlier_tokens",
    "held_out_repeated",
)

HISTORY_KEYS = ("loss", "sparsity", "dead_feature_percentage")
"""What is drawn of a training; its epochs are counted where they are not numbered."""

TABLE_WIDTH = 120
TABLE_KEYS = (
    "l0", "fvu", "ce_clean", "ce_sae", "loss_recovered", "kl", "dead_fraction", "n_left_alone",
)  # fmt: skip


class Column(NamedTuple):
    """How one number of an evaluation is shown to people."""

    heading: str
    spec: str
    """Its format specification."""
    meaning: str


class Splice(NamedTuple):
    """Another choice of the tokens that the SAE replaces in the model."""

    name: str
    meaning: str


COLUMNS = {
    "d_sae": Column("features", ",d", "the width of the SAE's code."),
    "top_k": Column(
        "k", "d", "active features per token that training aims at; 0 if the kind has none."
    ),
    "l0": Column("L0", ".1f", "mean number of active features per token."),
    "fvu": Column(
        "FVU",
        ".4f",
        "fraction of the activations' variance left unexplained, pooled over tokens, attention "
        "sinks (outlier tokens) left out; lower is better.",
    ),
    "ce_clean": Column("CE clean", ".3f", "the model's cross-entropy, in nats per token."),
    "ce_sae": Column(
        "CE SAE",
        ".3f",
        "the same with the SAE's output in place of the activation, except at the first position "
        "of a window, on which no SAE is trained.",
    ),
    "ce_mean_ablation": Column("CE mean", ".3f", "the same with the activation's mean."),
    "ce_zero_ablation": Column("CE zero", ".3f", "the same with zeros."),
    "loss_recovered": Column(
        "loss recovered",
        ".4f",
        "(CE zero − CE SAE) / (CE zero − CE clean): 1 if splicing in the SAE costs nothing, 0 if "
        "the SAE is no better than zeros.",
    ),
    "kl": Column(
        "KL", ".4f", "KL(clean ‖ spliced) of the next-token distributions, in nats per token."
    ),
    "dead_fraction": Column(
        "silent",
        ".2%",
        "share of features that fired on no evaluated token. Some of them are rare, not dead.",
    ),
    "n_tokens": Column("tokens", ",d", "tokens the SAE was evaluated on."),
    "n_left_alone": Column(
        "left alone", ",d", "tokens that keep their activation: the first of each window."
    ),
}
"""The numbers of the summary, in its order, except the numbers of `OTHER_SPLICES`."""

OTHER_SPLICES = {
    "_all_spliced": Splice(
        "all spliced", "with every token spliced, including the first of a window"
    ),
    "_sinks_kept": Splice("sinks kept", "with attention sinks (outlier tokens) left alone as well"),
    "_by_norm": Splice(
        "by norm",
        "with every token given to the SAE, which leaves alone those beyond its outlier_norm",
    ),
}
"""By the suffix of their keys: the figures of the spliced model once more, for other choices of
the tokens that keep their activation."""

SPLICED_KEYS = ("ce_sae", "loss_recovered", "kl", "n_left_alone")

SPLICED_COLUMNS = {
    f"{key}{suffix}": Column(
        f"{COLUMNS[key].heading}, {splice.name}",
        COLUMNS[key].spec,
        f"{COLUMNS[key].heading} {splice.meaning}.",
    )
    for suffix, splice in OTHER_SPLICES.items()
    for key in SPLICED_KEYS
}
"""The rest of the numbers, in their order."""


PROBE_COLUMNS = {
    "probe_dense": Column(
        "all of x",
        ".3f",
        "balanced accuracy of a linear probe that tells one subject from the others by a window's "
        "mean activation, on windows that did not train it; the mean over the subjects. 0.5 is "
        "chance.",
    ),
    **{
        f"probe_{k}": Column(
            f"{k} feature{'s' * (k > 1)}",
            ".3f",
            f"the same for a probe that reads the {k} best feature{'s' * (k > 1)} of the SAE.",
        )
        for k in (1, 5, 20)
    },
    "probe_random_5": Column("5 at random", ".3f", "the same for 5 random active features."),
    "perturbation_20": Column(
        "perturbation",
        ".3f",
        "what zeroing a subject's 20 features takes from its own dense probe, less the mean of "
        "what it takes from the other probes. 0.5 at best.",
    ),
}
"""Figures of the probes for the texts' subjects, where there are subjects."""


ABSORPTION_COLUMNS = {
    "absorption": Column(
        "absorption",
        ".3f",
        "how far the features for a word's first letter are silent because other features have "
        "taken over their direction: 0 not at all, 1 entirely. The mean over words, then letters.",
    ),
    "absorption_full": Column(
        "fully absorbed",
        ".3f",
        "share of words on which a letter's features are all silent and one other feature takes "
        "their place.",
    ),
    "letter_features": Column(
        "features a letter",
        ".2f",
        "features that tell words with a letter from others; more than one is feature splitting.",
    ),
    "letters": Column(
        "letters",
        "d",
        "letters that a probe of the whole activation tells well enough; the other figures are of "
        "these. SAEBench asks for 20.",
    ),
}
"""Figures of the first-letter task, where the model's activations tell letters apart."""


def feature_figures(features: Mapping[str, Any] | None) -> dict[str, float | None]:
    """The numbers of `PROBE_COLUMNS` and `ABSORPTION_COLUMNS` from an analysis of features."""
    return probe_figures(features) | absorption_figures(features)


def absorption_figures(features: Mapping[str, Any] | None) -> dict[str, float | None]:
    """The numbers of `ABSORPTION_COLUMNS`; none if absorption was not measured."""
    found = (features or {}).get("absorption")
    if not found:
        return {}
    mean = found["mean"]
    return {
        "absorption": mean["fraction"],
        "absorption_full": mean["full"],
        "letter_features": mean["n_features"],
        "letters": len(found["letters"]),
    }


def probe_figures(features: Mapping[str, Any] | None) -> dict[str, float | None]:
    """The numbers of `PROBE_COLUMNS` from an analysis of features; none if it has no probes."""
    mean = ((features or {}).get("probes") or {}).get("mean")
    if mean is None:
        return {}
    return {
        "probe_dense": mean["dense"],
        **{f"probe_{k}": mean["sae"][str(k)] for k in (1, 5, 20)},
        "probe_random_5": mean["random"]["5"],
        "perturbation_20": mean.get("perturbation", {}).get("20"),
    }


def read_evaluations(paths: Iterable[Path]) -> list[Evaluation]:
    """Read evaluations, in the order of `paths`.

    Raises:
        SAEError: a file is missing, not JSON, or lacks a key.
    """
    return [read_object(path, "evaluation", EVALUATION_KEYS) for path in paths]


def read_histories(paths: Iterable[Path]) -> list[History]:
    """Read training histories, in the order of `paths`; that of an SAE from elsewhere is empty.

    Raises:
        SAEError: a file is missing, not JSON, or lacks a key.
    """
    found = []
    for path in paths:
        history = read_object(path, "training history", ())
        if history:
            check_keys(path, history, "training history", HISTORY_KEYS)
        found.append(whole_history(history))
    return found


def whole_history(history: History) -> History:
    """The history with its epochs numbered, which this trainer's predecessor did not do; an empty
    history gets empty lists."""
    epochs = range(1, len(history.get("loss", ())) + 1)
    return {"epoch": list(epochs), **dict.fromkeys(HISTORY_KEYS, []), **history}


def summary_csv(evaluations: Iterable[Evaluation]) -> str:
    """`SUMMARY_COLUMNS` and the numbers of `feature_figures` of every SAE as CSV, by run name, in
    full precision."""
    text = io.StringIO()
    columns = (*SUMMARY_COLUMNS, *PROBE_COLUMNS, *ABSORPTION_COLUMNS)
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(evaluations, key=lambda evaluation: evaluation["run_name"]))
    return text.getvalue()


def summary_table(evaluations: Iterable[Evaluation]) -> str:
    """The key figures of every SAE as text tables for a terminal, `TABLE_WIDTH` wide at most: the
    headline figures, then the figures of the other splices.

    A run name that is too long keeps its end, which distinguishes SAEs.
    """
    ordered = sorted(evaluations, key=lambda e: reading_order(e["run_name"]))
    tables = [_table(ordered, TABLE_KEYS, "")]
    for suffix, splice in OTHER_SPLICES.items():
        tables.append(f"{splice.meaning}:\n{_table(ordered, SPLICED_KEYS, suffix)}")
    return "\n".join(tables)


def _table(evaluations: Sequence[Evaluation], keys: Sequence[str], suffix: str) -> str:
    """One row per SAE; `suffix` is that of the keys."""
    rows = [["run", *(COLUMNS[key].heading for key in keys)]]
    for evaluation in evaluations:
        shown = (show(evaluation[f"{key}{suffix}"], COLUMNS[key].spec) for key in keys)
        rows.append([evaluation["run_name"], *shown])
    name_width, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    name_width = min(name_width, TABLE_WIDTH - sum(widths) - 2 * len(widths))
    rows.insert(1, ["-" * width for width in (name_width, *widths)])
    return "".join(f"{_line(row, name_width, widths)}\n" for row in rows)


def reading_order(name: str) -> list[str | int]:
    """Sorts names as people expect it, by the numbers in them: layer 9 before layer 20."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def show(value: float | None, spec: str) -> str:
    """A number as people read it; a dash if there is none."""
    return "–" if value is None or not math.isfinite(value) else format(value, spec)


def read_object(path: Path, what: str, keys: Sequence[str]) -> dict[str, Any]:
    """A JSON object that has these keys; `what` it is, for the message.

    Raises:
        SAEError: it is missing, not JSON, or lacks a key.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SAEError(f"{path}: not a readable {what} ({error}); create it again") from error
    check_keys(path, stored, what, keys)
    return stored


def check_keys(path: Path, stored: Any, what: str, keys: Sequence[str]) -> None:
    """Check that what was read is an object that has these keys.

    Raises:
        SAEError: it is not, or lacks one.
    """
    if not isinstance(stored, dict):
        raise SAEError(f"{path}: not a complete {what}, it lacks all keys; create it again")
    if missing := [key for key in keys if key not in stored]:
        raise SAEError(
            f"{path}: not a complete {what}, it lacks {', '.join(missing)}; create it again"
        )


def _line(row: list[str], name_width: int, widths: list[int]) -> str:
    name, *numbers = row
    if len(name) > name_width:
        name = f"...{name[3 - name_width :]}"
    cells = (number.rjust(width) for number, width in zip(numbers, widths, strict=True))
    return "  ".join((name.ljust(name_width), *cells))
