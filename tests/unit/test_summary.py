"""The summary over SAEs: CSV, table, and the files that they are read from."""

import csv
import io
import json

import pytest
from page_checks import assert_closed, words
from reported import (
    a_corpus,
    an_evaluation,
    write_run,
)
from running import run_script

from sae_core.reporting.summary import (
    ABSORPTION_COLUMNS,
    PROBE_COLUMNS,
    SUMMARY_COLUMNS,
    TABLE_WIDTH,
    feature_figures,
    read_evaluations,
    read_histories,
    summary_csv,
    summary_table,
)
from sae_core.utils.errors import SAEError


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


def test_table_is_aligned_and_in_the_order_of_the_layers():
    tables = summary_table([an_evaluation(20), an_evaluation(9)]).split("\n\n")
    for n, (titles, figures) in enumerate(
        [
            (0, ["32.3", "0.1129", "2.123", "2.300", "0.9810", "0.2100", "2.34%", "48"]),
            (1, ["2.900", "0.9100", "0.7700", "0"]),
            (1, ["2.250", "0.9870", "0.1900", "99"]),
            (1, ["2.270", "0.9850", "0.2000", "98"]),
        ]
    ):
        heading, rule, first, second = tables[n].splitlines()[titles:]
        assert len(heading) == len(rule) == len(first) == len(second) <= TABLE_WIDTH
        assert ".9." in first and ".20." in second and first.split()[1:] == figures
    assert "every token spliced" in tables[1] and "attention sinks" in tables[2]
    assert "beyond its outlier_norm" in tables[3]


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
