"""Our figures of an SAE against those that SAELens and plain transformers give for it, in their
own environment: `make test-interop`."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from running import ROOT
from safetensors.torch import save_file
from tiny_model import make_tiny_model

from sae_core.activations.language_model import Hook, LanguageModel
from sae_core.activations.store import StreamingSource
from sae_core.activations.token_windows import TokenWindows, read_windows
from sae_core.checkpoint import load_sae
from sae_core.evaluation.metrics import evaluate
from sae_core.kinds import KINDS
from sae_core.sae_config import SAEConfig
from sae_core.sae_train import Origin, SAETrainer
from sae_core.train_config import DataConfig, ModelConfig, RuntimeConfig, TrainingConfig
from sae_core.training import Observer

HOOK = Hook(2, "hook_resid_post")
DATA = DataConfig(max_text_length=32, val_fraction=0.3)
TIMEOUT = 300
TOLERANCE = 0.01


def train(kind: str, model: LanguageModel, windows: TokenWindows, folder: Path) -> None:
    """An SAE on the model's activations, exported into `folder`."""
    source = StreamingSource(model, windows, HOOK, batch_size=8, tokens_per_step=256, seed=0)
    trainer = SAETrainer(
        source,
        HOOK,
        model.d_model,
        Origin("tiny", None, "float32", "texts.json", "0" * 64, False),
        sae=SAEConfig(sae_type=kind, topk=6, sparsity_penalty=0.02),  # type: ignore[arg-type]
        data=DATA,
        training=TrainingConfig(num_epochs=4, tokens_per_step=256, compute_dtype="float32"),
        runtime=RuntimeConfig(device="cpu", checkpoint_freq=0),
        checkpoints=folder / "points" / kind,
        observer=Observer(),
    )
    trainer.train()
    trainer.export(folder / "saes" / kind)


@pytest.fixture(scope="module")
def evaluated(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> dict[str, tuple[dict[str, float], dict[str, float]]]:
    """Our figures and theirs of an SAE of every kind, on the same tokens."""
    root = tmp_path_factory.mktemp("evaluation")
    path = make_tiny_model(root / "model", " ".join(texts))
    config = ModelConfig(model_name=str(path), model_dtype="float32")
    model = LanguageModel.load(config, torch.device("cpu"))
    windows = read_windows(model.tokenizer, texts, DATA)
    tokens = windows.evaluation()
    for kind in KINDS:
        train(kind, model, windows, root)
    save_file({"tokens": tokens}, root / "saes/tokens.safetensors")
    script = ROOT / "tests/tools/peer_evaluation.py"
    done = subprocess.run(
        [os.environ["PEERS"], str(script), str(path), str(root / "saes")],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    return {
        kind: (
            evaluate(model, load_sae(root / "saes" / kind), tokens, batch_size=4),
            json.loads((root / "saes" / kind / "theirs.json").read_text()),
        )
        for kind in KINDS
    }


@pytest.mark.parametrize("kind", KINDS)
def test_figures_agree(
    kind: str, evaluated: dict[str, tuple[dict[str, float], dict[str, float]]]
) -> None:
    ours, theirs = evaluated[kind]
    assert 0 < ours["fvu"] < 1 and ours["kl"] > 1e-4 and ours["l0"] > 1
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=TOLERANCE)
    recovered = (theirs["ce_zero_ablation"] - theirs["ce_sae"]) / (
        theirs["ce_zero_ablation"] - theirs["ce_clean"]
    )
    assert ours["loss_recovered"] == pytest.approx(recovered, rel=TOLERANCE)
