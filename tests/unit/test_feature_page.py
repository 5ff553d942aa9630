"""The page of features, its map and the data beside it."""

import json
import re
from pathlib import Path

import pytest
from page_checks import assert_closed
from reported import (
    a_corpus,
    a_label,
    an_entry,
    entries,
    figures_of,
    write_features,
    write_lines,
)
from running import run_script

from sae_core.reporting.feature_data import CHUNK
from sae_core.reporting.feature_page import (
    feature_page,
    read_corpus,
    write_page,
)
from sae_core.reporting.map_page import map_page
from sae_core.utils.errors import SAEError
from sae_core.utils.files import write_file
from sae_core.utils.records import read_json_lines


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


def test_browse_script(tmp_path):
    lines, corpus, page, labels = (tmp_path / f"run.{k}" for k in ("jsonl", "json", "html", "llm"))
    write_lines(lines, entries())
    figures = a_corpus() | figures_of([entry["tokens"] for entry in entries()])
    corpus.write_text(json.dumps(figures))
    write_lines(labels, [a_label(7)])
    given = ("--entries", lines, "--corpus", corpus, "--page", page)
    done = run_script("browse.py", *given)
    assert done.returncode == 0, done.stderr
    assert page.read_text() == feature_page(figures, "run.files", "../report.html")
    assert data_of(page)["features-0"] == entries()
    assert (tmp_path / "run.files/map.html").read_text() == map_page(
        a_corpus(), entries(), "../run.html"
    )
    done = run_script("browse.py", *given, "--labels", labels)
    assert done.returncode == 0, done.stderr
    assert data_of(page)["index"]["columns"]["label"][0] == "what 7 is about"


@pytest.mark.parametrize("subject", ["physics", "poetry"])
def test_the_figures_of_another_sae_are_refused(tmp_path, subject):
    entry = an_entry(7) | {"subjects": {subject: 1.0}}
    lines, figures = write_lines(tmp_path / "a.jsonl", [entry]), tmp_path / "b.json"
    figures.write_text(json.dumps(a_corpus() | figures_of([entry["tokens"] + 90])))
    said = f"{lines} has 1 features and an L0 of 0.01, but {figures}, of {a_corpus()['run_name']}, "
    with pytest.raises(SAEError, match=re.escape(said)):
        write_page(tmp_path / "page.html", lines, figures, "../report.html")
    assert not list(tmp_path.glob("page*"))
