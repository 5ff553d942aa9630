"""A transcoder from the configuration to its evaluation."""

import json

import pytest
from project import Project

from sae_core import load_pretrained

pytestmark = pytest.mark.slow

NAME = "tiny.blocks.2.mlp.hook_in-hook_mlp_out.btop4sae.exp2"


def test_a_transcoder_is_harvested_trained_and_evaluated(completed_copy: Project) -> None:
    project = completed_copy
    config = project.config
    hooks = {"hook_name": "mlp.hook_in", "target_hook_name": "hook_mlp_out"}
    config["models"][0] |= hooks | {"layers": [2], "saes": [{"topk": 4}]}
    project.configure(config)
    project.snakemake(f"results/evaluations/{NAME}.json")
    results = project.folder / "results"
    receipt = results / "harvests/tiny/mlp.hook_in-hook_mlp_out/2/0.json"
    stored = json.loads(receipt.read_text())["hooks"]
    assert stored == ["blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out"]
    assert load_pretrained(results / "saes" / NAME).spec.target_hook_name == "hook_mlp_out"
    figures = json.loads((results / f"evaluations/{NAME}.json").read_text())
    assert figures["hook_spec"] == "blocks.2.mlp.hook_in-hook_mlp_out"
    assert 0 < figures["fvu"] < 1.5 and figures["l0"] > 0
    # the SAE at the same hook is another one, from activations of its own
    del config["models"][0]["target_hook_name"]
    project.configure(config)
    planned = project.planned()
    assert planned.rules["harvest"] == planned.rules["train"] == 1
