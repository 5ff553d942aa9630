"""Several SAEs from one stream are those that each would be alone, and the model runs once."""

import itertools
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import several_saes
from preloaded import OF_OPTIMIZERS, run_preloaded
from running import ROOT
from several_saes import (
    EPOCHS,
    STEPS,
    THREE,
    TOKENS_PER_STEP,
    Hit,
    Wanted,
    train_alone,
    train_several,
    wanted,
)
from torch import Tensor

from sae_core.formats.checkpoint import load_sae
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.sae_train import SAETrainer
from sae_core.train_config import EndToEndConfig, RunsConfig, TrainingConfig
from sae_core.trainer.resume import SavedStates
from sae_core.trainer.training_state import TrainingState
from sae_core.utils import cli
from sae_core.utils.errors import SAEError

SCRIPT = ROOT / "tests/tools/several_saes.py"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    several_saes.small_chunks(monkeypatch.setattr)


def files(folder: Path) -> dict[str, bytes]:
    """Every file that the trainings leave, by its path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_same(mine: Path, theirs: dict[str, bytes]) -> None:
    found = files(mine)
    assert sorted(found) == sorted(theirs)
    assert [name for name in theirs if found[name] != theirs[name]] == []


def alone(folder: Path, saes: tuple[Wanted, ...]) -> dict[str, bytes]:
    for sae in saes:
        train_alone(folder, sae)
    made = files(folder)
    n_begun = sum(sae.sae.init_from is not None for sae in saes)
    n_saes = sum(name.endswith("weights.pt") for name in made)
    assert n_saes == 2 * len(saes) + n_begun  # the best one too, and the first
    return made


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """`THREE`, each from a stream of its own."""
    with pytest.MonkeyPatch.context() as patch:
        several_saes.small_chunks(patch.setattr)
        return alone(tmp_path_factory.mktemp("alone"), THREE)


class Passes(list[int]):
    """The deepest layer of each forward pass."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        run = LanguageModel.activations

        def counted(model: LanguageModel, tokens: Tensor, hooks: list[Hook]) -> Any:
            self.append(max(hook.layer for hook in hooks))
            return run(model, tokens, hooks)

        patch.setattr(LanguageModel, "activations", counted)


def test_each_is_the_one_that_it_is_alone(three: dict[str, bytes], tmp_path: Path) -> None:
    train_several(tmp_path, THREE)
    assert_same(tmp_path, three)


def test_transcoders_and_the_end_to_end_phase(tmp_path: Path) -> None:
    end = EndToEndConfig(end_to_end_fraction=0.3, use_block_mse=True)
    some = replace(end, end_to_end_stride=2)
    others = {"hook_name": "mlp.hook_in", "target": "hook_mlp_out"}
    saes = (
        wanted(1, end_to_end=end),
        wanted(2, "jumprelu", end_to_end=some),
        wanted(1, **others, end_to_end=some),
    )
    train_several(tmp_path / "together", saes)
    assert_same(tmp_path / "together", alone(tmp_path / "alone", saes))


def test_some_that_begin_with_an_sae(tmp_path: Path) -> None:
    """These validate once more than the others: their origin, which is what one of them ends as."""
    first = wanted(1, "batch_topk")
    train_alone(tmp_path / "first", first)
    origin = str(tmp_path / "first" / first.name)

    def begun(k: int, lr: float, **others: Any) -> Wanted:
        sae = wanted(1, "batch_topk", k, **others)
        return replace(
            sae, sae=replace(sae.sae, init_from=origin), training=replace(sae.training, lr=lr)
        )

    end = EndToEndConfig(end_to_end_fraction=0.3)
    saes = (wanted(2), begun(4, 0.5), begun(2, 1e-4, end_to_end=end))
    train_several(tmp_path / "together", saes)
    assert_same(tmp_path / "together", alone(tmp_path / "alone", saes))
    tokens = [load_sae(tmp_path / "alone" / sae.name).spec.metadata["tokens"] for sae in saes]
    assert tokens[1] == 0 < tokens[2]


def test_the_model_runs_as_often_as_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Passes(monkeypatch)
    train_alone(tmp_path, THREE[1])  # the one that is calibrated
    n_for_one = len(passes)
    passes.clear()
    train_several(tmp_path, THREE)
    assert len(passes) == n_for_one > EPOCHS


def test_the_phase_shares_the_pass_without_a_splice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for its first step, in which the SAEs of each layer find out what the others read."""
    count, hidden = 0, LanguageModel.hidden

    def counted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return hidden(*arguments)

    monkeypatch.setattr(LanguageModel, "hidden", counted)
    end = EndToEndConfig(end_to_end_fraction=0.3)
    saes = tuple(wanted(layer, k=k, end_to_end=end) for layer in (1, 2) for k in (2, 4))
    train_alone(tmp_path, saes[0])
    n_for_one, count = count, 0
    train_several(tmp_path, saes)
    assert n_for_one < count <= n_for_one + 2


def test_one_that_stops_early_leaves_the_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the model then runs only up to the hooks of the others."""
    sizes = {"tokens_per_step": TOKENS_PER_STEP, "num_epochs": 4}
    patient = TrainingConfig(**sizes, early_stopping_patience=0)
    impatient = TrainingConfig(**sizes, early_stopping_patience=1, early_stopping_min_delta=100.0)
    end = EndToEndConfig(end_to_end_fraction=0.1)
    saes = (
        wanted(3, training=impatient),
        wanted(2, training=impatient, end_to_end=end),  # goes on with the phase
        wanted(1, training=patient, end_to_end=end),
    )
    expected = alone(tmp_path / "alone", saes)
    passes = Passes(monkeypatch)
    train_several(tmp_path / "together", saes)
    assert_same(tmp_path / "together", expected)
    assert passes[0] == 3 and passes[-1] == 1
    assert passes == sorted(passes, reverse=True)


def test_one_that_fails_does_not_stop_the_others(
    three: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = wanted(3, "topk", k=2)
    restore = SAETrainer.restore

    def broken(trainer: SAETrainer) -> None:
        restore(trainer)
        if trainer.sae.spec.hook_layer == failing.layer:
            trainer.sae.W_dec.data[:] = float("nan")
            trainer.loop.max_skipped = 3

    monkeypatch.setattr(SAETrainer, "restore", broken)
    with pytest.raises(SAEError, match=f"1 of 4 SAEs failed: {failing.name}: .*loss not finite"):
        train_several(tmp_path, (failing, *THREE))
    assert {name: three[name] for name in three if "points" not in name} == {
        name: content for name, content in files(tmp_path).items() if "points" not in name
    }


# Interrupted


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    qwen3 = "transformers.models.qwen3.modeling_qwen3"
    imports = ("sae_core.lockstep", "synthetic", "hashed_code", qwen3, OF_OPTIMIZERS)
    return run_preloaded(imports, SCRIPT, folder, *options, cwd=ROOT, env={**os.environ})


@pytest.mark.parametrize(
    ("what", "at"),
    [
        ("step", STEPS + 4),  # the others have taken it, too
        ("rename", 14),  # of a state: those of some SAEs are newer
    ],
)
def test_killed_trainings_end_as_undisturbed_ones(
    what: str, at: int, three: dict[str, bytes], tmp_path: Path
) -> None:
    killed = run(tmp_path, "--hit", what, "--at", str(at))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path, three)


def test_a_signal_stores_all_at_one_step(three: dict[str, bytes], tmp_path: Path) -> None:
    rarely = ("--resume-minutes", "60")
    stopped = run(tmp_path, *rarely, "--hit", "step", "--at", "11", "--by", "TERM")
    assert stopped.returncode == os.EX_TEMPFAIL
    assert f"after 11 of {EPOCHS * STEPS} steps; run it again to continue" in stopped.stderr
    for sae in THREE:
        state = SavedStates(tmp_path / "points" / sae.name / "resume", {})
        [newest] = state.folder.iterdir()
        assert '"n_done": 11,' in (newest / "state.json").read_text()
    left = run(tmp_path, *rarely, "--hit", "step", "--at", str(EPOCHS * STEPS - 11 + 1))
    assert left.returncode == 0, left.stderr  # it took no step twice
    assert_same(tmp_path, three)


def test_a_signal_stores_the_others_where_one_cannot_be_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = SavedStates.save

    def broken(states: SavedStates, state: TrainingState) -> None:
        if states.folder.parent.name == THREE[0].name and state.tensors:
            raise SAEError("no room")
        save(states, state)

    monkeypatch.setattr(SavedStates, "save", broken)
    steps = itertools.count(1)
    at_its_fifth = Hit(lambda: next(steps) == 5 and os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SAEError, match="no room"):
        train_several(tmp_path, THREE, at_its_fifth)
    for sae in THREE[1:]:
        state = SavedStates(tmp_path / "points" / sae.name / "resume", {})
        [newest] = state.folder.iterdir()
        assert '"n_done": 5,' in (newest / "state.json").read_text()


# The options


def runs(*options: str) -> list[str]:
    made = cli.parse(RunsConfig, "", ["--model-name", "m", *" ".join(options).split()]).runs()
    return [f"{run.hook.hook_layer} {run.sae.tag}" for run in made]


def test_all_combinations_of_the_options() -> None:
    assert runs("") == ["None btop128sae"]
    assert runs("--hook-layer 3 --topks 16") == ["3 btop16sae"]
    assert runs("--hook-layers 5 9 --topks 16 32") == [
        "5 btop16sae", "5 btop32sae", "9 btop16sae", "9 btop32sae",
    ]  # fmt: skip
    assert runs("--sae-types topk standard --topks 16 32 --topk 4") == [
        "None top16sae", "None top32sae", "None sae",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--hook-layer 3 --hook-layers 5 9", "either --hook-layer or --hook-layers"),
        ("--topks 16 32 --run-name mine", "2 SAEs cannot have one name"),
        ("--topks 16 32 --gpus 2", "on 1 GPU"),
        ("--topks 16 0", "--topks"),
    ],
)
def test_options_that_do_not_fit_together(options: str, message: str) -> None:
    with pytest.raises(SAEError, match=message):
        runs(options)
