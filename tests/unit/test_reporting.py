"""Plots, the summary, the page, and the two programs that make them."""

import csv
import io
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sae_core.errors import SAEError
from sae_core.files import write_file
from sae_core.reporting import plots
from sae_core.reporting.page import report_page
from sae_core.reporting.summary import (
    SUMMARY_COLUMNS,
    TABLE_WIDTH,
    read_evaluations,
    read_histories,
    summary_csv,
    summary_table,
)

ROOT = Path(__file__).resolve().parents[2]


def an_evaluation(layer=9, k=32, name=None, **changes):
    hook = f"blocks.{layer}.hook_resid_post"
    return {
        "run_name": name or f"org_model.{hook}.btop{k}sae.exp8",
        "model_name": "org/model",
        "hook_spec": hook,
        "sae_type": "batch_topk" if k else "standard",
        "d_in": 64,
        "d_sae": 512,
        "top_k": k,
        "l0": k + 1 / 3,
        "l0_quantiles": {"0.05": 11.0, "0.25": 22.0, "0.5": 31.0, "0.75": 41.0, "0.95": 63.0},
        "fvu": 0.1 + layer / 700,
        "fvu_with_outliers": 0.05,
        "ce_clean": 2.1234567890123456,
        "ce_sae": 2.3,
        "ce_mean_ablation": 7.7,
        "ce_zero_ablation": 11.1,
        "loss_recovered": 1 - 0.4 / (k + 8) - layer / 1000,
        "kl": 0.21,
        "dead_fraction": 12 / 512,
        "density_histogram": {
            "log10_edges": [-4.0, -3.0, -2.0, -1.0, 0.0],
            "counts": [50, 300, 120, 30],
            "never": 12,
        },
        "block_mse": {str(later): 0.01 * later for later in range(layer + 1, 30)},
        "block_mse_mean": 0.2,
        "block_mse_min": 0.1,
        "block_mse_max": 0.3,
        "n_tokens": 12288,
        "n_windows": 48,
        "n_outlier_tokens": 51,
    } | changes


def a_history(n_epochs=3, validation=True):
    history = {
        "epoch": list(range(1, n_epochs + 1)),
        "loss": [0.5 / epoch for epoch in range(1, n_epochs + 1)],
        "sparsity": [32.0] * n_epochs,
        "dead_feature_percentage": [1.5] * n_epochs,
    }
    if validation:
        history |= {"val_loss": history["loss"], "val_sparsity": [31.0] * n_epochs}
    return history


def words(svg: bytes) -> list[str]:
    """The texts of an SVG file, which must be well-formed."""
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    return ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("}text")]


def page_of(*evaluations):
    return report_page(evaluations, [a_history()] * len(evaluations))


# --- plots


def test_loss_curves_show_both_losses_l0_and_dead_features():
    shown = words(plots.loss_curves(a_history(), "my run"))
    expected = {"my run", "Loss", "training", "validation", "Mean L0", "Dead features, %"}
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
    assert "never fired: 12 of 512 (2.3%)" in shown


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
    ],
)
def test_plots_have_the_same_bytes_each_time(draw):
    assert draw() == draw()
    assert b"<dc:date>" not in draw()


# --- the summary


def test_csv_has_every_number_in_full_sorted_by_run_name():
    evaluations = [an_evaluation(9, name="b"), an_evaluation(20, name="a")]
    rows = list(csv.DictReader(io.StringIO(summary_csv(evaluations))))
    assert tuple(rows[0]) == SUMMARY_COLUMNS
    assert [row["run_name"] for row in rows] == ["a", "b"]
    for row, evaluation in zip(rows, reversed(evaluations), strict=True):
        read = {key: type(evaluation[key])(value) for key, value in row.items()}
        assert read == {key: evaluation[key] for key in SUMMARY_COLUMNS}


def test_table_is_aligned_and_in_the_order_of_the_layers():
    heading, rule, first, second = summary_table([an_evaluation(20), an_evaluation(9)]).splitlines()
    assert len(heading) == len(rule) == len(first) == len(second) <= TABLE_WIDTH
    assert ".9." in first and ".20." in second
    assert first.split()[1:4] == ["32.3", "0.1129", "2.123"]


def test_table_shortens_long_names_at_the_start():
    table = summary_table([an_evaluation(name="x" * 200 + ".btop32sae.exp8")])
    assert max(map(len, table.splitlines())) == TABLE_WIDTH
    assert "xxx.btop32sae.exp8 " in table


def test_evaluations_are_read_in_the_order_given(tmp_path):
    paths = [tmp_path / "b.json", tmp_path / "a.json"]
    for path in paths:
        path.write_text(json.dumps(an_evaluation(name=path.stem)))
    assert [e["run_name"] for e in read_evaluations(paths)] == ["b", "a"]


@pytest.mark.parametrize(
    "content, complaint",
    [
        (None, "not a readable"),
        (b'{"run_name": "a", ', "not a readable"),
        (b"\xff\xfe", "not a readable"),
        (b"[]", "lacks"),
        (b'{"run_name": "a"}', "lacks"),
    ],
)
@pytest.mark.parametrize("read", [read_evaluations, read_histories])
def test_a_bad_file_is_named(tmp_path, read, content, complaint):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SAEError, match=complaint) as caught:
        read([path])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_key_is_named(tmp_path):
    evaluation = an_evaluation()
    del evaluation["kl"]
    (tmp_path / "e.json").write_text(json.dumps(evaluation))
    with pytest.raises(SAEError, match="lacks kl;"):
        read_evaluations([tmp_path / "e.json"])


def test_write_file_makes_the_folder_and_names_what_it_cannot_write(tmp_path):
    write_file(tmp_path / "new" / "a.txt", "text")
    assert (tmp_path / "new" / "a.txt").read_text() == "text"
    with pytest.raises(SAEError, match="a.txt/b.txt: cannot be written"):
        write_file(tmp_path / "new" / "a.txt" / "b.txt", "text")


# --- the page


class Elements(HTMLParser):
    """The tags, attributes, ids and links of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            self.attributes.add(name)
            if name == "id":
                self.ids.append(value)
            elif name in ("src", "href", "xlink:href"):
                self.links.append(value)


def test_page_has_a_section_for_every_run():
    evaluations = [an_evaluation(layer) for layer in (9, 20, 4)]
    page = page_of(*evaluations)
    headings = re.findall(r'<h2 class="name">(.*?)</h2>', page)
    assert headings == [f"org_model.blocks.{n}.hook_resid_post.btop32sae.exp8" for n in (4, 9, 20)]
    assert "12,288 in 48 windows" in page and "2.34%" in page


def test_page_needs_nothing_from_outside_and_its_links_lead_somewhere():
    page = page_of(an_evaluation(9), an_evaluation(20))
    elements = Elements(page)
    assert not elements.tags & {"script", "link", "iframe", "img"}
    assert not re.search(r"url\(\s*[\"']?(?!#)|@import", page)
    assert len(elements.ids) == len(set(elements.ids))
    assert {link.removeprefix("#") for link in elements.links} <= set(elements.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(elements.ids)


def test_page_escapes_hostile_names():
    evil = "<script>alert('x')</script>\" onload=\"x"
    page = page_of(an_evaluation(name=evil, model_name=evil, hook_spec=evil, sae_type=evil))
    elements = Elements(page)
    assert "script" not in elements.tags and "onload" not in elements.attributes
    assert "&lt;script&gt;" in page


def test_page_survives_what_could_not_be_measured():
    page = page_of(
        an_evaluation(
            loss_recovered=None,
            kl=math.nan,
            block_mse={},
            block_mse_mean=None,
            block_mse_min=None,
            block_mse_max=None,
        )
    )
    assert "<td>–</td>" in page and "nan" not in page.lower()


def test_page_and_table_need_no_torch():
    program = "import sys, sae_core.reporting.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


# --- the programs


def run_script(name, *arguments):
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / name, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


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


def summarise(evaluations, histories, folder):
    return run_script(
        *("summarise.py", "--evaluations", *evaluations, "--histories", *histories),
        *("--summary", folder / "summary.csv", "--pareto", folder / "pareto.svg"),
        *("--report", folder / "report.html"),
    )


def test_summarise_script(files, tmp_path):
    evaluations, histories = files
    done = summarise(evaluations, histories, tmp_path / "results")
    assert done.returncode == 0, done.stderr
    read = read_evaluations(evaluations)
    assert done.stdout == summary_table(read)
    assert (tmp_path / "results" / "summary.csv").read_text() == summary_csv(read)
    assert "layer 9" in words((tmp_path / "results" / "pareto.svg").read_bytes())
    assert (tmp_path / "results" / "report.html").read_text() == page_of(*read)


def test_summarise_script_names_a_bad_file_and_writes_nothing(files, tmp_path):
    evaluations, histories = files
    evaluations[1].write_text("{")
    done = summarise(evaluations, histories, tmp_path / "results")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {evaluations[1]}: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_summarise_script_needs_a_history_for_each_evaluation(files, tmp_path):
    evaluations, histories = files
    done = summarise(evaluations, histories[:1], tmp_path / "results")
    assert done.returncode == 1
    assert done.stderr.startswith("error: --histories: 1 for 2 evaluations")
