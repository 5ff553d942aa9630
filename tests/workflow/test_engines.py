"""Other ways to run: a scheduler with a submit command, a storage; and the keys of the profiles."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from project import Project
from snakemake.cli import get_argument_parser

from sae_core.utils.code_hash import ROOT

PROFILES = sorted((ROOT / "workflow/profiles").iterdir())
RUN = "tiny.blocks.2.hook_resid_post.btop4sae.exp2"

KUBERNETES = {"kubernetes-namespace", "kubernetes-persistent-volumes"}
"""Options of an executor that is not installed here."""

GPU_RULES = {
    name
    for path in (ROOT / "workflow/rules").glob("*.smk")
    for name, body in re.findall(
        r"^rule (\w+):\n(.*?)(?=^\S|\Z)", path.read_text(), re.MULTILINE | re.DOTALL
    )
    if re.search(r"^ +gpu=", body, re.MULTILINE)
}

CONDA = json.dumps(
    {
        "conda_version": "24.7.1",
        "conda_prefix": "/c",
        "platform": "linux-64",
        "get": {"channel_priority": "strict"},
    }
)
"""What Snakemake asks conda, even where it only prints."""

QSUB = """
echo "$@" >> {folder}/submitted
for script; do :; done
setsid sh "$script" >> {folder}/output 2>&1 < /dev/null &
echo $!
"""


@pytest.fixture
def small(project: Project) -> Project:
    """A project with one SAE in which nothing has run."""
    config = project.config
    config["models"][0] |= {"layers": [2], "saes": [{"topk": 4}]}
    project.configure(config)
    return project


def command(folder: Path, name: str, script: str, project: Project) -> None:
    """Put a command of that name into the path of a project's runs."""
    path = folder / "bin" / name
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{script}")
    path.chmod(0o755)
    project.environment["PATH"] = f"{path.parent}:/usr/bin:/bin"


@pytest.mark.slow
def test_any_submit_command_will_do(small: Project, tmp_path: Path) -> None:
    command(tmp_path, "qsub", QSUB.format(folder=tmp_path), small)
    small.options = ("--workflow-profile", "workflow/profiles/generic", "--max-threads", "2")
    small.snakemake(f"results/saes/{RUN}/weights.pt")
    jobs = (tmp_path / "submitted").read_text().splitlines()
    assert [job.split()[1] for job in jobs] == [
        "sae_process",
        "sae_tokenize",
        "sae_harvest",
        "sae_train",
    ]
    for job, ncpus, mem, ngpus, minutes in zip(
        jobs,
        (1, 2, 2, 2),
        (4000, 4000, 32000, 32000),
        (0, 0, 1, 1),
        (30, 30, 480, 480),
        strict=True,
    ):
        assert f"select=1:ncpus={ncpus}:mem={mem}mb:ngpus={ngpus} " in job
        assert f"walltime={60 * minutes} " in job


@pytest.mark.slow
def test_results_go_to_a_storage(small: Project, tmp_path: Path) -> None:
    pytest.importorskip("snakemake_storage_plugin_fs")
    place = tmp_path / "bucket"
    place.mkdir()
    small.options += ("--default-storage-provider", "fs", "--default-storage-prefix", str(place))
    small.snakemake()
    kept = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    assert {
        f"results/saes/{RUN}/weights.pt",
        f"results/evaluations/{RUN}.json",
        f"results/plots/{RUN}.density.svg",
        "results/models/tiny.json",
        "results/summary.csv",
        "results/report.html",
    } <= kept
    assert not (small.folder / "results/saes").exists()
    assert "Nothing to be done" in small.snakemake()
    # A job on another machine knows no record that was read here before.
    [tokens] = (place / "results/tokens").iterdir()
    shutil.rmtree(tokens)
    shutil.rmtree(small.folder / ".snakemake/storage", ignore_errors=True)
    small.snakemake("--target-jobs", f"tokenize:tokenizer={tokens.name}")
    assert (tokens / "manifest.json").is_file()


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.name)
def test_the_keys_of_a_profile_are_options(profile: Path) -> None:
    contents = yaml.safe_load((profile / "config.yaml").read_text(encoding="utf-8"))
    options = {
        option.removeprefix("--")
        for action in get_argument_parser()._actions
        for option in action.option_strings
    }
    assert set(contents) - options <= (KUBERNETES if profile.name == "kubernetes" else set())
    if profile.name != "default":
        assert set(contents["set-resources"]) == GPU_RULES


@pytest.mark.parametrize(("device", "build"), [("auto", ""), ("cpu", "-cpu"), ("cuda", "-cuda")])
def test_containerize_prints_a_dockerfile_with_every_environment(
    project: Project, tmp_path: Path, device: str, build: str
) -> None:
    command(tmp_path, "conda", f"echo '{CONDA}'", project)
    config = project.config
    config["publishing"] = {"upload_to_hf": True, "hf_repo_id": "a/b"}
    config["runtime"] = {"device": device}
    project.configure(config)
    printed = project.snakemake("--containerize")
    assert len(re.findall("^FROM ", printed, re.MULTILINE)) == 1
    names = "data", f"train{build}", f"evaluate{build}", "report", "label", "publish"
    for name in names:
        text = (project.folder / f"envs/{name}.yaml").read_text(encoding="utf-8")
        assert f"envs/{name}.yaml" in printed
        for line in text.splitlines():
            assert f"#   {line}" in printed
    assert printed.count("conda env create ") == len(names)
