"""The export for Neuronpedia, read as its import does: row by row into the tables of its schema."""

import gzip
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from reported import a_corpus, a_label, entries, write_lines
from running import run_here

from sae_core.labelling.labels import Label
from sae_core.reporting import neuronpedia
from sae_core.reporting.feature_data import of_figures
from sae_core.reporting.neuronpedia import Export, NeuronpediaConfig, write_export
from sae_core.utils.errors import SAEError

RECORD = {"n_layers": 30, "d_model": 64}
OF_ENTRIES = {"active": 4, "l0": 0.04}
"""Figures of `entries()`, each of which is active on 120 of 12,000 tokens."""
SOURCE = "model/9-hook_resid_post-btop32sae-exp8"

TABLES: dict[str, tuple[set[str], set[str]]] = {
    "model": (
        {"id", "creatorId", "layers", "neuronsPerLayer", "owner"},
        {"displayName", "displayNameShort", "dimension", "visibility"},
    ),
    "release": (
        {"name", "description", "creatorName", "creatorId", "urls"},
        {"visibility"},
    ),
    "sourceset": (
        {"modelId", "name", "description", "creatorName", "creatorId", "urls"},
        {"visibility", "releaseName"},
    ),
    "source": (
        {"id", "modelId", "setName", "creatorId"},
        {"visibility", "num_prompts", "num_tokens_in_prompt", "notes", "hfRepoId", "hfFolderId"},
    ),
    "features": (
        {"modelId", "layer", "index"},
        {
            "sourceSetName", "creatorId", "hookName", "maxActApprox", "frac_nonzero", "pos_str",
            "pos_values", "neg_str", "neg_values", "freq_hist_data_bar_heights",
            "freq_hist_data_bar_values", "topkCosSimIndices", "topkCosSimValues",
        },
    ),
    "activations": (
        {
            "id", "tokens", "index", "layer", "modelId", "maxValue", "maxValueTokenIndex",
            "minValue", "values", "creatorId",
        },
        {"dataIndex", "dataSource"},
    ),
    "explanations": (
        {"id", "modelId", "layer", "index", "description", "authorId"},
        {"notes"},
    ),
}  # fmt: skip
"""By file: the columns without a default, and others that are used. From Neuronpedia's schema."""


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of each table; each has all columns that need a value, and only known ones."""
    found = defaultdict(list)
    for path in sorted(folder.rglob("*.jsonl*")):
        content = path.read_bytes()
        name = path.name.split(".")[0]
        if path.suffix == ".gz":
            content, name = gzip.decompress(content), path.parent.name
        found[name] += map(json.loads, content.splitlines())
    assert set(found) == set(TABLES)
    for name, (needed, more) in TABLES.items():
        for row in found[name]:
            assert needed <= set(row) <= needed | more, name
    return found


def export(folder: Path, labels: dict[int, Label] | None = None, **changes: Any) -> Path:
    config = NeuronpediaConfig(creator="Alice", **changes)
    made = Export(a_corpus(), RECORD, labels or {}, config)
    return write_export(folder, iter(entries()), made)


def test_every_feature_has_its_rows(tmp_path: Path) -> None:
    assert export(tmp_path) == tmp_path / SOURCE
    tables = read(tmp_path / SOURCE)
    shown = entries()
    assert [row["index"] for row in tables["features"]] == [str(e["feature"]) for e in shown]
    [first, *_] = tables["features"]
    assert first["maxActApprox"] == 8 and first["frac_nonzero"] == 0.02
    assert first["pos_str"] == [" energys", " joule"] and first["neg_values"] == [-3]
    assert first["freq_hist_data_bar_heights"] == [70, 40, 10]
    assert first["freq_hist_data_bar_values"] == pytest.approx([2**0.5, 2**1.5, 2**2.5], abs=1e-3)
    assert first["topkCosSimIndices"] == [12, 499]
    for row in tables["activations"]:
        assert len(row["tokens"]) == len(row["values"])
        assert row["maxValue"] == max(row["values"]) == row["values"][row["maxValueTokenIndex"]]
    windows = sum(len(entry["top"]) + len(entry["quantiles"]) for entry in shown)
    assert len(tables["activations"]) == windows


def test_rows_name_rows_that_exist(tmp_path: Path) -> None:
    tables = read(export(tmp_path, hf_repo_id="alice/saes"))
    [model], [source], [sets], [release] = (
        tables[name] for name in ("model", "source", "sourceset", "release")
    )
    assert model["layers"] == 30 and model["dimension"] == 64 and model["owner"] == "org"
    assert sets["releaseName"] == release["name"] and source["setName"] == sets["name"]
    assert source["modelId"] == sets["modelId"] == model["id"] == "model"
    assert source["hfFolderId"] == a_corpus()["run_name"]
    features = {row["index"] for row in tables["features"]}
    for name in ("features", "activations", "explanations"):
        for row in tables[name]:
            assert (row["modelId"], row["layer"]) == (model["id"], source["id"])
            assert row["index"] in features
    ids = [row["id"] for name in ("activations", "explanations") for row in tables[name]]
    assert len(set(ids)) == len(ids)


def test_an_sae_of_any_name_has_a_folder(tmp_path: Path) -> None:
    named = Export(a_corpus("a trial"), RECORD, {}, NeuronpediaConfig(creator="Alice"))
    assert write_export(tmp_path, iter(entries()), named) == tmp_path / "model/9-a-trial"


def test_labels_have_their_scores(tmp_path: Path) -> None:
    labels = {
        7: Label(**a_label(7, fuzzing=None)),
        12: Label(**a_label(12, label="", status="refused", detection=None, fuzzing=None)),
    }
    rows = {row["index"]: row for row in read(export(tmp_path, labels))["explanations"]}
    assert rows["7"]["description"] == "what 7 is about"
    assert rows["7"]["notes"] == "by a language model, detection 0.81, confidence 0.90"
    for feature, said in {"12": "acid (84%), physics", "400": "membrane (84%), physics"}.items():
        assert rows[feature]["description"] == said
        assert rows[feature]["notes"] == "found without a language model"


def test_many_features_have_several_files_and_always_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read(export(tmp_path / "whole"))
    monkeypatch.setattr(neuronpedia, "BATCH", 3)
    folders = [export(tmp_path / name) for name in ("once", "again")]
    assert len(list((folders[0] / "features").iterdir())) == 2 and read(folders[0]) == whole
    contents = [{p.relative_to(f): p.read_bytes() for p in f.rglob("*.*")} for f in folders]
    assert contents[0] == contents[1]


@pytest.mark.parametrize("changes", [{"neuronpedia_model": "a/b"}, {"neuronpedia_set": "x.y"}])
def test_a_name_that_neuronpedia_does_not_take_is_refused(changes: dict[str, str]) -> None:
    with pytest.raises(SAEError, match=f"--neuronpedia-.*{'|'.join(changes.values())}: must be"):
        NeuronpediaConfig(creator="Alice", **changes)


@pytest.mark.parametrize("changes", [{"active": 5}, {"l0": 0.041}])
def test_entries_and_figures_of_two_saes_are_refused(
    tmp_path: Path, changes: dict[str, float]
) -> None:
    files = tmp_path / "a.jsonl", tmp_path / "b.json"
    corpus = a_corpus() | OF_ENTRIES | changes
    made = Export(corpus, RECORD, {}, NeuronpediaConfig(creator="Alice"))
    said = f"{files[0]} has 4 features and an L0 of 0.04, but {files[1]}, of {corpus['run_name']}, "
    with pytest.raises(SAEError, match=re.escape(said)):
        write_export(tmp_path / "out", of_figures(entries(), files[0], corpus, files[1]), made)
    assert not list(tmp_path.rglob("*.gz"))


def test_neuronpedia_script(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "run.jsonl", entries())
    labels = write_lines(tmp_path / "labels.jsonl", [a_label(7)])
    for name, content in (("run", a_corpus() | OF_ENTRIES), ("record", RECORD)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    given = ["--entries", lines, "--corpus", tmp_path / "run.json", "--labels", labels]
    given += ["--record", tmp_path / "record.json", "--output", tmp_path / "out"]
    done = run_here("scripts/neuronpedia.py", *given, "--creator", "Alice")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'out' / SOURCE}\n"
    export(tmp_path / "direct", {7: Label(**a_label(7))})
    assert read(tmp_path / "out" / SOURCE) == read(tmp_path / "direct" / SOURCE)
