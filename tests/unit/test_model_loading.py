"""Loading a language model: what is known before, and what a wrong name or file is answered."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, NAMES
from safetensors.torch import load_file, save_file
from tiny_model import N_LAYERS, WIDTH, configuration
from torch import Tensor
from transformers import T5Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from sae_core.activations.language_model import (
    Hook,
    LanguageModel,
    check_hook,
    model_facts,
    resume_point,
)
from sae_core.devices import device_map, pick_device, pick_dtype, pick_precision
from sae_core.errors import SAEError
from sae_core.train_config import ModelConfig

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_facts_come_without_the_weights(family: str, tmp_path: Path) -> None:
    config = configuration(family)
    config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    config.save_pretrained(tmp_path)
    assert model_facts(ModelConfig(model_name=str(tmp_path))) == (
        N_LAYERS,
        WIDTH,
        None,
        tuple(sorted(NAMES)),
    )


def test_hook_names() -> None:
    hook = Hook.parse("blocks.11.hook_resid_mid")
    assert hook == (11, "hook_resid_mid") and hook.spec == "blocks.11.hook_resid_mid"
    assert resume_point(hook) == Hook(11, "hook_resid_pre")
    assert check_hook(Hook(3, "a"), 4, ["a"]) == (3, "a")


@pytest.mark.parametrize(
    ("hook", "says"),
    [
        (Hook(4, "a"), "--hook-layer 4: the model's layers are 0 to 3"),
        (Hook(-1, "a"), "--hook-layer -1: the model's layers are 0 to 3"),
        (Hook(0, "c"), "--hook-name c: this model has a, b"),
    ],
)
def test_unknown_hook(hook: Hook, says: str) -> None:
    with pytest.raises(SAEError, match=says):
        check_hook(hook, 4, ["a", "b"])


def test_devices_and_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == CPU
    with pytest.raises(SAEError, match="--device cuda: not available here; this machine has cpu"):
        pick_device("cuda")
    assert pick_dtype("float16", CPU) == torch.float16
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda fast=fast: {"amx_bf16": fast})
        assert pick_dtype("auto", CPU) == dtype
        assert pick_precision("auto", CPU) == (dtype, dtype)
        assert pick_precision("float32", CPU) == (dtype, torch.float32)
        assert pick_precision("bfloat16", CPU) == (torch.bfloat16, torch.bfloat16)


def test_a_model_goes_over_several_gpus_where_there_are_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = torch.device("cuda")
    for n_gpus, expected in ((1, gpu), (2, "sequential")):
        monkeypatch.setattr("torch.cuda.device_count", lambda n=n_gpus: n)
        assert device_map(gpu) == expected
        assert device_map(CPU) == CPU


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere"])
def test_missing_directory(name: str) -> None:
    with pytest.raises(SAEError, match=f"--model-name {name}: no such directory"):
        model_facts(ModelConfig(model_name=name))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_incomplete_directory(missing: str, folder: Path) -> None:
    (folder / missing).unlink()
    config = ModelConfig(model_name=str(folder))
    with pytest.raises(SAEError, match=f"--model-name {folder}: cannot be loaded") as error:
        if missing == "config.json":
            model_facts(config)
        LanguageModel.load(config, CPU)
    assert "\n" not in str(error.value)


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def change_weights(folder: Path, norm: Tensor | None) -> None:
    stored = load_file(folder / "model.safetensors")
    del stored["model.norm.weight"]
    if norm is not None:
        stored["model.norm.weight"] = norm
    save_file(stored, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "damage",
    [
        cut_weights,
        lambda folder: change_weights(folder, torch.zeros(5)),
        lambda folder: change_weights(folder, None),
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        lambda folder: (folder / "config.json").write_text("[]"),
    ],
    ids=["cut", "shape", "no tensor", "tokenizer", "config"],
)
def test_damaged_directory(damage: Any, folder: Path) -> None:
    damage(folder)
    with pytest.raises(SAEError, match=f"--model-name {folder}: cannot be loaded"):
        LanguageModel.load(ModelConfig(model_name=str(folder)), CPU)


def test_model_without_a_single_stack_of_blocks(tmp_path: Path) -> None:
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path)
    with pytest.raises(SAEError, match="T5ForConditionalGeneration"):
        model_facts(ModelConfig(model_name=str(tmp_path)))


def test_unknown_architecture(folder: Path) -> None:
    config = configuration("qwen3")
    config.architectures = ["NobodysForCausalLM"]
    config.save_pretrained(folder)
    with pytest.raises(SAEError, match="TransformerLens knows no .* NobodysForCausalLM"):
        model_facts(ModelConfig(model_name=str(folder)))


def test_four_bits_need_a_gpu(folder: Path) -> None:
    with pytest.raises(SAEError, match="--load-in-4bit: needs a CUDA GPU, and the device is cpu"):
        LanguageModel.load(ModelConfig(model_name=str(folder), load_in_4bit=True), CPU)


def test_loaded_model_is_frozen(language_model: LanguageModel, tiny_model: Path) -> None:
    twin = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(language_model.logits(tokens)[0], twin.eval()(tokens).logits)
    assert not any(p.requires_grad for p in language_model.model.parameters())
    assert not language_model.model.training and language_model.dtype == torch.float32
