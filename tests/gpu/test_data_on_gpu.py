"""The way of activations on a real GPU: to the disk and back, and the memory that it takes."""

import gc
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available() or torch.version.cuda is None:
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from random_model import make_random_model
from transformers import AutoTokenizer

from sae_core.activations import store
from sae_core.activations.shards import harvest
from sae_core.activations.store import CachedSource
from sae_core.activations.token_windows import TokenWindows, read_windows
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.train_config import DataConfig, ModelConfig
from sae_core.trainer.resume import SavedStates, StateWriter
from sae_core.trainer.training_state import TrainingState
from sae_core.utils.code_hash import ROOT
from sae_core.workflow import fitting
from sae_core.workflow.plan_tables import Tables

GPU, CPU = torch.device("cuda"), torch.device("cpu")
HOOKS = [Hook(0, "hook_resid_post"), Hook(1, "hook_mlp_out")]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> LanguageModel:
    return LanguageModel.load(ModelConfig(model_name=str(tiny_model)), GPU, n_blocks=2)


@pytest.fixture(scope="module")
def windows(model: LanguageModel, texts: list[str]) -> TokenWindows:
    data = DataConfig(max_text_length=24, val_fraction=0.25, seed=5)
    return read_windows(model.tokenizer, texts, data)


def test_what_is_harvested_is_what_the_model_gave(
    model: LanguageModel,
    windows: TokenWindows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And comes back as the same batches on the GPU and on a CPU, in many small chunks."""
    monkeypatch.setattr(store, "SHUFFLE_TOKENS", 23 * 7)
    harvest(model, windows, HOOKS, tmp_path / "shard", batch_size=5)
    for hook in HOOKS:
        sources = [
            CachedSource([tmp_path / "shard"], hook, tokens_per_step=100, seed=5, device=device)
            for device in (GPU, CPU)
        ]
        for first in range(0, windows.n_train - 5, 5):
            indices = torch.arange(first, first + 5)
            given = model.activations(windows.train(0, indices), [hook])[hook][:, 1:]
            assert torch.equal(sources[1].read("train", 0, indices), given.cpu())
        for mine, theirs in zip(*(source.train_batches(0) for source in sources), strict=True):
            assert mine.is_cuda and torch.equal(mine.cpu(), theirs)


def test_a_state_is_the_one_of_its_step(tmp_path: Path) -> None:
    """The GPU copies it before it does what it is given afterwards."""
    x = torch.zeros(2**26, device=GPU)
    states = SavedStates(tmp_path / "resume", {})
    writer = StateWriter(states, GPU)
    for step in range(4):
        writer.begin(TrainingState({"x": x}, {"step": step}))
        x += 1
    writer.wait()
    stored = states.newest()
    assert stored is not None and stored.values == {"step": 3}
    assert (stored.tensors["x"] == 3).all()


def test_a_harvest_needs_the_memory_that_the_planner_says(
    tiny_model: Path, texts: list[str], tmp_path: Path
) -> None:
    """With a random model of the form of Qwen3-0.6B."""
    shape = Tables.load(ROOT / "config/planning.yaml").shapes["Qwen/Qwen3-0.6B"]
    words = AutoTokenizer.from_pretrained(tiny_model)
    make_random_model(tmp_path / "model", shape, words, device="cuda")
    layer = (shape.n_layers - 1) // 2
    gc.collect()  # the model is on the GPU until then
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    given = ModelConfig(model_name=str(tmp_path / "model"), model_dtype="bfloat16")
    loaded = LanguageModel.load(given, GPU, n_blocks=layer + 1)
    data = DataConfig(max_text_length=512, val_fraction=0.1)
    windows = read_windows(loaded.tokenizer, texts * 40, data)
    hook = Hook(layer, "hook_resid_post")
    harvest(loaded, windows, [hook], tmp_path / "shard", batch_size="auto")
    held = (torch.cuda.max_memory_allocated() - before) / 1e9
    planned = next(fitting.memory(Tables.load(ROOT / "config/planning.yaml"), "Qwen/Qwen3-0.6B", 4))
    assert 0.6 * planned < held < 1.1 * planned
