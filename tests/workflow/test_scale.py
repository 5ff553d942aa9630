"""A thousand SAEs: the plan of all jobs is made in seconds, and does not take the memory."""

import resource
import subprocess

from project import Project

MODELS, LAYERS, TOPK = 8, 36, (16, 32, 64, 128)
SECONDS, GB = 30, 1.0


def test_the_jobs_of_a_thousand_saes_are_planned(project: Project) -> None:
    config = project.config
    settings = {"layers": list(range(LAYERS)), "saes": [{"topk": k} for k in TOPK]}
    config["models"] = [{"name": f"a/model-{i}", **settings} for i in range(MODELS)]
    project.configure(config)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = project.start("--dry-run", "--quiet", "rules", stdout=subprocess.PIPE)
    printed, _ = process.communicate(timeout=1800)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == 0, printed
    n_saes = MODELS * LAYERS * len(TOPK)
    for rule in ("train", "evaluate", "plot"):
        assert [rule, str(n_saes)] in [line.split() for line in printed.splitlines()]
    # Of the processor, which is not the clock's where others compute as well.
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < SECONDS
    assert after.ru_maxrss * 1024 < GB * 1e9
