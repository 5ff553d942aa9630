"""The plots, as SVG files: the same input gives the same bytes, and no global state is kept.

The colours are Okabe and Ito's, which colour-blind readers can tell apart. Text stays text, so
that a page can set it in its own typeface; names are shown unchanged, never as mathematics.
"""

import io
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from textwrap import fill
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from sae_core.reporting.point_labels import Look, place_labels
from sae_core.reporting.summary import Evaluation, History

INK, MUTED, GRID = "#1f2933", "#5f6b7a", "#e4e8ec"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK)
TRAINING, VALIDATION = COLOURS[:2]
MARKERS = {
    "batch_topk": "o",
    "topk": "^",
    "matryoshka_batch_topk": "P",
    "multi_batch_topk": "h",
    "jumprelu": "v",
    "gated": "X",
    "standard": "s",
}

WIDTH, WIDE = 5.6, 7.6
"""Widths of a plot, in inches: a usual one, and one with many points."""

FEW_POINTS = 12

LOOK = {
    "figure.dpi": 72,  # a pixel is a point, as in the SVG
    "svg.fonttype": "none",
    "svg.hashsalt": "sae_core",
    "text.parse_math": False,
    "text.color": INK,
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
}

plot = style.context(["default", LOOK])
"""Decorates a function that draws: what it sets is set back when the function is done."""


@plot
def loss_curves(history: History, title: str) -> bytes:
    """Training and validation loss over the epochs; below it, L0 and idle features: those that have
    not fired for a number of batches.

    Args:
        history: `history.json`; without `val_*` lists only training is drawn.
        title: of the plot, such as the run name.
    """
    figure = _figure(title, WIDTH, 5.2)
    grid = figure.add_gridspec(2, 2, height_ratios=(5, 3))
    loss = figure.add_subplot(grid[0, :], title="Loss")
    l0 = figure.add_subplot(grid[1, 0], title="L0", xlabel="epoch")
    dead = figure.add_subplot(grid[1, 1], title="Idle features, %", xlabel="epoch")
    _over_epochs(loss, history, "loss")
    _over_epochs(l0, history, "sparsity")
    _over_epochs(dead, history, "dead_feature_percentage")
    for axes in (l0, dead):
        _from_zero(axes)
    _not_below_zero(loss)
    _end_to_end_phase(loss, history)
    if history["epoch"]:
        figure.legend(*loss.get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return _svg(figure)


@plot
def density(evaluation: Evaluation) -> bytes:
    """Histogram of the feature densities; below it, how many fired on none of the tokens."""
    histogram = evaluation["density_histogram"]
    never, d_sae, n_tokens = histogram["never"], evaluation["d_sae"], evaluation["n_tokens"]
    figure = _figure(evaluation["run_name"], WIDTH, 4.8)
    silent = f"silent on these {n_tokens:,} tokens: {never:,} of {d_sae:,} ({never / d_sae:.1%})"
    axes = figure.add_subplot(
        title="Feature density",
        xlabel=f"share of tokens on which a feature fires, log10\n{silent}",
        ylabel="features",
    )
    axes.stairs(histogram["counts"], histogram["log10_edges"], fill=True, color=COLOURS[0])
    axes.margins(x=0)
    _from_zero(axes)
    return _svg(figure)


@plot
def block_mse(evaluation: Evaluation) -> bytes:
    """Mean squared error of the activations after each layer that follows the hook."""
    errors = {int(k): v for k, v in evaluation["block_mse"].items() if _is_finite(v) and v > 0}
    figure = _figure(evaluation["run_name"], WIDTH, 3.2)
    axes = figure.add_subplot(title="Error after the hook", xlabel="layer", ylabel="MSE, log scale")
    axes.plot(list(errors), list(errors.values()), "-o", color=COLOURS[0])
    axes.set_yscale("log")
    axes.set_ylim(min(errors.values(), default=1) / 2, max(errors.values(), default=1) * 2)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return _svg(figure)


class _Fidelity(NamedTuple):
    """A figure of an SAE that is drawn against its L0."""

    key: str
    title: str
    name: str
    ideal: float
    """What a perfect SAE has, drawn as a dashed line."""


LOSS_RECOVERED = _Fidelity("loss_recovered", "Loss recovered", "loss recovered", 1.0)
FVU = _Fidelity("fvu", "Unexplained variance", "fraction of variance unexplained", 0.0)


def l0_against_loss_recovered(evaluations: Sequence[Evaluation]) -> bytes:
    """One labelled point per SAE. The colour stands for the hook, the marker for the kind. A line
    joins the SAEs of a hook that no other SAE beats in both figures."""
    return _against_l0(evaluations, LOSS_RECOVERED)


def l0_against_fvu(evaluations: Sequence[Evaluation]) -> bytes:
    """The same for the fraction of variance unexplained."""
    return _against_l0(evaluations, FVU)


@plot
def _against_l0(evaluations: Sequence[Evaluation], what: _Fidelity) -> bytes:
    drawn = _drawn(evaluations, what)
    points = np.array([(e["l0"], e[what.key]) for e in drawn]).reshape(-1, 2)
    colours = _hook_colours(drawn)
    left_out = len(evaluations) - len(drawn)
    title = f"{left_out} without a finite value, not drawn" if left_out else ""
    width, columns = (WIDTH, 2) if len(drawn) <= FEW_POINTS else (WIDE, 3)
    n_entries = len(colours) + len({e["sae_type"] for e in drawn})
    figure = _figure(title, width, 4.4 + 0.2 * math.ceil(n_entries / columns))
    axes = figure.add_subplot(
        title=f"{what.title} against sparsity",
        xlabel="L0 (log scale)",
        ylabel=what.name,
    )
    axes.axhline(what.ideal, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    for evaluation, (x, y) in zip(drawn, points, strict=True):
        colour, marker = colours[evaluation["hook_spec"]], _marker(evaluation["sae_type"])
        axes.plot(x, y, marker, color=colour, markersize=7, markeredgecolor="white")
    for front in _pareto_fronts(drawn, what):
        colour = colours[front[0]["hook_spec"]]
        line = [[e["l0"] for e in front], [e[what.key] for e in front]]
        axes.plot(*line, color=colour, linewidth=1.2, alpha=0.6, zorder=1.5)
    _frame_points(axes, points, what.ideal)
    _legend(axes, drawn, colours, columns)
    place_labels(figure, axes, points, _labels(drawn), MUTED)
    return _svg(figure)


def has_front(evaluations: Sequence[Evaluation], what: _Fidelity) -> bool:
    """A line joins some of the points."""
    return any(_pareto_fronts(_drawn(evaluations, what), what))


def _drawn(evaluations: Sequence[Evaluation], what: _Fidelity) -> list[Evaluation]:
    return [e for e in evaluations if _is_finite(e["l0"]) and _is_finite(e[what.key])]


def _pareto_fronts(
    evaluations: Sequence[Evaluation], what: _Fidelity
) -> Iterator[list[Evaluation]]:
    """For each model and hook the SAEs that no other one beats in both figures, by L0; fronts of
    a single SAE are left out."""
    by_hook: dict[tuple[str, str], list[Evaluation]] = {}
    for evaluation in evaluations:
        hook = str(evaluation["model_name"]), evaluation["hook_spec"]
        by_hook.setdefault(hook, []).append(evaluation)
    for group in by_hook.values():
        front: list[Evaluation] = []
        for evaluation in sorted(group, key=lambda e: (e["l0"], abs(e[what.key] - what.ideal))):
            if not front or abs(evaluation[what.key] - what.ideal) < abs(
                front[-1][what.key] - what.ideal
            ):
                front.append(evaluation)
        if len(front) > 1:
            yield front


def _figure(title: str, width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        lines = fill(title, 64, break_on_hyphens=False)
        figure.suptitle(lines, x=0.02, ha="left", fontsize=10, color=MUTED)
    return figure


def _svg(figure: Figure) -> bytes:
    file = io.BytesIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=metadata)
    return file.getvalue()


def _note(axes: Axes, note: str) -> None:
    axes.set_title(note, loc="right", fontsize=11, fontweight="normal", color=MUTED)


def _from_zero(axes: Axes) -> None:
    """Let the y axis begin at zero, with room above the data."""
    top = axes.dataLim.ymax  # infinite where nothing is drawn
    axes.set_ylim(0, 1.15 * top if 0 < top < math.inf else 1)


def _not_below_zero(axes: Axes) -> None:
    """Let the y axis begin at zero at the lowest, if nothing drawn is negative."""
    if axes.dataLim.ymin >= 0:
        axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))


def _over_epochs(axes: Axes, history: History, key: str) -> None:
    epochs = _column(history, "epoch")
    if not len(epochs):  # trained elsewhere
        _note(axes, "not recorded")
        return
    series = (("training", key, TRAINING, "-o"), ("validation", f"val_{key}", VALIDATION, "--s"))
    for label, name, colour, form in series:
        if name in history:
            axes.plot(epochs, _column(history, name), form, color=colour, label=label)
    axes.set_xlim(epochs.min() - 0.5, epochs.max() + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _end_to_end_phase(axes: Axes, history: History) -> None:
    """A line where the loss gains the end-to-end terms, if that is not the beginning."""
    if has_phase(history):
        start = _column(history, "epoch")[_phase_start(history)] - 0.5
        look: Look = {"color": MUTED, "linewidth": 0.8, "linestyle": (0, (4, 3))}
        axes.axvline(start, **look, label="end-to-end from here")


def has_phase(history: History) -> bool:
    """The end-to-end losses begin after the first epoch."""
    return _phase_start(history) > 0


def _phase_start(history: History) -> int:
    column = history.get("logit_kl") or history.get("total_post_layer_mse") or []
    return next((i for i, value in enumerate(column) if value is not None), 0)


def _column(history: History, key: str) -> np.ndarray:
    """One number an epoch; NaN where there is none."""
    return np.array(history[key], dtype=float)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _marker(sae_type: str) -> str:
    return MARKERS.get(sae_type, "D")


def _layer(hook_spec: str) -> tuple[int, str]:
    """`blocks.9.hook_resid_post` -> (9, "hook_resid_post"); other names get layer -1."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_spec)
    return (int(match[1]), match[2]) if match else (-1, hook_spec)


def _hook_colours(evaluations: Sequence[Evaluation]) -> dict[str, str]:
    """One colour per hook, in the order of the layers; many hooks get shades from dark to light."""
    hooks = sorted({e["hook_spec"] for e in evaluations}, key=_layer)
    if len(hooks) <= len(COLOURS):
        return dict(zip(hooks, COLOURS, strict=False))
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(hooks)))
    return dict(zip(hooks, map(to_hex, shades), strict=True))


def _legend(
    axes: Axes, evaluations: Sequence[Evaluation], colours: Mapping[str, str], columns: int
) -> None:
    """The hooks and the kinds of SAE, below the plot."""
    kinds = sorted({e["sae_type"] for e in evaluations})
    look: Look = {"linestyle": "", "markersize": 6}
    hooks = [Line2D([], [], marker="o", color=c, label=h, **look) for h, c in colours.items()]
    axes.figure.legend(
        handles=[
            *hooks,
            *(Line2D([], [], marker=_marker(k), color=MUTED, label=k, **look) for k in kinds),
        ],
        loc="outside lower left",
        ncols=columns,
        fontsize=11,
    )


def _frame_points(axes: Axes, points: np.ndarray, ideal: float) -> None:
    """Set the axes' limits: room around the points, and the line of a perfect SAE in sight."""
    l0, figures = points.T if len(points) else (np.array([1]), np.array([ideal]))
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xlim(max(0, l0.min() / 2.2), l0.max() * 2.2 + 0.1)
    axes.xaxis.set_major_formatter("{x:g}")
    low, high = min(figures.min(), ideal), max(figures.max(), ideal)
    room = max(0.15 * (high - low), 0.005)
    axes.set_ylim(0 if ideal == low == 0 else low - room, high + room)


def _labels(evaluations: Sequence[Evaluation]) -> list[str]:
    """What distinguishes each SAE from the others, or its run name if nothing short does."""
    traits = [_traits(evaluation) for evaluation in evaluations]
    differ = [len(set(values)) > 1 for values in zip(*traits, strict=True)]
    labels = [" ".join(filter(None, compress(values, differ))) for values in traits]
    count = Counter(labels)
    return [
        label if label and count[label] == 1 else evaluation["run_name"]
        for label, evaluation in zip(labels, evaluations, strict=True)
    ]


def _traits(evaluation: Evaluation) -> tuple[str, ...]:
    layer, hook = _layer(evaluation["hook_spec"])
    return (
        evaluation["model_name"].rsplit("/", 1)[-1],
        f"layer {layer}" if layer >= 0 else "",
        hook,
        f"k {evaluation['top_k']}" if evaluation["top_k"] else evaluation["sae_type"],
        f"×{evaluation['d_sae'] / evaluation['d_in']:g}",
    )
