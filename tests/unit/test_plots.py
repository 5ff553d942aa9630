"""The plots: what they show, how they are labelled, and that their bytes stay the same."""

import json
import math
import re

import pytest
from page_checks import words
from reported import (
    a_history,
    an_evaluation,
)
from running import run_script

from sae_core.reporting import plots


def test_loss_curves_show_both_losses_l0_and_dead_features():
    shown = words(plots.loss_curves(a_history(), "my run"))
    expected = {"my run", "Loss", "training", "validation", "L0", "Idle features, %"}
    assert expected <= set(shown)


def test_loss_curves_of_one_epoch_without_validation():
    shown = words(plots.loss_curves(a_history(1, validation=False), "my run"))
    assert "training" in shown and "validation" not in shown


@pytest.mark.parametrize(
    ("column", "marked"), [([None, None, 0.3], True), ([0.5, 0.4, 0.3], False), (None, False)]
)
@pytest.mark.parametrize("name", ["logit_kl", "total_post_layer_mse"])
def test_loss_curves_show_where_the_end_to_end_phase_begins(name, column, marked):
    history = a_history() | ({name: column, f"val_{name}": column} if column else {})
    assert ("end-to-end from here" in words(plots.loss_curves(history, "my run"))) == marked


def test_density_names_the_run_and_counts_what_never_fired():
    shown = words(plots.density(an_evaluation()))
    assert "org_model.blocks.9.hook_resid_post.btop32sae.exp8" in shown
    assert "silent on these 12,288 tokens: 12 of 512 (2.3%)" in shown


def test_one_point_carries_its_run_name():
    evaluation = an_evaluation()
    shown = words(plots.l0_against_loss_recovered([evaluation]))
    assert {evaluation["run_name"], evaluation["hook_spec"], "batch_topk"} <= set(shown)


def test_points_carry_what_tells_them_apart():
    evaluations = [an_evaluation(9), an_evaluation(20), an_evaluation(20, k=0)]
    shown = words(plots.l0_against_loss_recovered(evaluations))
    assert {"layer 9 k 32", "layer 20 k 32", "layer 20 standard"} <= set(shown)


def test_points_that_nothing_else_tells_apart_carry_their_run_names():
    evaluations = [an_evaluation(name="seed-1"), an_evaluation(name="seed-2")]
    assert {"seed-1", "seed-2"} <= set(words(plots.l0_against_loss_recovered(evaluations)))


def test_forty_points_each_have_a_label():
    evaluations = [an_evaluation(layer, k) for layer in range(10) for k in (16, 32, 64, 128)]
    shown = words(plots.l0_against_loss_recovered(evaluations))
    assert {f"layer {layer} k {k}" for layer in range(10) for k in (16, 128)} <= set(shown)


def pareto(points, key="loss_recovered"):
    draw = {"loss_recovered": plots.l0_against_loss_recovered, "fvu": plots.l0_against_fvu}[key]
    evaluations = [an_evaluation(9, k=k, l0=k, **{key: y}) for k, y in points]
    lines = re.findall(r'<path d="(M [^"]*)"[^>]*stroke-opacity: 0.6', draw(evaluations).decode())
    return [line.count("L") + 1 for line in lines]


def test_a_line_joins_the_saes_that_no_sparser_one_beats():
    assert pareto([(8, 0.9), (16, 0.95), (32, 0.94), (64, 0.99)]) == [3]
    assert pareto([(8, 0.3), (16, 0.2), (32, 0.25), (64, 0.1)], "fvu") == [3]
    assert pareto([(8, 0.99), (16, 0.95)]) == [] == pareto([(8, 0.9)])


def ticks(svg):
    """The numbers on the axes."""
    return [float(w.replace("−", "-")) for w in words(svg) if re.fullmatch(r"[−-]?[\d.]+", w)]


def test_no_axis_goes_below_zero_for_what_cannot_be_negative():
    close = [an_evaluation(9, fvu=0.001, k=8), an_evaluation(9, fvu=0.4)]
    assert min(ticks(plots.l0_against_fvu(close))) == 0
    falling = a_history() | {"loss": [1.0, 0.5, 0.0001], "val_loss": [1.0, 0.4, 0.0002]}
    assert min(ticks(plots.loss_curves(falling, "my run"))) == 0
    below = [an_evaluation(9, loss_recovered=-0.5, k=8), an_evaluation(9)]
    assert min(ticks(plots.l0_against_loss_recovered(below))) < 0, "this one can be"


def test_the_other_picture_has_fvu():
    shown = words(plots.l0_against_fvu([an_evaluation(9), an_evaluation(20)]))
    assert "fraction of variance unexplained" in shown and "loss recovered" not in shown


def test_a_point_without_a_value_is_counted_not_drawn():
    evaluations = [an_evaluation(9), an_evaluation(20, loss_recovered=math.nan)]
    shown = words(plots.l0_against_loss_recovered(evaluations))
    assert "1 without a finite value, not drawn" in shown
    assert "blocks.20.hook_resid_post" not in shown


def test_names_are_not_read_as_mathematics_or_markup():
    name = r"cost_$x^2$ <b>&"
    assert name in words(plots.density(an_evaluation(name=name)))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.loss_curves(a_history(), "my run"),
        lambda: plots.density(an_evaluation()),
        lambda: plots.block_mse(an_evaluation()),
        lambda: plots.l0_against_loss_recovered([an_evaluation(9), an_evaluation(20)]),
        lambda: plots.l0_against_fvu([an_evaluation(9), an_evaluation(20)]),
    ],
)
def test_plots_have_the_same_bytes_each_time(draw):
    assert draw() == draw()
    assert b"<dc:date>" not in draw()


@pytest.fixture
def files(tmp_path):
    """Two evaluations and their histories on disk."""
    evaluations, histories = [], []
    for layer in (20, 9):
        evaluations.append(tmp_path / f"evaluation{layer}.json")
        evaluations[-1].write_text(json.dumps(an_evaluation(layer)))
        histories.append(tmp_path / f"history{layer}.json")
        histories[-1].write_text(json.dumps(a_history()))
    return evaluations, histories


def test_plot_script(files, tmp_path):
    [evaluation, _], [history, _] = files
    curves, density = tmp_path / "plots" / "curves.svg", tmp_path / "plots" / "density.svg"
    done = run_script(
        *("plot.py", "--evaluation", evaluation, "--history", history),
        *("--loss-curves", curves, "--density", density),
    )
    assert done.returncode == 0, done.stderr
    name = an_evaluation(20)["run_name"]
    assert name in words(curves.read_bytes()) and name in words(density.read_bytes())
