"""The same seed gives the same bytes, whatever the machine does at once, shows or logs."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from tiny_model import SHAPE
from transformers import AutoModelForCausalLM, Qwen3Config

from sae_core.activations.shards import harvest
from sae_core.activations.store import CachedSource
from sae_core.activations.token_windows import read_windows
from sae_core.model_training.one_run import train_one
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.sae_train import train_from_model, train_sae
from sae_core.train_config import RunConfig
from sae_core.trainer.console import Console
from sae_core.trainer.training_inputs import Activations, Provenance, Settings
from sae_core.training import Observer
from sae_core.utils import cli

EPOCHS = 2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, texts: list[str]) -> list[str]:
    """The options of a short run in bfloat16, whose second half has end-to-end losses."""
    data = tmp_path_factory.mktemp("data") / "texts.json"
    data.write_text(json.dumps(texts[:12]))
    return (
        f"--model-name {tiny_model} --data-path {data} --model-dtype bfloat16 --device cpu "
        f"--num-epochs {EPOCHS} --max-text-length 32 --tokens-per-step 700 --sae-expansion 2 "
        "--topk 4 --compute-dtype bfloat16 --end-to-end-fraction 0.5 --run-name run"
    ).split()


def configured(base: list[str], folder: Path, *options: str) -> RunConfig:
    roots = ["--output-root", str(folder / "saes"), "--checkpoint-root", str(folder / "points")]
    return cli.parse(RunConfig, "", [*base, *roots, *options])


def hashes(folder: Path) -> dict[str, str]:
    paths = sorted(folder.iterdir())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def train(base: list[str], folder: Path, *options: str, observer: Observer | None = None) -> Any:
    return hashes(train_from_model(configured(base, folder, *options), observer or Observer()))


@pytest.fixture(scope="module")
def plain(base: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return train(base, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--batch-size 1",
        "--batch-size 5 --activation-batch-size 64 --log-freq 1 --checkpoint-freq 1",
    ],
)
def test_settings_of_the_machine_change_no_byte(
    options: str, base: list[str], plain: dict[str, str], tmp_path: Path
) -> None:
    assert len(plain) == 5
    assert train(base, tmp_path, *options.split()) == plain


def test_the_progress_bar_changes_no_byte(
    base: list[str], plain: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(base, tmp_path, observer=Console(1)) == plain
    assert "epoch 2/2" in capsys.readouterr().out


def test_tracking_changes_no_byte(
    base: list[str], plain: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tracked run is evaluated, too, with the model that it was trained with."""
    loaded, load = [], LanguageModel.load

    def counted(*args: Any) -> LanguageModel:
        loaded.append(load(*args))
        return loaded[-1]

    monkeypatch.setattr(LanguageModel, "load", counted)
    wandb.teardown()  # its first use in a process reads the environment
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    options = ("--wandb", "--wandb-mode", "offline")
    assert hashes(train_one(configured(base, tmp_path, *options)).folder) == plain
    wandb.teardown()
    assert list(tmp_path.glob("wandb/offline-run-*"))
    assert list(tmp_path.glob("points/*/evaluation.json")) and len(loaded) == 1


def test_another_seed_changes_it(base: list[str], plain: dict[str, str], tmp_path: Path) -> None:
    other = train(base, tmp_path, "--seed", "1")
    assert all(other[name] != plain[name] for name in ("weights.pt", "history.json"))


@pytest.mark.parametrize(("n_shards", "batch_size"), [(1, 8), (8, 3)])
def test_stored_activations_give_what_streamed_ones_do(
    n_shards: int, batch_size: int, base: list[str], plain: dict[str, str], tmp_path: Path
) -> None:
    """With as many passes as epochs."""
    config = configured(base, tmp_path)
    model = LanguageModel.load(config.model, torch.device("cpu"))
    windows = read_windows(
        model.tokenizer, json.loads(config.output.data_path.read_text()), config.data
    )
    hook, folders = Hook(1, "hook_resid_post"), [tmp_path / str(n) for n in range(n_shards)]
    for shard, folder in enumerate(folders):
        share = {"passes": EPOCHS, "shard": shard, "n_shards": n_shards}
        harvest(model, windows, [hook], folder, batch_size=batch_size, **share)
    seed = config.data.seed
    activations = Activations(
        CachedSource(folders, hook, tokens_per_step=config.training.tokens_per_step, seed=seed),
        hook,
        model.d_model,
        Provenance("tiny", None, "bfloat16", "texts.json", "", False),
        model=model,
        windows=windows,
    )
    settings = Settings.of(config)
    settings = replace(settings, runtime=replace(settings.runtime, batch_size=batch_size))
    output, points = tmp_path / "sae", tmp_path / "points"
    found = hashes(train_sae(activations, settings, output, points, Observer()))
    assert all(found[name] == plain[name] for name in ("weights.pt", "history.json"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_windows_activations_do_not_depend_on_the_others(dtype: torch.dtype) -> None:
    """Wide enough for products that round in another order with another number of rows."""
    torch.manual_seed(0)
    shape = SHAPE | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2}
    model = LanguageModel(AutoModelForCausalLM.from_config(Qwen3Config(**shape)).to(dtype), None)
    hook, tokens = Hook(1, "hook_resid_post"), torch.randint(0, SHAPE["vocab_size"], (7, 24))

    def read(chosen: torch.Tensor, batch_size: int) -> torch.Tensor:
        parts = chosen.split(batch_size)
        return torch.cat([model.activations(tokens[part], [hook])[hook] for part in parts])

    whole = read(torch.arange(7), 4)  # windows of 24 tokens make up a pass
    for chosen in ([0], [6], [3, 1], [6, 5, 4, 3, 2, 1, 0], [2, 2, 5, 0, 1]):
        for batch_size in (1, 3):
            assert torch.equal(read(torch.tensor(chosen), batch_size), whole[chosen])
