"""The report: one HTML page that holds all it shows and needs neither a network nor scripts."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from sae_core.reporting import plots
from sae_core.reporting.summary import COLUMNS, Evaluation, History, reading_order, show

TEMPLATES = Path(__file__).parent / "templates"

NAMED = 3
"""Up to this many models or hooks are named in the page's first sentence; more are counted."""


def report_page(evaluations: Sequence[Evaluation], histories: Sequence[History]) -> str:
    """The page about all SAEs: the summary, the plot of all, and a section for each.

    Args:
        histories: the training history of each evaluation's SAE, in the same order.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["show"] = show
    pairs = zip(evaluations, histories, strict=True)
    ordered = sorted(pairs, key=lambda pair: reading_order(pair[0]["run_name"]))
    comparison = plots.l0_against_loss_recovered([evaluation for evaluation, _ in ordered])
    return environment.get_template("report.html.j2").render(
        columns=COLUMNS,
        kinds=_named((e["sae_type"] for e in evaluations), "kinds"),
        models=_named((e["model_name"] for e in evaluations), "models"),
        hooks=_named((e["hook_spec"] for e in evaluations), "hooks"),
        comparison=_inline(comparison, "all", "Loss recovered against mean L0, one point an SAE"),
        saes=[_sae(index, *pair) for index, pair in enumerate(ordered, start=1)],
    )


def _sae(index: int, evaluation: Evaluation, history: History) -> dict[str, Any]:
    """What the template needs to know of one SAE."""
    anchor, name = f"sae-{index}", evaluation["run_name"]
    curves, density = plots.loss_curves(history, name), plots.density(evaluation)
    block_mse = plots.block_mse(evaluation)
    return {
        "anchor": anchor,
        "evaluation": evaluation,
        "loss_curves": _inline(curves, f"{anchor}-loss", f"Loss curves of {name}"),
        "density": _inline(density, f"{anchor}-density", f"Feature densities of {name}"),
        "block_mse": _inline(block_mse, f"{anchor}-mse", f"Error after each layer of {name}"),
    }


def _named(values: Iterable[str], what: str) -> str:
    distinct = sorted(set(values), key=reading_order)
    return ", ".join(distinct) if len(distinct) <= NAMED else f"{len(distinct)} {what}"


def _inline(svg: bytes, prefix: str, label: str) -> Markup:
    """An SVG file as an element of a page, where its ids must not meet those of another plot."""
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text, count=2)
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))
