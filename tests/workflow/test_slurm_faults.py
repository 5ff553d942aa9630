"""What goes wrong on a cluster: jobs without enough memory or time, a node that is drained, jobs
that are cancelled, a Snakemake that is killed. Every result is still there in the end."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from on_slurm import start_cluster, submit_from
from project import Project, make_copy
from slurm import Cluster, Job

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm-faults")]

RUNS = [f"tiny.blocks.2.hook_resid_post.btop{k}sae.exp2" for k in (4, 8)]
WEIGHTS = [f"results/saes/{run}/weights.pt" for run in RUNS]
EPOCHS = 40
"""Of the training that is cut."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    yield from start_cluster(tmp_path_factory.mktemp("slurm") / "cluster")


@pytest.fixture(scope="module")
def trained(
    cluster: Cluster, completed: Project, tmp_path_factory: pytest.TempPathFactory
) -> Project:
    """A project whose SAEs were trained here."""
    project = make_copy(completed, tmp_path_factory.mktemp("faults") / "project")
    project.python = None  # SLURM watches, suspends and kills the jobs' own processes
    return project


@pytest.fixture
def long_training(trained: Project, cluster: Cluster) -> Iterator[Project]:
    """The project when its trainings take long enough to be stopped, and store their state after
    every step."""
    before = trained.config
    after = before | {"training": {**before["training"], "num_epochs": EPOCHS}}
    after["training"]["early_stopping_patience"] = 0
    after["runtime"] = before["runtime"] | {"resume_minutes": 0}
    trained.configure(after)
    forget_states(trained)
    yield trained
    trained.configure(before)


def forget_states(project: Project) -> None:
    """Let the trainings begin anew: no evaluation has deleted the last state of the test before."""
    for run in RUNS:
        shutil.rmtree(project.folder / f"results/checkpoints/{run}/resume", ignore_errors=True)


class Trainings:
    """Both trainings once more, by SLURM; Snakemake runs while a test does things to them."""

    def __init__(self, project: Project, cluster: Cluster) -> None:
        self.project, self.cluster = project, cluster
        self.expected = [(project.folder / weights).read_bytes() for weights in WEIGHTS]
        self.targets = list(WEIGHTS)
        for weights in self.targets:
            (project.folder / weights).unlink()
        forget_states(project)
        self.start()

    def start(self) -> None:
        """Start Snakemake."""
        with self.log.open("a") as file:
            self.process = self.project.start(*self.targets, stdout=file)

    @property
    def log(self) -> Path:
        return self.project.folder / "printed"

    def wait_for(self, state: str, n: int = 1) -> list[Job]:
        """`n` trainings that are in a state of SLURM's."""
        found: list[Job] = []

        def there() -> bool:
            found[:] = [job for job in self.cluster.jobs() if job.state == state]
            assert self.process.poll() is None, self.log.read_text()
            return len(found) >= n

        self.cluster.wait_for(there, patience=600)
        return found

    def finish(self) -> str:
        """Wait for the end, check the SAEs, and return what Snakemake printed."""
        assert self.process.wait(1800) == 0, self.log.read_text()
        made = [(self.project.folder / weights).read_bytes() for weights in WEIGHTS]
        assert made == self.expected
        return self.log.read_text()


@pytest.fixture
def trainings(trained: Project, cluster: Cluster) -> Iterator[Callable[..., Trainings]]:
    """The way to start them, with resources of their own."""
    started = []

    def start(**resources: object) -> Trainings:
        submit_from(trained, cluster, **resources)
        started.append(Trainings(trained, cluster))
        return started[-1]

    yield start
    for each in started:
        each.process.send_signal(signal.SIGINT)
        each.process.wait(60)
        each.log.unlink()


def submitted(printed: str) -> list[str]:
    """The SLURM ids of the jobs that Snakemake submitted, in order."""
    return re.findall(r"submitted with SLURM jobid (\d+)", printed)


def test_a_job_that_was_killed_for_memory_gets_more(
    trainings: Callable[..., Trainings], cluster: Cluster
) -> None:
    small, large = 300, 3000
    printed = trainings(mem_mb=f"{small} if attempt == 1 else {large}").finish()
    ids = submitted(printed)
    assert len(ids) == 4, "each twice"
    states = {job.id: (job.state, job.memory) for job in cluster.jobs("all")}
    assert [states[id] for id in ids[2:]] == [("COMPLETED", f"{large}M")] * 2
    for id in ids[:2]:
        assert states[id][0] in ("OUT_OF_MEMORY", "FAILED", "CANCELLED"), states[id]
        assert states[id][1] == f"{small}M"


def test_a_cancelled_job_runs_again_and_not_on_a_node_that_was_drained_meanwhile(
    trainings: Callable[..., Trainings], cluster: Cluster
) -> None:
    both = trainings()
    lost, kept = sorted(both.wait_for("RUNNING", 2), key=lambda job: job.node)
    assert (lost.node, kept.node) == ("n1", "n2"), "a GPU each"
    cluster.run("scontrol", "update", "nodename=n1", "state=drain", "reason=test")
    try:
        cluster.run("scancel", lost.id)
        [again] = submitted(both.finish())[2:]
    finally:
        cluster.run("scontrol", "update", "nodename=n1", "state=resume")
    jobs = {job.id: job for job in cluster.jobs("all")}
    assert jobs[lost.id].state == "CANCELLED"
    assert (jobs[again].state, jobs[again].node) == ("COMPLETED", "n2")
    assert jobs[again].comment == lost.comment


def test_a_killed_snakemake_is_followed_by_one_that_runs_no_live_job_twice(
    trainings: Callable[..., Trainings], cluster: Cluster
) -> None:
    both = trainings()
    first = both.wait_for("RUNNING", 2)
    left = " ".join(sorted(job.id for job in first))
    cluster.run("scontrol", "suspend", left.replace(" ", ","))  # so that they still live
    both.process.kill()
    both.process.wait()
    both.project.snakemake("--unlock", *both.targets)
    both.start()
    told = f"Waiting for the SLURM jobs {left}, which an earlier Snakemake started here"
    cluster.wait_for(lambda: told in both.log.read_text(), patience=600)
    assert {job.id for job in cluster.jobs()} == {job.id for job in first}
    cluster.run("scontrol", "resume", left.replace(" ", ","))
    printed = both.finish()
    jobs = {job.id: job for job in cluster.jobs("all")}
    for job in first:
        [again] = [jobs[id] for id in submitted(printed)[2:] if jobs[id].comment == job.comment]
        assert jobs[job.id].end <= again.start


def trainer(project: Project) -> int:
    """The id of the process of the one training of a project that runs."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.joinpath("cwd").readlink() == project.folder and (
                b"/scripts/train.py\0" in process.joinpath("cmdline").read_bytes()
            ):
                found.append(int(process.name))
        except OSError:  # it has just ended
            continue
    [it] = found
    return it


def test_a_job_that_was_cut_at_its_time_limit_goes_on_from_its_last_state(
    long_training: Project, cluster: Cluster
) -> None:
    project = long_training
    submit_from(project, cluster, runtime="1 if attempt == 1 else 60")
    log = project.folder / "printed"
    with log.open("w") as file:
        process = project.start(WEIGHTS[0], stdout=file)
    states = project.folder / f"results/checkpoints/{RUNS[0]}/resume"
    try:
        # Not one that is being written, whose folder has a dot, nor the first, which is of no step.
        cluster.wait_for(lambda: list(states.glob("[!.1]*/state.json")), patience=600)
        os.kill(trainer(project), signal.SIGSTOP)  # so that it uses up its minute without a core
        assert process.wait(1800) == 0, log.read_text()
    finally:
        process.kill()
    first, second = submitted(log.read_text())
    ends = {job.id: job.state for job in cluster.jobs("all")}
    assert ends[first] in ("TIMEOUT", "FAILED") and ends[second] == "COMPLETED"
    said = (project.folder / f"results/logs/train/{RUNS[0]}.log").read_text()
    found = re.search(r"an interrupted training continues after step (\d+)", said)
    assert found and int(found[1]) > 0, said
    history = json.loads((project.folder / f"results/saes/{RUNS[0]}/history.json").read_text())
    assert history["epoch"] == list(range(1, EPOCHS + 1))
