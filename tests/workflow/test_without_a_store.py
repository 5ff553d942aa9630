"""SAEs from a stream are those from stored activations, and one that changes is trained alone."""

import json
import shutil

import pytest
from project import Project

NAMES = [f"tiny.blocks.2.hook_resid_post.btop{k}sae.exp2" for k in (4, 8)]
TARGETS = [f"results/saes/{name}/weights.pt" for name in NAMES]
TUNED = "results/saes/tiny.blocks.2.hook_resid_post.btop4sae-ft.exp2/weights.pt"


def files(project: Project) -> dict[str, bytes]:
    return {
        f"{name}/{path.name}": path.read_bytes()
        for name in NAMES
        for path in (project.folder / "results/saes" / name).iterdir()
    }


@pytest.mark.slow
def test_a_stream_makes_the_saes_of_a_store(project: Project) -> None:
    config = project.config
    config["models"][0]["layers"] = [2]
    config["harvest"] = {"passes": 2}  # a pass for each epoch, as a stream has them
    project.configure(config)
    project.snakemake(*TARGETS)
    stored = files(project)
    assert len(stored) == 10
    config["harvest"] = {"store": False}
    project.configure(config)
    project.snakemake("--delete-all-output", *TARGETS)
    shutil.rmtree(project.folder / "results/checkpoints")  # has their last states
    assert project.planned(*TARGETS).rules["stream"] == 1
    project.snakemake(*TARGETS)
    assert files(project) == stored
    left = project.folder / "results/streams/tiny"
    assert sorted(path.name for path in left.iterdir()) == [f"{name}.json" for name in NAMES]
    assert not project.planned(*TARGETS).rules
    config["models"][0]["saes"][1]["topk_aux"] = 3
    project.configure(config)
    jobs = project.planned(*TARGETS)
    assert jobs.rules == {"stream": 1, "train": 1} and jobs.runs["train"] == {"2.k8"}
    config["models"][0]["saes"].append({"topk": 4, "init_from": NAMES[0]})
    project.configure(config)
    project.snakemake(*TARGETS, TUNED)
    changed = {name.split("/")[0] for name, made in files(project).items() if made != stored[name]}
    assert changed == {NAMES[1]}
    tuned = json.loads((project.folder / TUNED).with_name("config.json").read_text())
    assert tuned["metadata"]["init_from"]["name"] == NAMES[0]
    assert not project.planned(*TARGETS, TUNED).rules
