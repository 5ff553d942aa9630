"""SAEs of every kind, trained and uploaded here, as sae-lens opens them; and SAEs of sae-lens and
dictionary_learning, imported here. Both libraries live in an environment of their own, whose
Python the variable PEERS names: `make test-interop`."""

import json
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from minihub import MiniHub
from published import environment, hub_here
from running import ROOT
from safetensors.torch import load_file, save_file
from synthetic import SparseDirections, SparseMap
from torch import Tensor

from sae_core import load_pretrained
from sae_core.formats.foreign import import_sae
from sae_core.models.language_model import Hook
from sae_core.publishing import hub
from sae_core.sae.config import SAEConfig
from sae_core.sae.kinds import KINDS
from sae_core.sae_train import train_sae
from sae_core.settings.services import RepoConfig
from sae_core.train_config import DataConfig, RuntimeConfig, TrainingConfig
from sae_core.trainer.training_inputs import Activations, Provenance, Settings
from sae_core.training import Observer

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("interop-peers")]

REPO = RepoConfig(hf_repo_id="alice/saes")
TIMEOUT = 300
"""Seconds for both libraries to start and answer."""

THEIRS = [
    *(
        f"checkpoint {name}"
        for name in ("standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka_batchtopk")
    ),
    *(f"saelens {name}" for name in ("standard", "gated", "jumprelu", "topk")),
    *(
        f"dictionary_learning {name}"
        for name in ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder",
                     "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")
    ),
]  # fmt: skip


class Exchange(NamedTuple):
    ours: Path
    theirs: Path
    x: Tensor


def trained(kind: str, root: Path, source: SparseDirections, target: Hook | None = None) -> Path:
    """An SAE or transcoder of that kind, after a short training, exported."""
    name = f"{kind} transcoder" if target else kind
    provenance = Provenance("gpt2", None, "float32", "texts.json", "0" * 64, True)
    hook = Hook(3, "mlp.hook_in" if target else "hook_resid_post")
    settings = Settings(
        sae=SAEConfig(sae_type=kind, topk=2, sparsity_penalty=0.01),  # type: ignore[arg-type]
        data=DataConfig(max_text_length=32),
        training=TrainingConfig(num_epochs=2, tokens_per_step=256, compute_dtype="float32"),
        runtime=RuntimeConfig(device="cpu", checkpoint_freq=0),
    )
    return train_sae(
        Activations(source, hook, 16, provenance, target),
        settings,
        root / "ours" / name,
        root / "points" / name,
        Observer(),
    )


@pytest.fixture(scope="module")
def exchange(tmp_path_factory: pytest.TempPathFactory) -> Exchange:
    """What each side makes of the other's SAEs."""
    root = tmp_path_factory.mktemp("interop")
    source = SparseDirections(n_train=16)
    x = source.activations[-8:].flatten(0, 1)
    folders = [trained(kind, root, source) for kind in KINDS]
    pairs, target = SparseMap(n_train=16), Hook(3, "hook_mlp_out")
    folders += [trained(kind, root, pairs, target) for kind in KINDS]
    save_file({"x": x}, root / "ours/x.safetensors")
    (root / "theirs").mkdir()
    with pytest.MonkeyPatch.context() as patch, hub_here(root, patch) as server:
        for folder in folders:
            hub.upload(folder, None, REPO)
        answer(root, server)
    return Exchange(root / "ours", root / "theirs", x)


def answer(root: Path, server: MiniHub) -> None:
    script, repo = ROOT / "tests/tools/peers.py", str(REPO.hf_repo_id)
    done = subprocess.run(
        [os.environ["PEERS"], str(script), str(root / "ours"), str(root / "theirs"), repo],
        env={**os.environ, **environment(server, root / "home")},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["", " transcoder"])
@pytest.mark.parametrize("way", ["disk", "hub"])
def test_saelens_computes_the_same(kind: str, what: str, way: str, exchange: Exchange) -> None:
    sae = load_pretrained(exchange.ours / (kind + what))
    theirs = load_file(exchange.ours / (kind + what) / f"{way}.safetensors")
    features = sae.encode(exchange.x)
    assert 0 < (features > 0).float().mean() < 0.9
    torch.testing.assert_close(theirs["features"], features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs["x_hat"], sae.decode(features), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_saelens_finds_the_metadata(kind: str, exchange: Exchange) -> None:
    found = json.loads((exchange.ours / kind / "metadata.json").read_text())
    expected = {
        "model_name": "gpt2",
        "hook_name": "blocks.3.hook_resid_post",
        "context_size": 32,
        "prepend_bos": True,
        "dataset_path": "texts.json",
    }
    assert expected.items() <= found.items()
    found = json.loads((exchange.ours / f"{kind} transcoder/metadata.json").read_text())
    expected |= {"hook_name": "blocks.3.mlp.hook_in", "hook_name_out": "blocks.3.hook_mlp_out"}
    assert expected.items() <= found.items()


@pytest.mark.parametrize("name", THEIRS)
def test_an_imported_sae_computes_the_same(name: str, exchange: Exchange) -> None:
    sae = import_sae(exchange.theirs / name)
    theirs = load_file(exchange.theirs / name / "answer.safetensors")
    features = sae.encode(exchange.x)
    torch.testing.assert_close(sae.decode(features), theirs["x_hat"], rtol=1e-4, atol=1e-3)
    assert torch.equal(features > 0, theirs["features"] > 0)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(sae.spec.d_sae))
    assert sae.spec.hook_spec == "blocks.3.hook_resid_post"
    assert sae.spec.metadata["model_name"] == "gpt2"


def test_every_class_that_was_made_is_compared(exchange: Exchange) -> None:
    assert {path.name for path in exchange.theirs.iterdir()} == set(THEIRS)
