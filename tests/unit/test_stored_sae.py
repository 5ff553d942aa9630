"""What a training stores: an SAE in a number format that holds it, and a best checkpoint that is
made again when it is damaged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import SparseDirections, made_up

from sae_core.formats.checkpoint import load_sae
from sae_core.sae.config import SAEConfig
from sae_core.sae_train import SAETrainer
from sae_core.train_config import HookConfig, RuntimeConfig, TrainingConfig
from sae_core.trainer.events import Observer
from sae_core.trainer.training_inputs import Settings, warn_of_density
from sae_core.utils.errors import SAEError

BEST = "best_model.pt"


def trainer(folder: Path, offset: float = 0.0, **sae: Any) -> SAETrainer:
    """A short training, as a new process makes it; its best epoch is the last one."""
    source = SparseDirections()
    source.activations += offset
    settings = Settings(
        sae=SAEConfig(**{"topk": 2, **sae}),
        training=TrainingConfig(num_epochs=2, early_stopping_patience=0, lr=0.01),
        runtime=RuntimeConfig(device="cpu", resume_minutes=1000, checkpoint_freq=1),
    )
    return SAETrainer(made_up(source), settings, folder, Observer())


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("offset", "dtype"), [(1e5, "float32"), (0.0, "float16")])
def test_float16_that_cannot_hold_the_sae(
    offset: float, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said at the first checkpoint, once; all that is stored is in float32, and whole."""
    training = trainer(tmp_path / "points", offset, sae_dtype="float16")
    records = training.loop.train()
    training._write_checkpoints(next(records))
    said = "--sae-dtype float16: b_dec reaches 100,0"
    assert (said in capsys.readouterr().out) == (dtype == "float32")
    for record in records:
        training._write_checkpoints(record)
    folder = training.export(tmp_path / "sae")
    assert "--sae-dtype" not in capsys.readouterr().out
    for stored in (folder, *(tmp_path / "points").glob("*.pt")):
        sae = load_sae(stored)
        assert sae.spec.dtype == dtype and sae.W_dec.dtype == getattr(torch, dtype)
    x = training.loop.source.read("validation", 0, torch.arange(8)).flatten(0, 1)
    error = (load_sae(folder)(x).float() - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    assert error < 0.5


def test_bfloat16_holds_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = trainer(tmp_path / "points", 1e5, sae_dtype="bfloat16")
    training.train()
    assert load_sae(training.export(tmp_path / "sae")).W_dec.dtype == torch.bfloat16
    assert "--sae-dtype" not in capsys.readouterr().out


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("name", ["weights.pt", "config.json", "history.json"])
@pytest.mark.parametrize("damage", [empty, Path.unlink])
def test_damaged_best_checkpoint_is_made_again(name: str, damage: Any, tmp_path: Path) -> None:
    """From the state of the best epoch's end: without a step of training, and byte for byte."""
    training = trainer(tmp_path)
    training.train()
    assert training.loop.progress.stopping.best_epoch == 2
    expected = bytes_of(tmp_path / BEST)
    damage(tmp_path / BEST / name)
    again = trainer(tmp_path)
    again.loop.step = None  # type: ignore[method-assign]
    again.train()
    assert bytes_of(tmp_path / BEST) == expected
    assert bytes_of(again.export(tmp_path / "sae")).items() >= expected.items()


def test_training_begins_anew_when_the_best_checkpoint_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The state is of a later step than the best epoch's end."""
    training = trainer(tmp_path)
    records = training.loop.train()
    training._write_checkpoints(next(records))
    training._save_state()
    state = training.states.newest()
    assert state is not None
    state.values["progress"]["means"] = {"tokens": {}, "sums": {}}  # in the second epoch
    training.states.save(state)
    empty(tmp_path / BEST / "weights.pt")
    again = trainer(tmp_path)
    again.train()
    assert "lacks its best_model.pt, or it is damaged" in capsys.readouterr().out
    assert load_sae(tmp_path / BEST).spec.metadata["epochs"] == 2


# What the settings say beforehand


@pytest.mark.parametrize("kind", ["standard", "gated"])
def test_dense_sae_is_spoken_of(kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_density(SAEConfig(sae_type=kind, sparsity_penalty=0.01))
    warn_of_density(SAEConfig())
    assert capsys.readouterr().out == ""
    warn_of_density(SAEConfig(sae_type=kind))
    assert f"--sparsity-penalty 0: nothing makes a {kind} SAE sparse" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["hook_name", "target_hook_name"])
def test_full_name_of_a_hook(option: str) -> None:
    expected = f"--{option.replace('_', '-')} blocks.2.hook_mlp_out: .* as --hook-layer 2"
    with pytest.raises(SAEError, match=expected):
        HookConfig(**{option: "blocks.2.hook_mlp_out"})
