"""What the unit tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

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
