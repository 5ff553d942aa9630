"""A workflow whose processes are killed, one after the other, ends as one that is left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chaos import artifacts, differences, disturb, processes, start
from project import TIMEOUT, Project

pytestmark = pytest.mark.slow

RUN = "tiny.blocks.2.hook_resid_post.btop4sae.exp2"
TARGETS = (f"results/saes/{RUN}/weights.pt", f"results/evaluations/{RUN}.json")


def often(project: Project) -> Project:
    """The project with the state stored twice a second, which changes no result."""
    config = project.config
    config["runtime"]["resume_minutes"] = 1 / 120
    project.configure(config)
    return project


def epochs(project: Project) -> list[int]:
    """The epochs that were trained, as they were recorded."""
    metrics = (project.folder / f"results/checkpoints/{RUN}/metrics.jsonl").read_text()
    return [json.loads(line)["epoch"] for line in metrics.splitlines() if '"epoch", ' in line]


def test_chaos(completed: Project, project: Project) -> None:
    project.python = None  # each is killed by itself
    kills, _ = disturb(often(project), 4, 0, *TARGETS)
    assert kills > 0
    expected, found = artifacts(completed.folder), artifacts(project.folder)
    assert any(name.endswith("weights.pt") for name in found)
    assert not differences({name: expected.get(name, "") for name in found}, found)
    assert not list((project.folder / "results").rglob("*.lock"))
    assert not list((project.folder / "results/checkpoints").glob("*/resume*"))


@pytest.mark.parametrize(("script", "stores"), [("train.py", True), ("stream.py", False)])
def test_a_training_that_is_killed_as_it_ends_is_not_repeated(
    script: str, stores: bool, project: Project, tmp_path: Path
) -> None:
    """The last that the process does, when its SAE is there, is to kill itself, once."""
    killed = tmp_path / "killed"
    path = project.folder / "scripts" / script
    start = 'if __name__ == "__main__":'
    before, _, after = path.read_text().partition(start)
    path.write_text(f"""{before}
import atexit, os, pathlib

def kill():
    killed = pathlib.Path({str(killed)!r})
    if not killed.exists():
        killed.touch()
        os.kill(os.getpid(), 9)

atexit.register(kill)
{start}{after}""")
    config = project.config
    config["harvest"] = {"store": stores}
    project.configure(config)
    project.snakemake(TARGETS[0], "--retries", "1")
    assert killed.exists()
    log = project.folder / "results/logs" / script.removesuffix(".py")
    [log] = [path for path in log.glob("*.log")]
    assert "continues after step" in log.read_text()
    assert epochs(project) == list(range(1, len(epochs(project)) + 1))
    states = project.folder / f"results/checkpoints/{RUN}/resume"
    assert states.is_dir(), "until the training is known to have ended well"
    project.snakemake(TARGETS[1])
    assert not states.exists()


def wait_for(pattern: str, project: Project, session: int) -> None:
    end = time.monotonic() + TIMEOUT
    while not list(project.folder.glob(pattern)):
        assert time.monotonic() < end and processes(session), f"no {pattern}"
        time.sleep(0.05)


def unlock(project: Project) -> subprocess.CompletedProcess[str]:
    script = project.folder / "scripts/unlock.py"
    return subprocess.run(
        [sys.executable, script], cwd=project.folder, capture_output=True, text=True, timeout=60
    )


def test_a_killed_snakemake_is_started_again(project: Project) -> None:
    target = "results/data/processed_textbooks_all.json"
    run = start(project, target)
    try:
        wait_for(".snakemake/locks/*.holder.json", project, run.pid)
        os.kill(run.pid, signal.SIGSTOP)  # or it may be done before it is looked for
        refused = unlock(project)
        assert refused.returncode == 1 and str(run.pid) in refused.stderr
        os.kill(run.pid, signal.SIGKILL)
        run.wait(60)
    finally:
        for pid in processes(run.pid):
            os.kill(pid, signal.SIGKILL)
    assert "cannot be locked" in project.snakemake(target, ok=False)
    done = unlock(project)
    assert done.returncode == 0 and "is removed" in done.stdout
    project.snakemake(target)
    assert not unlock(project).stdout
    assert (project.folder / target).is_file()


def test_the_workflow_goes_on_with_a_training_that_was_stopped(project: Project) -> None:
    """As SLURM stops it before the time limit: the job is tried again by itself."""
    config = project.config
    config["training"] |= {"num_epochs": 12, "early_stopping_patience": 0}
    project.configure(config)
    run = start(often(project), TARGETS[0])
    try:
        wait_for(f"results/checkpoints/{RUN}/best_model.pt", project, run.pid)
        [trainer] = [
            pid
            for pid in processes(run.pid)
            if b"scripts/train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        os.kill(trainer, signal.SIGUSR1)
        assert run.wait(TIMEOUT) == 0
    finally:
        for pid in processes(run.pid):
            os.kill(pid, signal.SIGKILL)
    log = (project.folder / "chaos.log").read_text()
    assert "interrupted by SIGUSR1" in log and "run it again to continue" in log
    assert epochs(project) == list(range(1, 13))
