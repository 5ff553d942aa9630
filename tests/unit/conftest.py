"""What the unit tests share."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from minihub import MiniHub
from published import NAME, Made, hub_here, make_sae_directory
from torch import Tensor

from sae_core.activations.token_windows import TokenWindows, read_windows
from sae_core.models import language_model as module
from sae_core.models.language_model import LanguageModel
from sae_core.train_config import DataConfig, ModelConfig


@pytest.fixture(scope="session", autouse=True)
def small_passes() -> Iterator[None]:
    """Several forward passes even for the few windows here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CPU_TOKENS", 100)
        yield


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass takes as many windows as the settings say."""
    monkeypatch.setattr(LanguageModel, "windows_at_once", lambda self, length, n: n)


@pytest.fixture(scope="session")
def language_model(tiny_model: Path) -> LanguageModel:
    """The tiny Qwen3 model, in float32."""
    config = ModelConfig(model_name=str(tiny_model), model_dtype="float32")
    return LanguageModel.load(config, torch.device("cpu"))


@pytest.fixture(scope="session")
def windows(language_model: LanguageModel, texts: list[str]) -> TokenWindows:
    """Windows of 24 tokens, a quarter of the texts held out."""
    data = DataConfig(max_text_length=24, val_fraction=0.25, seed=5)
    return read_windows(language_model.tokenizer, texts[:12], data)


@pytest.fixture(scope="module")
def tokens(windows: TokenWindows) -> Tensor:
    """Three training windows (3, L)."""
    return windows.train(0, torch.arange(3))


# For what is sent to a Hub on this machine, or comes from it


@pytest.fixture(params=[True, False], ids=["xet", "lfs"])
def both(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MiniHub]:
    """The Hub, once with Xet and once with LFS."""
    with hub_here(tmp_path, monkeypatch, xet=request.param) as server:
        yield server


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MiniHub]:
    """The Hub, with LFS."""
    with hub_here(tmp_path, monkeypatch, xet=False) as server:
        yield server


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """An SAE directory to send."""
    return make_sae_directory(tmp_path / NAME)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waiting is noted, not done."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited
