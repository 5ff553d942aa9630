"""Loading a language model: what is known before, and what a wrong name or file is answered."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, NAMES
from random_model import SCALE, make_random_model
from safetensors.torch import load_file, save_file
from tiny_model import N_LAYERS, WIDTH, configuration
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    OPTConfig,
    PretrainedConfig,
    T5Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from sae_core.models.language_model import Hook, LanguageModel, resume_point
from sae_core.models.model_configuration import check_window, context_length
from sae_core.models.model_facts import check_hook, model_facts
from sae_core.models.model_sources import FetchConfig, SourceConfig, fetch
from sae_core.sae.precision import pick_precision
from sae_core.settings.texts import OutputConfig
from sae_core.train_config import DataConfig, ModelConfig, RunConfig
from sae_core.trainer.checked_run import check_run
from sae_core.utils.devices import device_map, pick_device, pick_dtype
from sae_core.utils.errors import SAEError
from sae_core.workflow.plan_tables import ModelShape

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
        1024,
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


# Context


def written(folder: Path, **settings: Any) -> Path:
    """A model's directory with other settings in its config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
LLAMA3 = LINEAR | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPT2Config(n_positions=64), 64),
        (GPTNeoXConfig(max_position_embeddings=128), 128),
        (OPTConfig(max_position_embeddings=96), 96),
        (LlamaConfig(max_position_embeddings=128, rope_parameters=LINEAR), 512),
        (
            LlamaConfig(
                max_position_embeddings=1024,
                rope_parameters=LLAMA3 | {"original_max_position_embeddings": 128},
            ),
            1024,
        ),
        (
            LlamaConfig(
                max_position_embeddings=160,
                rope_parameters=YARN | {"original_max_position_embeddings": 128},
            ),
            512,
        ),
        (BloomConfig(seq_length=64), None),
        (FalconConfig(alibi=True), None),
        (FalconConfig(max_position_embeddings=77), 77),
        (MptConfig(max_seq_len=64), 64),
        (MambaConfig(), None),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_context_of_a_model(config: PretrainedConfig, expected: int | None) -> None:
    assert context_length(config) == expected


def test_window_beyond_the_context_is_refused_before_loading(folder: Path) -> None:
    """By every way in: the facts and the record, and the loading itself."""
    written(folder, max_position_embeddings=32)
    (folder / "model.safetensors").unlink()  # it is not come to
    config = ModelConfig(model_name=str(folder), model_dtype="float32")
    assert model_facts(config).context_length == 32
    source = SourceConfig(path=folder)
    assert fetch(FetchConfig("m", source=source)).context_length == 32
    check_window(32, 32)
    check_window(10**6, None)
    with pytest.raises(SAEError, match="--max-text-length 33: the model reads at most 32 tokens"):
        LanguageModel.load(config, CPU, 33)


def test_window_beyond_the_context_trains_nothing(folder: Path, data_path: Path) -> None:
    written(folder, max_position_embeddings=32)
    config = RunConfig(
        model=ModelConfig(model_name=str(folder)),
        data=DataConfig(max_text_length=33),
        output=OutputConfig(data_path=data_path, output_root=folder, checkpoint_root=folder),
    )
    with pytest.raises(SAEError, match="--max-text-length 33: the model reads at most 32 tokens"):
        check_run(config)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "of its own"])
def test_a_random_model_is_read_as_one_of_its_shape(
    tied: bool, tiny_model: Path, tmp_path: Path
) -> None:
    """Its unembedding is the embedding if the shape says so, and every weight has been drawn."""
    shape = replace(ModelShape.read(tiny_model), tied=tied)
    words = AutoTokenizer.from_pretrained(tiny_model)
    folder = make_random_model(tmp_path / "model", shape, words)
    assert ModelShape.read(folder) == shape
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) != tied
    loaded = LanguageModel.load(ModelConfig(model_name=str(folder), model_dtype="bfloat16"), CPU)
    embedding, unembedding = (
        module.weight for module in (loaded.model.get_input_embeddings(), loaded.model.lm_head)
    )
    assert torch.equal(embedding, unembedding) == tied
    for name, weight in loaded.model.named_parameters():
        assert weight.float().std() == pytest.approx(0 if "norm" in name else SCALE, rel=0.1), name
