"""Each rule in a conda environment of its own, made from a channel on disk by a stand-in for conda.

Slow, and in need of a network for the packages that come from PyPI: `make test-conda`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from project import Project, make_project

from sae_core.utils.code_hash import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("conda")]

TOOLS = ROOT / "tests/tools"
ENVIRONMENTS = ("data", "train-cpu", "evaluate-cpu", "report")
"""Those of a run on a CPU that publishes nothing."""

ACTIVATE = """\
CONDA_PREFIX=$(cd "$1" && pwd) || return 1
export CONDA_PREFIX PATH="$CONDA_PREFIX/bin:$PATH"
"""

TELL = """
import importlib.metadata, json
print(json.dumps(sorted(d.metadata["Name"].lower() for d in importlib.metadata.distributions())))
"""


def packages() -> set[str]:
    """What these environments take from conda-forge, by PyPI's names."""
    files = [ROOT / f"envs/{name}.yaml" for name in ENVIRONMENTS]
    listed = [yaml.safe_load(file.read_text())["dependencies"] for file in files]
    names = {entry.split()[0] for entries in listed for entry in entries if isinstance(entry, str)}
    return names - {"python", "pytorch-cpu"} | {"torch"}


@pytest.fixture(scope="module")
def conda(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables with which `conda` is the stand-in, and conda-forge the channel."""
    folder = tmp_path_factory.mktemp("conda")
    tool = folder / "tool/bin/python"
    subprocess.run([sys.executable, "-m", "venv", folder / "tool"], check=True)
    listed = TOOLS / "conda-requirements.txt"
    install = [tool, "-m", "pip", "install", "--quiet", "-r", listed]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        reason = f"the packages of {listed.name} cannot be installed: {done.stderr[-500:]}"
        (pytest.fail if os.environ.get("REQUIRE_CONDA") else pytest.skip)(reason)
    site = Path(torch.__file__).parents[1]
    channel = folder / "channels/conda-forge"
    subprocess.run([tool, TOOLS / "channel.py", channel, site, *packages()], check=True)
    commands = folder / "prefix/bin"
    commands.mkdir(parents=True)
    (commands / "conda").write_text(f"#!{tool}\n{(TOOLS / 'conda_stand_in.py').read_text()}")
    (commands / "activate").write_text(ACTIVATE)
    (commands / "conda").chmod(0o755)
    return {"PATH": f"{commands}:{os.environ['PATH']}", "CHANNELS": str(channel.parent)}


@pytest.fixture(scope="module")
def deployed(
    conda: dict[str, str], tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> Project:
    """A project whose workflow has run with an environment for each rule."""
    project = make_project(tmp_path_factory.mktemp("deployed") / "project", ROOT, tiny_model)
    config = project.config
    config["models"][0] |= {"layers": ["middle"], "saes": [{"topk": 4}]}
    project.configure(config)
    project.environment = {**conda, "PYTHONPATH": "", "PYTHONNOUSERSITE": "1"}
    project.options += ("--software-deployment-method", "conda")
    project.snakemake()
    return project


def test_the_whole_workflow_runs(deployed: Project) -> None:
    assert len((deployed.folder / "results/summary.csv").read_text().splitlines()) == 2
    assert (deployed.folder / "results/report.html").is_file()


def test_no_environment_sees_anothers_packages(deployed: Project) -> None:
    seen = {}
    for file in (deployed.folder / ".snakemake/conda").glob("*.yaml"):
        [name] = [e.stem for e in (ROOT / "envs").glob("*.yaml") if same(e, file)]
        python = file.with_suffix("") / "bin/python"
        printed = subprocess.run([python, "-c", TELL], check=True, capture_output=True, text=True)
        seen[name] = set(json.loads(printed.stdout))
    assert set(seen) == set(ENVIRONMENTS)
    assert not seen["data"] & {"torch", "numpy", "matplotlib", "wandb"}
    assert not seen["report"] & {"torch", "transformers", "wandb"}
    assert "snakemake" not in set.union(*seen.values())
    assert "gguf" in seen["train-cpu"] and "gguf" not in seen["evaluate-cpu"]


def same(environment: Path, copy: Path) -> bool:
    """Whether two files describe the same environment."""
    return yaml.safe_load(environment.read_text()) == yaml.safe_load(copy.read_text())
