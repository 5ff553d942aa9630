"""A model whose SAEs are each trained by two processes."""

import pytest
import torch
from project import Project

from sae_core import load_pretrained

pytestmark = pytest.mark.slow

RUN = "tiny.blocks.2.hook_resid_post.btop4sae.exp2"


def test_two_processes_share_a_training(completed_copy: Project) -> None:
    project = completed_copy
    folder = project.folder / "results/saes" / RUN
    expected = load_pretrained(folder).tensors()
    config = project.config
    config["models"][0]["gpus"] = 2
    project.configure(config)
    assert not project.planned(f"results/saes/{RUN}/weights.pt").rules["train"]
    project.snakemake(
        f"results/saes/{RUN}/weights.pt", "--forcerun", "train", "--resources", "gpu=2"
    )
    found = load_pretrained(folder).tensors()
    assert any(not torch.equal(found[name], tensor) for name, tensor in expected.items())
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-2, atol=1e-3, msg=name)
    log = project.folder / f"results/logs/train/{RUN}.log"
    assert log.read_text().count("SAE: ") == 1
