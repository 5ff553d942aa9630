"""A language model whose residual is too large for float16, as outliers of Qwen3 are."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_core.sae_train import train_from_model
from sae_core.train_config import RunConfig
from sae_core.trainer.events import Observer
from sae_core.utils import cli
from sae_core.utils.errors import SAEError

OPTIONS = (
    "--device cpu --num-epochs 2 --max-text-length 32 --tokens-per-step 64 --sae-expansion 2 "
    "--topk 4 --no-use-end-to-end --hook-layer 1 --resume-minutes 0"
)


@pytest.fixture(scope="module")
def overflowing(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, texts: list[str]
) -> list[str]:
    """Options for a tiny model in which one dimension of layer 1's output is past 65504."""
    folder = tmp_path_factory.mktemp("overflow")
    (folder / "texts.json").write_text(json.dumps(texts[:40]))
    model = folder / "model"
    shutil.copytree(tiny_model, model)
    weights = load_file(model / "model.safetensors")
    mlp = "model.layers.1.mlp"
    for name in ("gate_proj", "up_proj"):
        weights[f"{mlp}.{name}.weight"] *= 20
    weights[f"{mlp}.down_proj.weight"][7].fill_(6e4)  # finite in float16, as all weights are
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    return [*OPTIONS.split(), "--model-name", str(model), "--data-path", str(folder / "texts.json")]


def train(overflowing: list[str], folder: Path, *options: str) -> Path:
    roots = ["--output-root", str(folder / "saes"), "--checkpoint-root", str(folder / "points")]
    return train_from_model(cli.parse(RunConfig, "", [*overflowing, *roots, *options]), Observer())


def test_float16_that_overflows_names_layer_and_dtype(
    overflowing: list[str], tmp_path: Path
) -> None:
    with pytest.raises(SAEError) as error:
        train(overflowing, tmp_path, "--model-dtype", "float16")
    message = str(error.value)
    assert "blocks.1.hook_resid_post: activations not finite" in message
    assert "in float16; use --model-dtype bfloat16 or float32" in message
    assert not (tmp_path / "saes").exists() or not list((tmp_path / "saes").iterdir())


@pytest.mark.parametrize(
    "options", ["--model-dtype bfloat16", "--model-dtype float16 --hook-layer 0"]
)
def test_what_the_message_says_helps(options: str, overflowing: list[str], tmp_path: Path) -> None:
    sae = train(overflowing, tmp_path, *options.split())
    history = json.loads((sae / "history.json").read_text())
    assert history["skipped_batches"] == [0, 0]
    assert torch.load(sae / "weights.pt", weights_only=True)["W_dec"].isfinite().all()
