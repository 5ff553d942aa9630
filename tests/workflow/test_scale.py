"""A thousand SAEs: the plan of all jobs is made in seconds, and does not take the memory; every
job's command can be run."""

import json
import subprocess
import sys

import pytest
from project import Project

pytestmark = pytest.mark.slow

MODELS, LAYERS, TOPK = 8, 36, (16, 32, 64, 128)
SECONDS, GB = 30, 1.0
LONGEST = 100_000
"""Characters of a command; Linux takes 131,071 bytes as one argument of `bash -c`."""

MEASURE = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
seconds = used.ru_utime + used.ru_stime
print(json.dumps([done.returncode, done.stdout, seconds, 1024 * used.ru_maxrss]))
"""
"""Runs a command; prints its status, what it printed, and its processor time and memory."""


def test_the_jobs_of_a_thousand_saes_are_planned(project: Project) -> None:
    config = project.config
    settings = {"layers": list(range(LAYERS)), "saes": [{"topk": k} for k in TOPK]}
    config["models"] = [{"name": f"a/model-{i}", **settings} for i in range(MODELS)]
    project.configure(config)
    command = project.command("--dry-run", "--printshellcmds")
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, *command],
        cwd=project.folder,
        env=project.variables(),
        stdout=subprocess.PIPE,
        timeout=1800,
        check=True,
    )
    status, printed, seconds, n_bytes = json.loads(measured.stdout)
    assert status == 0, printed
    n_saes = MODELS * LAYERS * len(TOPK)
    for rule in ("train", "evaluate", "plot"):
        assert [rule, str(n_saes)] in [line.split() for line in printed.splitlines()]
    commands = [line for line in printed.splitlines() if line.startswith("Shell command: ")]
    assert len(commands) > 5 * n_saes
    assert max(map(len, commands)) < LONGEST
    assert seconds < SECONDS  # of the processor: others may compute here as well
    assert n_bytes < GB * 1e9
