"""The report: what it shows, that it is closed, and where its figures come from."""

import hashlib
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from page_checks import Elements, assert_closed
from reported import (
    a_config,
    a_corpus,
    a_history,
    a_making,
    a_run,
    an_evaluation,
    write_run,
)

from sae_core.reporting import plots
from sae_core.reporting.page import read_run, report_page
from sae_core.reporting.provenance import commit, read_jobs
from sae_core.reporting.summary import (
    COLUMNS,
    SPLICED_COLUMNS,
)

ROOT = Path(__file__).resolve().parents[2]


PAGES: dict[str, str] = {}
"""Those that were asked for: a page takes a second."""


def page_of(*evaluations, **making):
    asked = repr((evaluations, making))
    if asked not in PAGES:
        PAGES[asked] = report_page([a_run(e) for e in evaluations], a_making(**making))
    return PAGES[asked]


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


def test_page_has_the_figures_of_every_splice():
    page = re.sub("<[^>]*>", " ", page_of(an_evaluation())).split()
    figures = ["48,", "2.900", "0.9100", "0.7700", "2.250", "0.9870", "0.1900", "99"]
    for figure in (*figures, "2.270", "0.9850", "0.2000", "98"):
        assert figure in page
    cells = [f"| {column.heading} |" for column in SPLICED_COLUMNS.values()]
    assert len(set(cells)) == 12 and not {c.heading for c in COLUMNS.values()} & {
        c.heading for c in SPLICED_COLUMNS.values()
    }


def test_page_has_a_section_for_every_run():
    evaluations = [an_evaluation(layer) for layer in (9, 20, 4)]
    page = page_of(*evaluations)
    headings = re.findall(r'<h2 class="name">(.*?)</h2>', page)
    assert headings == [f"org_model.blocks.{n}.hook_resid_post.btop32sae.exp8" for n in (4, 9, 20)]
    assert "12,288 in 48 windows" in page and "2.34%" in page
    assert 'id="probes"' not in page and 'href="#absorption"' not in page, "without figures"


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


def test_a_run_is_read_with_the_hash_of_its_weights(tmp_path):
    run = read_run(*write_run(tmp_path, an_evaluation()))
    assert run.weights_sha256 == hashlib.sha256(b"weights").hexdigest()
    assert run.origin == a_config()["metadata"]
