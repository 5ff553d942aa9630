"""What runs again after a change, by dry runs after a completed run."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from project import Project

pytestmark = pytest.mark.xdist_group("completed")

ALL = {"1.k4", "1.k8", "2.k4", "2.k8"}
OF_EACH_SAE = ("train", "evaluate", "features", "browse", "plot")
CHAPTER = "sae_core/data/raw_data/chemistry_chapters/chapter_01.md"
STATEMENT = "\nEDITED = 1\n"
RUN = "tiny.blocks.2.hook_resid_post.btop4sae.exp2"


def statement_of(file: str) -> str:
    """An edit that may change what a file does."""
    return STATEMENT if file.endswith(".py") else "\n"


@contextmanager
def configured(project: Project, change: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    before = project.config
    after = deepcopy(before)
    change(after)
    project.configure(after)
    try:
        yield
    finally:
        project.configure(before)


@contextmanager
def appended(path: Path, text: str) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(before + text.encode())
    try:
        yield
    finally:
        path.write_bytes(before)


@contextmanager
def without(path: Path) -> Iterator[None]:
    aside = path.with_name("aside")
    path.rename(aside)
    try:
        yield
    finally:
        aside.rename(path)


def test_a_second_run_does_nothing(completed: Project) -> None:
    assert "Nothing to be done" in completed.snakemake()


def test_editing_a_chapter_reruns_everything_after_it(completed: Project) -> None:
    with appended(completed.folder / CHAPTER, "\n\nOne more paragraph on the noble gases.\n"):
        jobs = completed.planned()
    assert jobs.rules["process"] == jobs.rules["harvest"] == 1
    assert jobs.rules["fetch"] == 0
    assert jobs.runs["train"] == jobs.runs["evaluate"] == ALL
    assert jobs.rules["summarise"] == 1


def test_removing_a_chapter_reruns_everything_after_it(completed: Project) -> None:
    with without(completed.folder / CHAPTER):
        assert completed.planned().runs["train"] == ALL


def test_changing_one_k_reruns_that_sae_and_the_summary(completed: Project) -> None:
    def change(config: dict[str, Any]) -> None:
        config["models"][0]["layers"] = [2, "middle"]
        config["models"][0]["saes"][1]["topk"] = 6

    with configured(completed, change):
        jobs = completed.planned()
    new = {"1.k6", "2.k6"}
    assert jobs.runs == dict.fromkeys(OF_EACH_SAE, new)
    of_all = {"list_runs": 1, "summarise": 1, "all": 1}
    assert dict(jobs.rules) == dict.fromkeys(OF_EACH_SAE, 2) | of_all


def test_adding_a_layer_harvests_it_once_and_retrains_no_other(completed: Project) -> None:
    def change(config: dict[str, Any]) -> None:
        config["models"][0]["layers"] = [0, 2, 3, "middle"]

    with configured(completed, change):
        jobs = completed.planned()
    new = {"0.k4", "0.k8", "3.k4", "3.k8"}
    assert jobs.runs == dict.fromkeys(OF_EACH_SAE, new)
    assert jobs.rules["harvest"] == 1


def test_an_added_layer_still_retrains_no_other_when_the_activations_are_gone(
    completed: Project,
) -> None:
    def change(config: dict[str, Any]) -> None:
        config["models"][0]["layers"] = [2, 3, "middle"]

    with without(completed.folder / "results/activations"), configured(completed, change):
        assert completed.planned().runs["train"] == {"3.k4", "3.k8"}


def test_settings_that_change_no_result_rerun_nothing(completed: Project) -> None:
    values = {
        "tracking": {"wandb": True, "wandb_project": "other", "wandb_tags": ["a", "b c"]},
        "publishing": {"hf_repo_id": "someone/else"},
        "runtime": {
            "device": "cpu", "log_freq": 7, "checkpoint_freq": 1, "batch_size": 3,
            "resume_minutes": 0.5, "max_skipped": 3, "activation_batch_size": 7,
        },
    }  # fmt: skip
    with configured(completed, lambda config: config.update(values)):
        assert not completed.planned().rules


def test_changing_an_evaluation_setting_reruns_the_evaluation_on(completed: Project) -> None:
    with configured(completed, lambda config: config.update(evaluation={"max_windows": 3})):
        jobs = completed.planned()
    assert dict(jobs.rules) == {"evaluate": 4, "plot": 4, "summarise": 1, "all": 1}


def test_changing_what_is_shown_of_features_makes_their_pages_again(completed: Project) -> None:
    with configured(completed, lambda config: config.update(features={"top_windows": 3})):
        jobs = completed.planned()
    assert dict(jobs.rules) == {"features": 4, "browse": 4, "summarise": 1, "all": 1}


def test_changing_a_training_setting_retrains_from_the_same_activations(
    completed: Project,
) -> None:
    with configured(completed, lambda config: config["training"].update(lr=0.002)):
        jobs = completed.planned()
    assert jobs.runs["train"] == jobs.runs["evaluate"] == ALL
    assert jobs.rules["harvest"] == 0


@pytest.mark.parametrize(
    "values", [{"use_end_to_end": False}, {"logit_kl_weight": 0.02, "use_block_mse": True}]
)
def test_changing_the_end_to_end_losses_retrains_from_the_same_activations(
    completed: Project, values: dict[str, Any]
) -> None:
    with configured(completed, lambda config: config.update(end_to_end=values)):
        jobs = completed.planned()
    assert jobs.runs["train"] == jobs.runs["evaluate"] == ALL
    assert jobs.rules["harvest"] == 0


def test_training_ends_with_end_to_end_losses(completed: Project) -> None:
    history = json.loads((completed.folder / f"results/saes/{RUN}/history.json").read_text())
    for name in ("logit_kl", "kl_contribution", "val_logit_kl"):
        assert history[name][0] is None and history[name][1] > 0


def test_changing_the_windows_harvests_again(completed: Project) -> None:
    with configured(completed, lambda config: config["windows"].update(max_text_length=16)):
        jobs = completed.planned()
    assert jobs.rules["harvest"] == 1
    assert jobs.runs["train"] == ALL


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("sae_core/evaluation/metrics.py", {"evaluate": 4, "plot": 4, "summarise": 1, "all": 1}),
        ("sae_core/reporting/templates/style.css.j2", {"browse": 4, "summarise": 1, "all": 1}),
        (
            "sae_core/evaluation/tally.py",
            {"features": 4, "browse": 4, "summarise": 1, "all": 1},
        ),
        ("scripts/plot.py", {"plot": 4, "all": 1}),
    ],
)
def test_editing_code_reruns_the_rules_that_use_it(
    completed: Project, file: str, expected: dict[str, int]
) -> None:
    with appended(completed.folder / file, statement_of(file)):
        assert dict(completed.planned().rules) == expected


def test_editing_the_loop_retrains(completed: Project) -> None:
    with appended(completed.folder / "sae_core/training.py", STATEMENT):
        jobs = completed.planned()
    assert jobs.runs["train"] == ALL
    assert jobs.rules["harvest"] == 0


def test_editing_the_kind_of_one_sae_retrains_no_other(completed: Project) -> None:
    def change(config: dict[str, Any]) -> None:
        config["models"][0]["saes"][1]["sae_type"] = "topk"

    edited = appended(completed.folder / "sae_core/sae/kinds/topk.py", STATEMENT)
    with edited, configured(completed, change):
        jobs = completed.planned()
    new = {"1.k8", "2.k8"}
    assert jobs.runs["train"] == jobs.runs["evaluate"] == jobs.runs["features"] == new


def test_what_changes_no_text_and_nothing_that_code_does_reruns_nothing(
    completed: Project,
) -> None:
    package = completed.folder / "sae_core"
    os.utime(completed.folder / CHAPTER)
    with (
        appended(package / "utils/errors.py", "# A comment.\n"),
        appended(package / "training.py", "\n\n"),
        appended(package / "sae/config.py", '"""What TAGS means."""\n'),
        appended(package / "sae/kinds/gated.py", STATEMENT),  # no SAE here is gated
    ):
        assert not completed.planned().rules


def test_publishing_uploads_and_reruns_nothing_else(completed: Project) -> None:
    publishing = {"upload_to_hf": True, "hf_repo_id": "alice/saes"}
    with configured(completed, lambda config: config.update(publishing=publishing)):
        jobs = completed.planned()
    assert dict(jobs.rules) == {"upload": 4, "all": 1} and jobs.runs["upload"] == ALL


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (f"results/evaluations/{RUN}.json", {"evaluate": 1, "plot": 1, "summarise": 1, "all": 1}),
        (f"results/plots/{RUN}.density.svg", {"plot": 1, "all": 1}),
        (
            f"results/saes/{RUN}/weights.pt",
            dict.fromkeys(OF_EACH_SAE, 1) | {"summarise": 1, "all": 1},
        ),
        (f"results/features/{RUN}.files", {"browse": 1, "all": 1}),
        ("results/summary.csv", {"summarise": 1, "all": 1}),
    ],
)
def test_deleting_an_output_reruns_what_is_needed_for_it(
    completed: Project, output: str, expected: dict[str, int]
) -> None:
    with without(completed.folder / output):
        assert dict(completed.planned().rules) == expected


def test_the_outputs_are_those_that_the_design_names(completed: Project) -> None:
    results = completed.folder / "results"
    for layer in (1, 2):
        for k in (4, 8):
            run = f"tiny.blocks.{layer}.hook_resid_post.btop{k}sae.exp2"
            found = {path.name for path in (results / "saes" / run).iterdir()}
            assert found == {
                "weights.pt", "config.json", "history.json", "cfg.json", "sae_weights.safetensors"
            }  # fmt: skip
            figures = json.loads((results / f"evaluations/{run}.json").read_text())
            assert figures["run_name"] == run
            assert figures["model_name"] == "tiny"
            assert figures["hook_spec"] == f"blocks.{layer}.hook_resid_post"
            checkpoints = {path.name for path in (results / "checkpoints" / run).iterdir()}
            assert checkpoints == {"best_model.pt", "checkpoint_epoch2.pt", "metrics.jsonl"}
            for kind in ("jsonl", "csv", "json", "html"):
                assert (results / f"features/{run}.{kind}").stat().st_size > 1000
            assert (results / f"features/{run}.files/index.js").is_file()
    assert (results / "data/processed_textbooks_all.json").is_file()
    assert json.loads((results / "models/tiny.json").read_text())["n_layers"] == 4
    assert len((results / "summary.csv").read_text().splitlines()) == 5
    page = (results / "report.html").read_text()
    assert f'href="features/{run}.html"' in page
    assert yaml.safe_load((results / "config.yaml").read_text()) == completed.config
    for rule in ("process", "harvest", "train", "features"):
        assert f'<th scope="row">{rule}</th>' in page
