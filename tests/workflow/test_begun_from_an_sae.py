"""An SAE that begins with another of its configuration: made after it, and again when it is."""

import json

import pytest
from project import Project

ORIGIN = "tiny.blocks.2.hook_resid_post.btop4sae.exp2"
TUNED = "tiny.blocks.2.hook_resid_post.btop4sae-ft.exp2"


@pytest.mark.slow
def test_an_sae_begins_with_another_and_follows_it(project: Project) -> None:
    config = project.config
    config["models"][0]["layers"] = [2]
    name = ORIGIN.replace("2", "{layer}", 1)
    config["models"][0]["saes"] = [{"topk": 4}, {"topk": 4, "init_from": name}]
    project.configure(config)
    target = f"results/saes/{TUNED}/weights.pt"
    project.snakemake(target)
    folder = project.folder / "results/saes"
    origin, tuned = (
        json.loads((folder / run / "config.json").read_text()) for run in (ORIGIN, TUNED)
    )
    origin_of_it = tuned["metadata"]["init_from"]
    assert origin_of_it["name"] == ORIGIN
    assert origin_of_it["sha256"]["weights.pt"] == origin["weights_sha256"]
    assert not project.planned(target).rules
    config["training"]["num_epochs"] = 1
    project.configure(config)
    assert project.planned(target).rules["train"] == 2
