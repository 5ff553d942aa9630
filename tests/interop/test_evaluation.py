"""Our figures of an SAE against those that SAELens, SAEBench and plain transformers give for it, in
their own environment: `make test-interop`."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from running import ROOT
from safetensors.torch import save_file
from tiny_model import make_tiny_model

from sae_core.activations.store import StreamingSource
from sae_core.activations.token_windows import TokenWindows, read_windows
from sae_core.evaluation.metrics import evaluate
from sae_core.formats.checkpoint import load_sae
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.sae.config import SAEConfig
from sae_core.sae.kinds import KINDS
from sae_core.sae_train import train_sae
from sae_core.train_config import DataConfig, ModelConfig, RuntimeConfig, TrainingConfig
from sae_core.trainer.training_inputs import Activations, Provenance, Settings
from sae_core.training import Observer

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("interop-evaluation")]

HOOK = Hook(2, "hook_resid_post")
DATA = DataConfig(max_text_length=32, val_fraction=0.3)
LENGTH = 128
"""Tokens in an evaluated window, BOS included: a prediction more or less, which is what the tools
differ by, is less than the tolerance."""
TIMEOUT = 300
TOLERANCE = 0.01
SAME = 0.001
"""The same formula on the same predictions."""


def train(kind: str, model: LanguageModel, windows: TokenWindows, folder: Path) -> None:
    """An SAE on the model's activations, exported into `folder`."""
    source = StreamingSource(model, windows, HOOK, batch_size=8, tokens_per_step=256, seed=0)
    provenance = Provenance("tiny", None, "float32", "texts.json", "0" * 64, True)
    settings = Settings(
        sae=SAEConfig(sae_type=kind, topk=6, sparsity_penalty=0.02),  # type: ignore[arg-type]
        data=DATA,
        training=TrainingConfig(num_epochs=4, tokens_per_step=256, compute_dtype="float32"),
        runtime=RuntimeConfig(device="cpu", checkpoint_freq=0),
    )
    train_sae(
        Activations(source, HOOK, model.d_model, provenance),
        settings,
        folder / "saes" / kind,
        folder / "points" / kind,
        Observer(),
    )


Figures = dict[str, dict[str, float]]
"""By who gives them."""


@pytest.fixture(scope="module")
def evaluated(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> dict[str, tuple[dict[str, float], Figures]]:
    """Our figures and theirs of an SAE of every kind, on the same tokens of a model with a BOS."""
    root = tmp_path_factory.mktemp("evaluation")
    path = make_tiny_model(root / "model", " ".join(texts), bos=True)
    config = ModelConfig(model_name=str(path), model_dtype="float32")
    model = LanguageModel.load(config, torch.device("cpu"))
    windows = read_windows(model.tokenizer, texts, DATA)
    tokens = read_windows(model.tokenizer, texts, replace(DATA, max_text_length=LENGTH))
    tokens = tokens.evaluation()
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


LOSSES = {
    "ce_clean": "ce_loss_without_sae",
    "ce_sae": "ce_loss_with_sae",
    "ce_zero_ablation": "ce_loss_with_ablation",
    "loss_recovered": "ce_loss_score",
}
"""Our names of losses, and those of SAELens and SAEBench."""


def close(ours: dict[str, float], theirs: dict[str, float], suffix: str) -> bool:
    names = {name: name if name in ("ce_clean", "ce_zero_ablation") else f"{name}{suffix}"
             for name in LOSSES}  # fmt: skip
    expected = {name: theirs[LOSSES[name]] for name in LOSSES}
    return {name: ours[names[name]] for name in LOSSES} == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_figures_agree(kind: str, evaluated: dict[str, tuple[dict[str, float], Figures]]) -> None:
    ours, theirs = evaluated[kind]
    assert 0 < ours["fvu"] < 1 and ours["kl"] > 1e-4 and ours["l0"] > 1
    assert {name: ours[name] for name in theirs["ours"]} == pytest.approx(theirs["ours"], rel=SAME)
    assert ours["kl"] != pytest.approx(ours["kl_all_spliced"], rel=SAME)
    assert close(ours, theirs["sae_lens"], "")
    assert close(ours, theirs["sae_lens_all_spliced"], "_all_spliced")


@pytest.mark.parametrize("kind", KINDS)
def test_figures_of_sae_bench_are_what_the_documentation_says(
    kind: str, evaluated: dict[str, tuple[dict[str, float], Figures]]
) -> None:
    ours, theirs = evaluated[kind]
    reported = theirs["sae_bench"]
    assert close(ours, reported, "_all_spliced")
    kl = reported["kl_div_with_sae"]  # also of the prediction after the last token
    assert ours["kl_all_spliced"] == pytest.approx(kl, rel=3 * TOLERANCE)
    documented = theirs["sae_bench_as_documented"]
    assert {name: reported[name] for name in documented} == pytest.approx(documented, rel=1e-3)
    pooled = theirs["every_token"]["explained_variance"]
    assert pooled != pytest.approx(reported["explained_variance"], rel=TOLERANCE)
