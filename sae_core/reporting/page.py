"""The run page: one HTML file about all SAEs that holds all it shows and needs no network."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup, escape

from sae_core.data_processing.sources import Sources
from sae_core.reporting import plots
from sae_core.reporting.html import render
from sae_core.reporting.provenance import Environment, Job
from sae_core.reporting.summary import (
    ABSORPTION_COLUMNS,
    COLUMNS,
    EVALUATION_KEYS,
    OTHER_SPLICES,
    PROBE_COLUMNS,
    SPLICED_KEYS,
    Evaluation,
    History,
    absorption_figures,
    probe_figures,
    read_histories,
    read_object,
    reading_order,
    whole_history,
)
from sae_core.utils.files import file_sha256

NAMED = 3
"""Up to this many models or hooks are named in the page's first sentence; more are counted."""

HASHED = "weights.pt"

THEME = {
    plots.INK: "ink",
    plots.MUTED: "muted",
    plots.GRID: "grid",
    "#ffffff": "card",
    **{colour: f"s{index}" for index, colour in enumerate(plots.COLOURS[:6])},
}
"""The plots' colours, and the variables of the page's style that take their place."""


class Run(NamedTuple):
    """An SAE, and what is known of it."""

    evaluation: Evaluation
    history: History
    config: dict[str, Any]
    """Its `config.json`."""
    weights_sha256: str
    features: dict[str, Any] | None = None
    """The figures of its features."""

    @property
    def name(self) -> str:
        return self.evaluation["run_name"]

    @property
    def origin(self) -> dict[str, Any]:
        return self.config.get("metadata", {})


@dataclass(frozen=True)
class Making:
    """How all SAEs were made."""

    environment: Environment
    sources: Sources | None = None
    jobs: Sequence[Job] = ()
    models: Sequence[dict[str, Any]] = ()
    """Records of the models."""
    config: str = ""
    """The workflow's configuration, YAML."""
    config_path: str = "results/config.yaml"
    """Where it is."""
    feature_pages: str = "features"
    """Folder of the pages about features, relative to this page."""


def read_run(evaluation: Path, folder: Path, features: Path) -> Run:
    """Read what is known of an SAE: its evaluation, its directory, the figures of its features.

    Raises:
        SAEError: a file is missing, not JSON, or lacks a key.
    """
    config = read_object(folder / "config.json", "SAE configuration", ())
    history = folder / "history.json"
    # Directories of this trainer's predecessor may have none, and have no hash of their weights.
    is_there = history.exists() or "weights_sha256" in config
    return Run(
        read_object(evaluation, "evaluation", EVALUATION_KEYS),
        read_histories([history])[0] if is_there else whole_history({}),
        config,
        file_sha256(folder / HASHED),
        read_object(features, "analysis of features", ("active", "position", "n_tokens")),
    )


def report_page(runs: Sequence[Run], making: Making) -> str:
    """The page: the summary, the plots of all, a section for each SAE, and how they were made."""
    ordered = sorted(runs, key=lambda run: reading_order(run.name))
    evaluations = [run.evaluation for run in ordered]
    recovered = plots.l0_against_loss_recovered(evaluations)
    fvu = plots.l0_against_fvu(evaluations)
    return render(
        "report.html.j2",
        "report.css.j2",
        "report.js.j2",
        columns=COLUMNS,
        splices=OTHER_SPLICES,
        spliced_keys=SPLICED_KEYS,
        of_features=_of_features(ordered),
        kinds=_named((e["sae_type"] for e in evaluations), "kinds"),
        models=_named((e["model_name"] for e in evaluations), "models"),
        hooks=_named((e["hook_spec"] for e in evaluations), "hooks"),
        recovered=_inline(recovered, "recovered", "Loss recovered against L0, one point per SAE"),
        fvu=_inline(fvu, "fvu", "Unexplained variance against L0, one point per SAE"),
        dead_tokens=sorted({run.features["n_tokens"] for run in ordered if run.features}),
        comparison=_comparison_captions(evaluations),
        saes=[_sae(index, run) for index, run in enumerate(ordered, start=1)],
        making=making,
    )


def _of_features(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The sections about figures of features, without those that no SAE has figures for."""
    sections = (
        (
            "probes",
            "Telling the subjects apart",
            "Linear probes say which of the texts' subjects a window is about: from its mean "
            "activation, or from a few features of the SAE.",
            PROBE_COLUMNS,
            probe_figures,
        ),
        (
            "absorption",
            "First letters of words",
            "A probe of the activation tells with which letter a word of the model's vocabulary "
            "begins. The features for that letter should be active on all words that begin with "
            "it; where features of the words themselves stand in for them, they are absorbed.",
            ABSORPTION_COLUMNS,
            absorption_figures,
        ),
    )
    found = []
    for anchor, title, text, columns, figures_of in sections:
        figures = {run.name: of for run in runs if (of := figures_of(run.features))}
        if figures:
            section = {"anchor": anchor, "title": title, "text": text}
            found.append(section | {"columns": columns, "figures": figures})
    return found


def _sae(index: int, run: Run) -> dict[str, Any]:
    """What the template needs to know of one SAE."""
    anchor, name = f"sae-{index}", run.name
    curves, density = plots.loss_curves(run.history, name), plots.density(run.evaluation)
    block_mse = plots.block_mse(run.evaluation)
    return {
        "anchor": anchor,
        "run": run,
        "evaluation": run.evaluation,
        "origin": run.origin,
        "features": run.features,
        "dead": _dead(run.features, run.evaluation["d_sae"]),
        "captions": _captions(run),
        "loss_curves": _inline(curves, f"{anchor}-loss", f"Loss curves of {name}"),
        "density": _inline(density, f"{anchor}-density", f"Feature densities of {name}"),
        "block_mse": _inline(block_mse, f"{anchor}-mse", f"Error after each layer of {name}"),
    }


def _captions(run: Run) -> dict[str, str]:
    """What the plots of one SAE show."""
    history, n_tokens = run.history, run.evaluation["n_tokens"]
    if not history["epoch"]:
        loss = "The history of the training is not known."
    else:
        idle = run.config.get("n_batches_to_dead")
        lately = f"the last {idle:,} batches" if idle else "the last batches"
        loss = "Training: the mean over an epoch."
        if "val_loss" in history:
            loss += (
                " Validation: after it, with the threshold that inference uses and without the "
                "auxiliary loss on features that do not fire. The epoch with the least validation "
                "loss is exported"
            )
            loss += ", of those in the end-to-end phase." if plots.has_phase(history) else "."
        loss += f" Idle: fired on no token of {lately} of the training."
    return {
        "loss": loss,
        "density": f"How often features fire on the {n_tokens:,} evaluated tokens. Features far to "
        "the left are rare, features near 0 fire on almost every token.",
        "block_mse": "How large the SAE's error is after each later layer.",
    }


def _comparison_captions(evaluations: Sequence[Evaluation]) -> tuple[str, str]:
    """Of the two plots of all SAEs."""
    lines = " Lines join the SAEs of a hook that no other SAE beats in both figures."
    recovered, fvu = (
        lines if plots.has_front(evaluations, what) else ""
        for what in (plots.LOSS_RECOVERED, plots.FVU)
    )
    return (
        "Up and to the left is better. At 1, the dashed line, the model predicts as well with the "
        f"SAE as without it.{recovered}",
        f"Down and to the left is better. At 0 the SAE leaves nothing unexplained.{fvu}",
    )


def _dead(features: dict[str, Any] | None, d_sae: int) -> float | None:
    """The share of features that are active on no token of all texts."""
    return None if features is None else 1 - features["active"] / d_sae


def _named(values: Iterable[str], what: str) -> str:
    distinct = sorted(set(values), key=reading_order)
    return ", ".join(distinct) if len(distinct) <= NAMED else f"{len(distinct)} {what}"


def _inline(svg: bytes, prefix: str, label: str) -> Markup:
    """An SVG file as an element of a page: its ids must not meet those of another plot, and its
    colours follow the page's, which may be dark."""
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text, count=2)
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    for colour, variable in THEME.items():
        text = re.sub(rf"(fill|stroke): {colour}\b", rf"\g<1>: var(--{variable})", text)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))
