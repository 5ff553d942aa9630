"""The workflow through SLURM's queue, on two nodes with a GPU each: the same results as locally."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from on_slurm import same_results, start_cluster, submit_from
from project import Project, make_project
from slurm import Cluster, Job

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm")]


class Done(NamedTuple):
    """A run that is over, and what was seen of it once a second."""

    project: Project
    queues: list[list[Job]]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    yield from start_cluster(tmp_path_factory.mktemp("slurm") / "cluster")


@pytest.fixture(scope="module")
def done(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, root: Path, tiny_model: Path
) -> Done:
    """The project of `completed`, whose four SAEs are trained and evaluated by SLURM jobs."""
    project = make_project(tmp_path_factory.mktemp("queued") / "project", root, tiny_model)
    submit_from(project, cluster)
    queues = []
    with (project.folder / "printed").open("w") as file:
        process = project.start(stdout=file)
    while process.poll() is None:
        queues.append(cluster.jobs())
        time.sleep(1)
    assert process.returncode == 0, (project.folder / "printed").read_text()
    return Done(project, queues)


def test_the_results_are_those_of_a_local_run(done: Done, completed: Project) -> None:
    assert same_results(done.project, completed) > 30


def test_jobs_run_on_both_nodes_and_queue_for_their_gpus(done: Done, cluster: Cluster) -> None:
    running = [[job for job in queue if job.state == "RUNNING"] for queue in done.queues]
    on_gpus = [[job for job in jobs if job.partition == "gpu"] for jobs in running]
    assert max(map(len, on_gpus)) == 2, "one for each GPU"
    assert {job.node for jobs in on_gpus for job in jobs} == {"n1", "n2"}
    waiting = {job.reason for queue in done.queues for job in queue if job.state == "PENDING"}
    assert waiting & {"Resources", "Priority"}


def test_only_the_jobs_that_compute_on_a_gpu_get_one(done: Done, cluster: Cluster) -> None:
    partitions = {(job.rule, job.partition) for queue in done.queues for job in queue}
    gpu = {"harvest", "train", "evaluate", "features"}
    cpu = {"process", "tokenize", "browse", "plot", "summarise"}
    assert partitions == {(rule, "gpu") for rule in gpu} | {(rule, "cpu") for rule in cpu}
    rules = {job.id: job.rule for queue in done.queues for job in queue}
    devices = Counter((rules[task.job] in gpu, task.devices) for task in cluster.tasks())
    assert set(devices) == {(True, "0"), (False, "")}


def test_the_logs_of_jobs_that_succeeded_are_gone(done: Done) -> None:
    assert not list((done.project.folder / "results/logs/slurm").rglob("*.log"))
