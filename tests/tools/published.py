"""A final SAE directory with an evaluation, made without a training, and the Hub to send it to."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from minihub import MiniHub
from synthetic import random_sae

from sae_core.formats.checkpoint import sae_files, write_files
from sae_core.formats.saelens import saelens_files
from sae_core.sae_base import SparseAutoencoder
from sae_core.settings.services import RepoConfig

NAME = "Qwen_Qwen3-0.6B.blocks.13.hook_resid_post.btop3sae.exp4"
REPO = RepoConfig(hf_repo_id="alice/saes", hf_license="mit", hf_dataset="alice/texts")
API = "/api/models/alice/saes"

METADATA = {
    "model_name": "Qwen/Qwen3-0.6B",
    "model_commit": "0123abcd",
    "model_dtype": "float32",
    "data_file": "texts.json",
    "data_sha256": "5" * 64,
    "prepend_bos": False,
    "max_text_length": 256,
    "val_fraction": 0.1,
    "seed": 420,
    "training": {"num_epochs": 2, "lr": 0.001},
    "tokens": 12345,
}
FIGURES = {
    "l0": 3.25,
    "fvu": 0.125,
    "ce_clean": 3.1,
    "ce_sae": 3.4,
    "ce_mean_ablation": 7.0,
    "ce_zero_ablation": 6.1,
    "loss_recovered": 0.9,
    "kl": 0.2,
    "dead_fraction": 0.05,
    "n_tokens": 2000,
    "n_left_alone": 16,
    "ce_sae_all_spliced": 3.9,
    "loss_recovered_all_spliced": 0.733,
    "kl_all_spliced": 0.6,
    "n_left_alone_all_spliced": 0,
    "ce_sae_sinks_kept": 3.3,
    "loss_recovered_sinks_kept": 0.933,
    "kl_sinks_kept": 0.17,
    "n_left_alone_sinks_kept": 21,
    "ce_sae_by_norm": 3.31,
    "loss_recovered_by_norm": 0.93,
    "kl_by_norm": 0.18,
    "n_left_alone_by_norm": 19,
    "l0_quantiles": {"0.5": 3.0},
}


class Made(NamedTuple):
    folder: Path
    evaluation: Path
    sae: SparseAutoencoder


def commits(server: MiniHub) -> int:
    """In the repository of `REPO`."""
    return len(server.repositories["alice/saes"].commits)


def make_sae_directory(folder: Path, kind: str = "batch_topk", seed: int = 0) -> Made:
    """Write an SAE directory, and its evaluation beside it."""
    sae = random_sae(kind, torch.float32, seed=seed, metadata=METADATA)
    history = {"epoch": [1, 2], "loss": [2.0, 1.0]}
    write_files(folder, sae_files(sae, history) | saelens_files(sae))
    figures = {"run_name": folder.name, "d_sae": sae.spec.d_sae, "top_k": sae.spec.top_k}
    evaluation = folder.with_name(f"{folder.name}.evaluation.json")
    evaluation.write_text(json.dumps(figures | FIGURES))
    return Made(folder, evaluation, sae)


def environment(hub: MiniHub, home: Path, token: str = "hf_alice") -> dict[str, str]:
    """The environment of a command that is to use `hub`."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "0" if hub.xet else "1",
        "PATH": os.environ["PATH"],
    }


@contextmanager
def hub_here(
    root: Path, monkeypatch: pytest.MonkeyPatch, token: str = "hf_alice", xet: bool = True
) -> Iterator[MiniHub]:
    """A Hub that the client in this process takes for the real one."""
    import huggingface_hub
    from huggingface_hub import constants

    if "transformers" in sys.modules:
        import transformers.utils.hub

        # Its own client keeps the address of an earlier test's Hub.
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)

    with MiniHub(root / "hub", xet=xet) as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(root / "no token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
        monkeypatch.setenv("HF_TOKEN", token)
        yield hub
        huggingface_hub.close_session()
