"""Plots, the summary, the page, and the two programs that make them."""

import csv
import hashlib
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
from reported import (
    a_config,
    a_corpus,
    a_history,
    a_label,
    a_making,
    a_run,
    an_entry,
    an_evaluation,
    entries,
    write_features,
    write_lines,
    write_run,
)

from sae_core.reporting import plots
from sae_core.reporting.feature_data import CHUNK
from sae_core.reporting.feature_page import (
    feature_page,
    read_corpus,
    read_labels,
)
from sae_core.reporting.map_page import map_page
from sae_core.reporting.page import read_run, report_page
from sae_core.reporting.provenance import commit, read_jobs
from sae_core.reporting.summary import (
    ABSORPTION_COLUMNS,
    COLUMNS,
    PROBE_COLUMNS,
    SPLICED_COLUMNS,
    SUMMARY_COLUMNS,
    TABLE_WIDTH,
    feature_figures,
    read_evaluations,
    read_histories,
    summary_csv,
    summary_table,
)
from sae_core.utils.errors import SAEError
from sae_core.utils.files import write_file
from sae_core.utils.records import read_json_lines

ROOT = Path(__file__).resolve().parents[2]


def words(svg: bytes) -> list[str]:
    """The texts of an SVG file, which must be well-formed."""
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    return ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("}text")]


def page_of(*evaluations, **making):
    return report_page([a_run(e) for e in evaluations], a_making(**making))


# --- plots


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


# --- the summary


def test_csv_has_every_number_in_full_sorted_by_run_name():
    probes = feature_figures(a_corpus())
    evaluations = [an_evaluation(9, name="b") | probes, an_evaluation(20, name="a") | probes]
    rows = list(csv.DictReader(io.StringIO(summary_csv(evaluations))))
    assert tuple(rows[0]) == (*SUMMARY_COLUMNS, *PROBE_COLUMNS, *ABSORPTION_COLUMNS)
    assert [row["run_name"] for row in rows] == ["a", "b"]
    for row, evaluation in zip(rows, reversed(evaluations), strict=True):
        read = {key: type(evaluation[key])(value) for key, value in row.items()}
        assert read == {key: evaluation[key] for key in rows[0]}


def test_csv_has_no_probes_where_there_are_none():
    without = feature_figures(a_corpus(subjects=()) | {"absorption": None})
    (row,) = csv.DictReader(io.StringIO(summary_csv([an_evaluation() | without])))
    assert {row[key] for key in (*PROBE_COLUMNS, *ABSORPTION_COLUMNS)} == {""}


def test_page_has_the_figures_of_features_that_there_are():
    measured, neither = a_corpus(), a_corpus(subjects=()) | {"absorption": None}
    runs = [a_run(an_evaluation(9), measured), a_run(an_evaluation(20), neither)]
    page = report_page(runs, a_making())
    for title, shown in (
        ("Telling the subjects apart", ("0.950", "0.860")),
        ("First letters of words", ("0.125", "0.062", "1.50", "5")),
    ):
        [table] = re.findall(rf'aria-label="{title}">\n(.*?)</table>', page, re.DOTALL)
        assert table.count('<th scope="row">') == 1 and all(f">{n}<" in table for n in shown)


def test_table_is_aligned_and_in_the_order_of_the_layers():
    tables = summary_table([an_evaluation(20), an_evaluation(9)]).split("\n\n")
    for n, (titles, figures) in enumerate(
        [
            (0, ["32.3", "0.1129", "2.123", "2.300", "0.9810", "0.2100", "2.34%", "48"]),
            (1, ["2.900", "0.9100", "0.7700", "0"]),
            (1, ["2.250", "0.9870", "0.1900", "99"]),
        ]
    ):
        heading, rule, first, second = tables[n].splitlines()[titles:]
        assert len(heading) == len(rule) == len(first) == len(second) <= TABLE_WIDTH
        assert ".9." in first and ".20." in second and first.split()[1:] == figures
    assert "every token spliced" in tables[1] and "attention sinks" in tables[2]


def test_page_has_the_figures_of_every_splice():
    page = re.sub("<[^>]*>", " ", page_of(an_evaluation())).split()
    for figure in ("48,", "2.900", "0.9100", "0.7700", "2.250", "0.9870", "0.1900", "99"):
        assert figure in page
    cells = [f"| {column.heading} |" for column in SPLICED_COLUMNS.values()]
    assert len(set(cells)) == 8 and not {c.heading for c in COLUMNS.values()} & {
        c.heading for c in SPLICED_COLUMNS.values()
    }


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
    assert 'id="probes"' not in page and 'href="#absorption"' not in page, "without figures"


def assert_closed(page, outside=()):
    """Nothing is loaded, and its links lead to a place on it, or to pages beside it."""
    elements = Elements(page)
    assert not elements.tags & {"iframe", "img", "object", "embed", "base", "form"}
    assert not re.search(r"url\(\s*[\"']?(?!#)|@import|\bfetch\(|XMLHttpRequest|WebSocket", page)
    assert len(elements.ids) == len(set(elements.ids))
    links = {link for link in elements.links if not link.startswith("#feature=")} - {"data:,"}
    assert {link for link in links if not link.startswith("#")} == set(outside)
    assert {link[1:] for link in links if link.startswith("#")} <= set(elements.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(elements.ids)
    assert "default-src 'none'" in page  # browsers load nothing either


def test_page_needs_nothing_from_outside_and_its_links_lead_somewhere():
    assert_closed(page_of(an_evaluation(9), an_evaluation(20)))


def test_page_leads_to_the_features_where_they_are_known():
    runs = [a_run(an_evaluation(9), a_corpus()), a_run(an_evaluation(20))]
    page = report_page(runs, a_making())
    assert_closed(page, [f"features/{runs[0].name}.html"])
    assert "active on position 0 only" in page and "specific to chemistry" in page


def test_dead_has_one_meaning_and_its_number_of_tokens():
    """Dead: on no token of all texts. The evaluation's few tokens have another name."""
    page = report_page([a_run(an_evaluation(), a_corpus())], a_making())
    shown = " ".join(re.sub("<[^>]*>", " ", page).split())
    assert "active on no token of all texts: 12,000 tokens." in shown
    assert "dead: active on none of these tokens 22 (4.30%)" in shown
    assert "silent: features active on none of these tokens 2.34%" in shown
    assert "silent on these 12,288 tokens: 12 of 512 (2.3%)" in shown
    assert "the last 200 batches" in shown


def test_contents_lead_to_every_part():
    page = page_of(an_evaluation(9), an_evaluation(20))
    contents = re.search(r'<nav class="contents.*?</nav>', page, re.DOTALL)[0]
    links = re.findall(r'href="#([^"]*)"', contents)
    parts = ["summary", "splices", "fidelity", "sae-1", "sae-2", "texts", "jobs", "reproduce"]
    assert links == parts


@pytest.mark.parametrize(
    ("changes", "said", "unsaid"),
    [
        ({"history": a_history(validation=False)}, "the mean over an epoch", "Validation:"),
        ({"history": a_history()}, "Validation:", "end-to-end phase"),
        ({"history": a_history() | {"logit_kl": [None, 1.0, 1.0]}}, "end-to-end phase", "unknown"),
        ({"history": {"epoch": [], "loss": []}}, "history of the training is not", "Validation:"),
    ],
)
def test_captions_say_what_is_shown(changes, said, unsaid):
    empty = dict.fromkeys(("loss", "sparsity", "dead_feature_percentage"), [])
    run = a_run(an_evaluation())._replace(history=empty | changes["history"])
    captions = " ".join(
        re.findall(r"<figcaption>(.*?)</figcaption>", report_page([run], a_making()))
    )
    assert said in captions and unsaid not in captions
    assert "Lines join" not in captions
    two = page_of(an_evaluation(9, k=8, l0=8.0), an_evaluation(9, k=64, l0=64.0))
    assert "Lines join" in two


def test_page_tells_what_was_trained_on_and_how_long_it_took():
    shown = " ".join(re.sub("<[^>]*>", " ", page_of(an_evaluation())).split())
    assert "physics/one.md physics 40 2,100" in shown and "all 49 2,500" in shown
    assert "duplicate 10 596" in shown and "too short 22 78" in shown
    assert "98,304 in 3 epochs" in shown and "17, with an activation norm above 512.5" in shown
    assert "harvest org_model.hook_resid_post 31.5 60.2 812" in shown
    assert "train run a 8.0 – 300" in shown


def test_page_tells_how_to_make_it_again():
    page = page_of(an_evaluation())
    assert f"git checkout {'c' * 40}\nmake setup\n" in page
    assert ".venv/bin/snakemake --configfile results/config.yaml" in page
    assert "models:\n- name: org/model" in page
    for word in ("420", "d" * 64, "a" * 64, "2.13.0", "3.11.2", "the Hub, commit 0123abc"):
        assert word in page
    changed = a_making().environment._replace(commit="c" * 40 + "+")
    page = page_of(an_evaluation(), environment=changed)
    assert f"git checkout {'c' * 40}\n" in page and "some files differ" in page
    page = page_of(an_evaluation(), environment=changed._replace(commit=None))
    assert "git checkout" not in page and "not a Git repository" in page


def test_page_of_saes_of_which_little_is_known():
    """By hand there are no sources, jobs, records and configuration; an old SAE has no origin."""
    run = a_run(an_evaluation())._replace(config={"metadata": {}})
    page = report_page([run], a_making(sources=None, jobs=(), models=(), config="", config_path=""))
    assert_closed(page)
    assert "Time and memory" not in page and "Trained on" not in page


def test_plots_on_the_page_follow_its_colours():
    page = page_of(an_evaluation(9), an_evaluation(20))
    svg = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "var(--s0)" in svg and "var(--ink)" in svg and "var(--card)" in svg
    assert not {plots.INK, plots.MUTED, plots.GRID, "#ffffff"} & set(
        re.findall(r"(?:fill|stroke): (#\w+)", svg)
    )


def test_page_escapes_hostile_names():
    evil = "<script>alert('x')</script>\" onload=\"x"
    page = page_of(an_evaluation(name=evil, model_name=evil, hook_spec=evil, sae_type=evil))
    assert "onload" not in Elements(page).attributes
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page


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
    assert '<td data-value="">–</td>' in page and ">nan" not in page.lower()


def test_page_and_table_need_no_torch():
    modules = "sae_core.reporting.page, sae_core.reporting.feature_page"
    program = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


# --- the page of features


def test_the_features_page_needs_nothing_from_outside():
    page = feature_page(a_corpus(), "run.files", "../report.html")
    assert_closed(page, ["../report.html", "run.files/map.html"])
    for word in ("490", "4.3%", "12,000", "31.9", "specific to chemistry", "5 above 0.9"):
        assert word in page


def test_the_map_names_clusters_and_nearest_directions():
    page = map_page(a_corpus(), entries(), "../run.html")
    [group] = re.findall(r'<ol class="groups">(.*?)</ol>', page, re.DOTALL)
    assert re.findall(r"#feature=(\d+)", group) == ["7", "12"] and "acid (84%)" in group
    [near] = re.findall(r'<table id="near">(.*?)</table>', page, re.DOTALL)
    assert re.findall(r"#feature=(\d+)", near) == ["7", "12", "12", "400"]
    assert ">0.42<" in near and ">81%<" in near
    bare = a_corpus()
    bare["map"] |= {"near": [], "together": bare["map"]["together"] | {"clusters": []}}
    page = map_page(bare, entries(), "../run.html")
    assert 'class="groups"' not in page and 'id="near"' not in page


def received(path):
    """The name and the value that a script hands to the page."""
    call = re.fullmatch(r"received\((.*)\)\n", path.read_text(encoding="utf-8"))
    return json.loads(f"[{call[1]}]")


def data_of(page):
    """Name -> value of every script beside a page; the scripts are named after what they hold."""
    scripts = sorted(page.with_name(f"{page.stem}.files").glob("*.js"))
    found = dict(map(received, scripts))
    assert [path.stem for path in scripts] == sorted(found)
    return found


def rows_of(data, word):
    """The rows of the index that are listed for a word."""
    shard = data["words-" + "-".join(f"{ord(c):x}" for c in word[:2])]
    differences = next(rows for shown, rows in shard if shown == word)
    row = 0
    return [row := row + int(difference, 36) for difference in differences.split()]


def test_the_data_of_the_features_page_holds_every_feature(tmp_path):
    """In chunks; the words lead to what shows them."""
    n = 2 * CHUNK + 5
    many = [an_entry(3 * i, "rare" if i % 50 == 7 else "energy") for i in range(n)]
    data = data_of(write_features(tmp_path, many))
    index = data.pop("index")
    assert index["columns"]["feature"] == [3 * i for i in range(n)]
    assert index["columns"]["peaks"][7] == "rare 3 x 1" and index["chunk"] == CHUNK
    assert index["columns"]["label"][0] == "energy (84%), physics"
    chunks = [data.pop(f"features-{i}") for i in range(3)]
    assert sum(chunks, []) == many and len(chunks[2]) == 5
    assert {f"words-{name}" for name in index["shards"]} == set(data)
    assert rows_of(data, "rare") == [7, 57, 107]
    assert rows_of(data, "great") == rows_of(data, "joule") == list(range(n))
    assert rows_of(data, "physics") == list(range(n)), "a chapter's name"
    assert "detection" not in index["columns"]


def test_a_label_by_an_llm_takes_the_place_of_the_default_one(tmp_path):
    labels = [a_label(12), a_label(400, label="", status="not in the schema", detection=None)]
    data = data_of(write_features(tmp_path, entries(), labels=labels))
    columns = data["index"]["columns"]
    default = "{} (84%), physics".format
    assert columns["label"] == [
        default("energy"), "what 12 is about", default("membrane"), default("the")
    ]  # fmt: skip
    assert columns["detection"] == [None, 0.81, None, None]
    assert columns["fuzzing"] == [None, 0.72, 0.72, None]
    assert data["features-0"][1]["explained"] == labels[0]
    assert data["features-0"][1]["label"] == default("acid")


def test_a_new_page_leaves_nothing_of_the_old_data(tmp_path):
    page = write_features(tmp_path, [an_entry(i) for i in range(3 * CHUNK)])
    assert "features-2" in data_of(page)
    assert set(data_of(write_features(tmp_path, [an_entry(4)]))) >= {"features-0", "index"}
    assert "features-2" not in data_of(page) and "features-1" not in data_of(page)


def test_a_label_without_its_keys_is_named(tmp_path):
    path = write_lines(tmp_path / "labels.jsonl", [{"feature": 3, "label": "a"}])
    with pytest.raises(SAEError, match="labels.jsonl: not a complete label, it lacks description"):
        read_labels(path)


def test_chapters_cannot_put_markup_into_the_features_page(tmp_path):
    evil = "</script><script>alert('x')</script><!--"
    page = feature_page(a_corpus(run_name=evil, subjects=(evil,)), evil, evil)
    assert "<script>alert" not in page and "<!--" not in page
    data = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(data)["subjects"] == [evil]


def test_features_without_subjects_make_a_page(tmp_path):
    data = data_of(write_features(tmp_path, [an_entry(7, shares=())], a_corpus(subjects=())))
    assert data["index"]["columns"]["shares"] == [[]]
    page = feature_page(a_corpus(subjects=()), "d", "r.html")
    assert_closed(page, ["r.html", "d/map.html"])


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r"])
def test_a_line_break_of_unicode_in_a_text_ends_no_line(character: str, tmp_path: Path) -> None:
    """As in a chapter's name or its text; the lines are JSON with all characters as they are."""
    entries = [{"feature": n, "chapter": f"a{character}b"} for n in range(2)]
    path = tmp_path / "features.jsonl"
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
    write_file(path, "".join(lines))
    assert list(read_json_lines(path)) == entries


def test_damaged_features_are_named(tmp_path):
    path = tmp_path / "features.jsonl"
    path.write_text(json.dumps(an_entry(7)) + '\n{"feature": ')
    with pytest.raises(SAEError, match="features.jsonl: not readable JSON lines"):
        list(read_json_lines(path))
    path.write_text("{}")
    with pytest.raises(SAEError, match="not a complete analysis of features, it lacks run_name"):
        read_corpus(path)


# --- how it was made


def test_benchmarks_of_the_saes_and_models_at_hand(tmp_path):
    table = "s\th:m:s\tmax_rss\tcpu_time\n{}\t0:00:01\t{}\t{}\n"
    for name, figures in {
        "process.tsv": (1.5, 33, 0.5),
        "train/m.blocks.1.x.tsv": (8, "-", "NA"),
        "train/m.blocks.11.x.tsv": (9, 9, 9),
        "harvest/m.hook_resid_post.1.0.tsv": (20, 30, 40),
        "harvest/mm.hook_resid_post.1.0.tsv": (9, 9, 9),
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(table.format(*figures))
    jobs = read_jobs(tmp_path, ["m.blocks.1.x", "m.hook_resid_post"])
    assert jobs == [
        ("harvest", "m.hook_resid_post.1.0", 20, 40, 30),
        ("process", "", 1.5, 0.5, 33),
        ("train", "m.blocks.1.x", 8, None, None),
    ]


def test_the_commit_of_a_repository(tmp_path):
    assert commit(tmp_path) is None

    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    (tmp_path / "file").write_text("one")
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    head = git("rev-parse", "HEAD").strip()
    assert commit(tmp_path) == head
    (tmp_path / "file").write_text("two")
    assert commit(tmp_path) == head + "+"


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


def summarise(names, results, folder):
    runs = results / "runs.txt"
    runs.write_text("".join(f"{name}\n" for name in names), errors="surrogateescape")
    return run_script(
        *("summarise.py", "--runs", runs, "--results", results),
        *("--summary", folder / "summary.csv", "--loss-recovered", folder / "recovered.svg"),
        *("--fvu", folder / "fvu.svg", "--report", folder / "report.html"),
    )


@pytest.fixture
def runs(tmp_path):
    """The names of two SAEs; a third one is there, too."""
    names = []
    for layer in (20, 9, 3):
        write_run(tmp_path, an_evaluation(layer))
        names.append(an_evaluation(layer)["run_name"])
    return names[:2]


def test_summarise_script(runs, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("models: [a]\n")
    done = summarise(runs, tmp_path, tmp_path / "made")
    assert done.returncode == 0, done.stderr
    read = read_evaluations([tmp_path / f"evaluations/{name}.json" for name in runs])
    assert done.stdout == summary_table(read)
    probes = feature_figures(a_corpus())
    told = summary_csv([evaluation | probes for evaluation in read])
    assert (tmp_path / "made" / "summary.csv").read_text() == told
    for name in ("recovered", "fvu"):
        assert "layer 9" in words((tmp_path / f"made/{name}.svg").read_bytes())
    page = (tmp_path / "made" / "report.html").read_text()
    assert_closed(page, [f"features/{name}.html" for name in runs])
    assert "models: [a]" in page and f"--configfile {config}" in page


def test_summarise_script_names_a_bad_file_and_writes_nothing(runs, tmp_path):
    bad = tmp_path / f"evaluations/{runs[1]}.json"
    bad.write_text("{")
    done = summarise(runs, tmp_path, tmp_path / "made")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {bad}: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "made").exists()


def test_summarise_script_needs_a_name(tmp_path):
    done = summarise([], tmp_path, tmp_path / "made")
    assert done.returncode == 1
    assert done.stderr == f"error: --runs {tmp_path}/runs.txt: no run names; give one per line\n"


def test_names_of_runs_that_are_not_utf_8(tmp_path):
    done = summarise(["\udcff"], tmp_path, tmp_path / "made")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: --runs {tmp_path}/runs.txt: cannot be read")


def test_a_run_is_read_with_the_hash_of_its_weights(tmp_path):
    run = read_run(*write_run(tmp_path, an_evaluation()))
    assert run.weights_sha256 == hashlib.sha256(b"weights").hexdigest()
    assert run.origin == a_config()["metadata"]


def test_browse_script(tmp_path):
    lines, corpus, page, labels = (tmp_path / f"run.{k}" for k in ("jsonl", "json", "html", "llm"))
    write_lines(lines, entries())
    corpus.write_text(json.dumps(a_corpus()))
    write_lines(labels, [a_label(7)])
    given = ("--entries", lines, "--corpus", corpus, "--page", page)
    done = run_script("browse.py", *given)
    assert done.returncode == 0, done.stderr
    assert page.read_text() == feature_page(a_corpus(), "run.files", "../report.html")
    assert data_of(page)["features-0"] == entries()
    assert (tmp_path / "run.files/map.html").read_text() == map_page(
        a_corpus(), entries(), "../run.html"
    )
    done = run_script("browse.py", *given, "--labels", labels)
    assert done.returncode == 0, done.stderr
    assert data_of(page)["index"]["columns"]["label"][0] == "what 7 is about"
