"""Projects whose jobs go through a SLURM of their own."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from project import Project
from slurm import PACKAGES, Cluster, missing

PROFILE = "workflow/profiles/slurm/config.yaml"
MEMORY = 3000
"""MB of a job with a tiny model; what the profile asks for would not fit the nodes."""

COMPARED = ("data", "models", "saes", "evaluations", "features", "plots", "summary.csv")
"""What of `results/` does not hold times."""


def start_cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster that runs until the generator goes on; skips where SLURM is not installed."""
    if programs := missing():
        reason = f"no {', '.join(programs)}: SLURM is not installed (apt-get install {PACKAGES})"
        if os.environ.get("REQUIRE_SLURM"):
            pytest.fail(reason)
        pytest.skip(reason)
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def submit_from(project: Project, cluster: Cluster, **train: object) -> None:
    """Have the project's runs submit to `cluster`, with the profile as it is shipped but for the
    memory of the jobs and the seconds until Snakemake first looks at them.

    Args:
        train: resources of the trainings.
    """
    path = project.folder / PROFILE
    profile = yaml.safe_load(path.read_text(encoding="utf-8"))
    for resources in profile["set-resources"].values():
        resources["mem_mb"] = MEMORY
    profile["set-resources"]["train"] |= train
    profile["slurm-init-seconds-before-status-checks"] = 2
    path.write_text(yaml.safe_dump(profile))
    project.environment = cluster.environment
    # The threads of a local run, for the same sums in the same order.
    project.options = ("--workflow-profile", str(path.parent), "--max-threads", "2")


def same_results(project: Project, other: Project) -> int:
    """Check that two projects have the same results, byte by byte; how many files they are."""
    contents = [_contents(each.folder / "results") for each in (project, other)]
    assert sorted(contents[0]) == sorted(contents[1])
    assert not [name for name in contents[0] if contents[0][name] != contents[1][name]]
    return len(contents[0])


def _contents(results: Path) -> dict[str, bytes]:
    parts = [results / part for part in COMPARED]
    files = [path for part in parts for path in (part, *part.rglob("*")) if path.is_file()]
    return {str(path.relative_to(results)): path.read_bytes() for path in files}
