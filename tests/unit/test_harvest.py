"""The harvest: blocks that are not needed, passes that fill a GPU, writing beside the model."""

import os
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file
from tiny_model import N_LAYERS, configuration
from torch import Tensor
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from sae_core.activations import window_writer
from sae_core.activations.shards import harvest
from sae_core.activations.token_windows import TokenWindows
from sae_core.activations.window_writer import DIGEST_BYTES, WindowWriter, window_files
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.train_config import ModelConfig, windows_per_pass
from sae_core.utils.errors import SAEError

CPU = torch.device("cpu")
HOOKS = [Hook(0, "hook_mlp_out"), Hook(1, "hook_resid_post")]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Blocks after the last hook


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_blocks_of_a_model_give_what_they_do_in_the_whole(
    family: str, tmp_path: Path, tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    config = configuration(family)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for path in tiny_model.glob("*token*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    given = ModelConfig(model_name=str(tmp_path), model_dtype="float32")
    whole, first = (LanguageModel.load(given, CPU, n_blocks=n) for n in (None, 2))
    assert (whole.n_layers, first.n_layers) == (N_LAYERS, 2)
    tokens = torch.arange(24).view(2, 12)
    hooks = [Hook(1, "hook_resid_post"), Hook(0, "hook_resid_pre")]
    expected, found = (model.activations(tokens, hooks) for model in (whole, first))
    assert all(torch.equal(found[hook], expected[hook]) for hook in hooks)
    counts = [sum(p.numel() for p in model.model.parameters()) for model in (first, whole)]
    per_block = sum(p.numel() for p in whole._blocks[2].parameters())
    assert counts[1] - counts[0] == (N_LAYERS - 2) * per_block
    said = "".join(capfd.readouterr())
    assert "UNEXPECTED" not in said and "LOAD REPORT" not in said


def test_the_last_blocks_need_not_be_there(
    tiny_model: Path, tmp_path: Path, windows: TokenWindows, language_model: LanguageModel
) -> None:
    """They are not read: the file lacks them, and holds a part that is damaged."""
    for path in tiny_model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    stored = load_file(tiny_model / "model.safetensors")
    kept = {name: t for name, t in stored.items() if ".layers.3." not in name}
    kept["model.layers.2.mlp.up_proj.weight"] = torch.zeros(7)
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    given = ModelConfig(model_name=str(tmp_path), model_dtype="float32")
    harvest(LanguageModel.load(given, CPU, 24, 2), windows, HOOKS, tmp_path / "a", batch_size=8)
    harvest(language_model, windows, HOOKS, tmp_path / "b", batch_size=8)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    for n_blocks in (3, None):
        with pytest.raises(SAEError, match="cannot be loaded"):
            LanguageModel.load(given, CPU, n_blocks=n_blocks)


# Windows a pass


def test_windows_per_pass() -> None:
    """`auto` has 16,384 tokens, whatever the window's length, and one window if that is longer."""
    assert [windows_per_pass(length, "auto") for length in (128, 384, 512)] == [128, 42, 32]
    assert windows_per_pass(40_000, "auto") == 1 and windows_per_pass(512, 3) == 3


# Writing beside the model


def windows_of(n: int, first: int = 0) -> Tensor:
    return (torch.arange(n * 6, dtype=torch.float32) + 6 * first).view(n, 2, 3)


def test_the_device_goes_on_while_windows_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written until everything that the buffers hold is given."""
    may_write, write_at = threading.Event(), window_writer.write_at

    def slow(*given: object) -> None:
        assert may_write.wait(30)
        write_at(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(window_writer, "write_at", slow)
    data, digests = tmp_path / "data", tmp_path / "digests"
    with window_files(data, digests) as to, WindowWriter(CPU, 1, 5 * 24) as writer:
        given = windows_of(10)
        for first in (5, 0):  # in any order
            writer.write(to, first, given[first : first + 5])
        given.zero_()
        may_write.set()
        for first in range(10, 60):  # many times the buffers
            writer.write(to, first, windows_of(1, first))
        writer.finish()
    assert data.read_bytes() == windows_of(60).numpy().tobytes()
    assert digests.stat().st_size == 60 * DIGEST_BYTES


def test_what_has_been_copied_is_let_go_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU it takes memory that the next pass needs."""
    may_write, writes = threading.Event(), threading.Event()

    def slow(*_: object) -> None:
        writes.set()
        assert may_write.wait(30)

    monkeypatch.setattr(window_writer, "write_at", slow)
    with window_files(tmp_path / "data", tmp_path / "digests") as to:
        with WindowWriter(CPU, 1, 100) as writer:
            given = windows_of(1)
            held = weakref.ref(given)
            writer.write(to, 0, given)
            del given
            assert writes.wait(30)
            is_held = held() is not None
            may_write.set()
    assert not is_held


def test_what_fails_beside_the_model_ends_the_harvest(
    language_model: LanguageModel,
    windows: TokenWindows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(window_writer, "write_at", full)
    with pytest.raises(SAEError, match="cannot be written .No space left on device"):
        harvest(language_model, windows, HOOKS, tmp_path / "shard", batch_size=8)
    assert list(tmp_path.iterdir()) == []


def test_files_stay_open_until_their_writers_have_ended(
    language_model: LanguageModel,
    windows: TokenWindows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also when the model fails: a descriptor that is closed may soon be of another file."""
    write_at, written = window_writer.write_at, []

    def slow(descriptor: int, content: memoryview, offset: int) -> None:
        time.sleep(0.2)
        os.fstat(descriptor)
        write_at(descriptor, content, offset)
        written.append(offset)

    activations, n_passes = language_model.activations, iter(range(9))

    def failing(*given: Any) -> dict[Hook, Tensor]:
        if next(n_passes) == 1:
            raise RuntimeError("the second pass")
        return activations(*given)

    monkeypatch.setattr(window_writer, "write_at", slow)
    monkeypatch.setattr("sae_core.models.language_model.CPU_TOKENS", 24)
    monkeypatch.setattr(language_model, "activations", failing)
    with pytest.raises(RuntimeError, match="the second pass"):
        harvest(language_model, windows, HOOKS[:1], tmp_path / "shard", batch_size=1)
    assert written == [0, 0], "the first window and its digest"
