"""An SAE is measured on texts that it has not seen and on its own model, or not at all."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from by_definition import split_texts, stream
from safetensors.torch import load_file, save_file
from synthetic import random_sae
from tiny_model import WIDTH, make_tiny_model
from torch import Tensor

from sae_core.evaluation import metrics
from sae_core.evaluation.unseen import ModelIdentity, check_model
from sae_core.formats.checkpoint import save_sae
from sae_core.model_training.eval_sae_minibatch import Minibatch, measure
from sae_core.models.model_sources import model_sha256
from sae_core.sae.config import SAESpec
from sae_core.settings.texts import TextsConfig
from sae_core.train_config import LoadConfig
from sae_core.utils.errors import SAEError
from sae_core.utils.files import file_sha256

FIGURES: dict[str, Any] = {"n_windows": 1}


def store(folder: Path, data: Path, model: Path, **changes: Any) -> Path:
    """An SAE directory that says it was trained on these texts and this model."""
    metadata = {
        "model_name": str(model),
        "model_sha256": model_sha256(model),
        "data_file": data.name,
        "data_sha256": file_sha256(data),
        "max_text_length": 24,
        "val_fraction": 0.25,
        "seed": 5,
    }
    known = {key: value for key, value in (metadata | changes).items() if value is not None}
    where = {"hook_layer": 1, "hook_name": "hook_resid_post", "hook_spec": "blocks.1.hook_resid_post"}  # fmt: skip  # noqa: E501
    sae = random_sae("topk", torch.float32, d_in=WIDTH, d_sae=2 * WIDTH, metadata=known, **where)
    save_sae(folder, sae, {"epoch": [1], "loss": [1.0]})
    return folder


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The windows of each SAE that is measured."""
    windows: list[Tensor] = []

    def evaluate(model: Any, sae: Any, of_sae: Tensor, batch_size: int) -> dict[str, Any]:
        windows.append(of_sae)
        return FIGURES

    monkeypatch.setattr(metrics, "evaluate", evaluate)
    return windows


def evaluated(*folders: Path, data: Path, **options: Any) -> list[dict[str, Any]]:
    load = LoadConfig(model_dtype="float32")
    texts = TextsConfig(data_path=data)
    return measure(Minibatch(folders, texts=texts, device="cpu", load=load, **options))


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 6},
        {"val_fraction": 0.5},
        {"max_text_length": 16},
        {"excluded_tokens": ["<|endoftext|>"]},
        {"seed": 5},
    ],
)
def test_each_sae_is_measured_on_its_own_held_out_windows(
    change: dict[str, Any],
    tmp_path: Path,
    data_path: Path,
    tiny_model: Path,
    language_model: Any,
    measured: list[Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = [{"max_text_length": 24, "val_fraction": 0.25, "seed": 5}]
    settings.append(settings[0] | change)
    folders = [
        store(tmp_path / f"sae{n}", data_path, tiny_model, **data)
        for n, data in enumerate(settings)
    ]
    evaluated(*folders, data=data_path, model_name=str(tiny_model))
    texts = json.loads(data_path.read_text())
    for windows, data in zip(measured, settings, strict=True):
        _, held_out = split_texts(texts, data["val_fraction"], data["seed"])
        tokens = stream(language_model.tokenizer, held_out).tolist()
        length = data["max_text_length"]
        cut = [tokens[at : at + length] for at in range(length, len(tokens) - length + 1, 2 * length)]  # fmt: skip  # noqa: E501
        assert windows.tolist() == cut[:16]
    said = capsys.readouterr().err
    differs = settings[0] != settings[1]
    assert ("not the same windows" in said) == differs == any(name in said for name in change)


def test_other_texts_are_refused(
    tmp_path: Path, data_path: Path, tiny_model: Path, measured: list[Tensor]
) -> None:
    """Those of case 25: the same file without its first text, whose split is another one."""
    sae = store(tmp_path / "sae", data_path, tiny_model)
    evaluated(sae, data=data_path, model_name=str(tiny_model))
    edited = tmp_path / "edited.json"
    edited.write_text(json.dumps(json.loads(data_path.read_text())[1:]))
    with pytest.raises(SAEError, match=r"--data-path .*edited\.json: .*texts\.json"):
        evaluated(sae, data=edited, model_name=str(tiny_model))
    assert len(measured) == 1


def test_another_model_of_the_same_shape_is_refused(
    tmp_path: Path, data_path: Path, tiny_model: Path, texts: list[str], measured: list[Tensor]
) -> None:
    sae = store(tmp_path / "sae", data_path, tiny_model)
    other, copy = (make_tiny_model(tmp_path / name, " ".join(texts)) for name in ("other", "copy"))
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.3.mlp.down_proj.weight"))
    weights[name] = weights[name] + 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(SAEError, match="--model-name other .*not the language model that"):
        evaluated(sae, data=data_path, model_name=str(other))
    assert not measured
    evaluated(sae, data=data_path, model_name=str(copy))  # the same weights, somewhere else
    with pytest.raises(SAEError, match="b was trained on"):
        evaluated(
            sae, store(tmp_path / "b", data_path, other), data=data_path, model_name=str(copy)
        )


def test_an_sae_of_unknown_origin_is_measured_with_a_warning(
    tmp_path: Path,
    data_path: Path,
    tiny_model: Path,
    measured: list[Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = store(tmp_path / "known", data_path, tiny_model)
    unknown = store(tmp_path / "unknown", data_path, tiny_model, **dict.fromkeys(
        ("data_sha256", "data_file", "seed", "val_fraction", "max_text_length",
         "model_name", "model_sha256")))  # fmt: skip
    evaluated(unknown, known, data=data_path, model_name=str(tiny_model))
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if "unknown:" in line]
    assert len(lines) == 2 and "which texts" in lines[0] and "cannot be known" in lines[1]
    assert not said.out and torch.equal(*measured)


HUB = {"model_name": "org/model", "model_commit": "a" * 40}
LOCAL = {"model_name": "model", "model_sha256": "1" * 64}


@pytest.mark.parametrize(
    "recorded, given, same",
    [
        (HUB, ModelIdentity("Org/Model", "a" * 40, None), True),
        (HUB, ModelIdentity("org/model", "b" * 40, None), False),
        (HUB, ModelIdentity("org/other", "a" * 40, None), False),
        (LOCAL, ModelIdentity("moved", None, "1" * 64), True),
        (LOCAL, ModelIdentity("model", None, "2" * 64), False),
        (HUB, ModelIdentity("model", None, "1" * 64), None),
        (LOCAL, ModelIdentity("org/model", "a" * 40, None), None),
        ({}, ModelIdentity("org/model", "a" * 40, None), None),
    ],
)
def test_models_are_told_apart(
    recorded: dict[str, str],
    given: ModelIdentity,
    same: bool | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sae = random_sae("topk", torch.float32, metadata=recorded)
    spec: SAESpec = sae.spec
    if same is False:
        with pytest.raises(SAEError, match=r"--record .* \(.*not the language model that an SAE"):
            check_model("an SAE", spec, given, "--record")
    else:
        check_model("an SAE", spec, given, "--record")
    assert ("cannot be known" in capsys.readouterr().err) == (same is None)
