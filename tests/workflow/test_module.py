"""The workflow where its user wants it: as a module of another one, and in a folder of its own."""

import subprocess
from pathlib import Path

import pytest
import yaml
from preloaded import forking_python
from project import Project, make_project
from running import ROOT

OUTER = """
configfile: "config/tiny.yaml"


module saes:
    snakefile:
        {snakefile}
    config:
        config["saes"]
    prefix:
        "deep/saes"


use rule * from saes as saes_*


rule count:
    default_target: True
    input:
        "deep/saes/results/summary.csv",
    output:
        "count.txt",
    shell:
        "wc -l < {{input}} > {{output}}"
"""


def outer_workflow(folder: Path, tiny_model: Path, snakefile: str) -> Project:
    """Another workflow, in a folder without this repository."""
    inner = make_project(folder / "inner", ROOT, tiny_model).config
    chapters = inner["chapters"]["folders"]
    inner["chapters"]["folders"] = {s: str(folder / "inner" / path) for s, path in chapters.items()}
    inner["models"][0] |= {"layers": ["middle"], "saes": [{"topk": 4}]}
    outer = Project(folder / "outer", "config/tiny.yaml", python=forking_python())
    (outer.folder / "config").mkdir(parents=True)
    (outer.folder / "Snakefile").write_text(OUTER.format(snakefile=snakefile))
    outer.configure({"saes": inner})
    return outer


@pytest.mark.slow
def test_another_workflow_uses_it_as_a_module(tmp_path: Path, tiny_model: Path) -> None:
    outer = outer_workflow(tmp_path, tiny_model, f'"{tmp_path}/inner/workflow/Snakefile"')
    outer.snakemake()
    assert (outer.folder / "count.txt").read_text().strip() == "2"
    assert {path.name for path in outer.folder.iterdir()} == {
        "Snakefile", ".snakemake", "config", "count.txt", "deep"
    }  # fmt: skip
    results = outer.folder / "deep/saes/results"
    made = {"activations", "checkpoints", "data", "evaluations", "harvests", "models", "saes"}
    assert made <= {path.name for path in results.iterdir()}
    config = outer.config
    config["saes"]["models"][0]["layers"] = [3, "middle"]
    outer.configure(config)
    rules = outer.planned().rules
    assert rules["saes_harvest"] == rules["saes_train"] == 1, "the layer that was added"


@pytest.mark.slow
def test_it_runs_in_a_folder_of_its_own(project: Project, tmp_path: Path) -> None:
    config = project.config
    folders = config["chapters"]["folders"]
    config["chapters"]["folders"] = {s: str(project.folder / path) for s, path in folders.items()}
    elsewhere = Project(tmp_path / "elsewhere", "config/tiny.yaml", python=forking_python())
    (elsewhere.folder / "config").mkdir(parents=True)
    elsewhere.configure(config)
    elsewhere.options += ("--snakefile", str(project.folder / "workflow/Snakefile"))
    elsewhere.snakemake("results/data/processed_textbooks_all.json", "results/models/tiny.json")
    assert elsewhere.planned().rules["train"] == 4
    assert not (project.folder / "results").exists()


def test_a_module_that_is_not_on_disk_says_so(tmp_path: Path, tiny_model: Path) -> None:
    repository = tmp_path / "repository"
    make_project(repository, ROOT, tiny_model)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "a"]):
        subprocess.run([*git, *command], cwd=repository, check=True)
    commit = subprocess.run(
        [*git, "rev-parse", "HEAD"], cwd=repository, check=True, capture_output=True, text=True
    ).stdout.strip()
    outer = outer_workflow(
        tmp_path,
        tiny_model,
        f'gitfile("{repository}", path="workflow/Snakefile", commit="{commit}")',
    )
    assert "clone the repository" in outer.snakemake("--dry-run", ok=False)


def test_the_catalog_entry_is_one() -> None:
    entry = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text(encoding="utf-8"))
    usage = entry["usage"]
    assert set(usage) == {"mandatory-flags", "software-stack-deployment", "report"}
    assert set(usage["mandatory-flags"]) == {"desc", "flags"}
    assert set(usage["software-stack-deployment"]) <= {"conda", "apptainer", "apptainer+conda"}
    assert isinstance(usage["report"], bool)
    for path in ("README.md", "LICENSE", "workflow/Snakefile", "config/README.md", "CHANGELOG.md"):
        assert (ROOT / path).is_file(), f"the catalog looks for {path}"
