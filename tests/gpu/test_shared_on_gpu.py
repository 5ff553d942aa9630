"""One training on two real GPUs, in steps of fixed sizes: what it is on one."""

import json
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available() or torch.version.cuda is None or torch.cuda.device_count() < 2:
    pytest.skip("needs two NVIDIA GPUs", allow_module_level=True)

from running import run_python

from sae_core.formats.checkpoint import load_sae

TOOL = "tests/tools/shared_training.py"


def test_two_gpus_train_what_one_does(tiny_model: Path, texts: list[str], tmp_path: Path) -> None:
    data = tmp_path / "texts.json"
    data.write_text(json.dumps(texts))
    for n in (1, 2):
        given = "--model", tiny_model, "--texts", data, "--device", "cuda", "--first-only"
        run_python(TOOL, tmp_path / str(n), *given, "--gpus", n)
    one, both = (load_sae(tmp_path / str(n) / "batch_topk").tensors() for n in (1, 2))
    for name, tensor in one.items():
        torch.testing.assert_close(both[name], tensor, rtol=1e-3, atol=2e-4, msg=name)
