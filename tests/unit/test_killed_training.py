"""A training by a command: killed, interrupted, or given the state of another one."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from preloaded import OF_OPTIMIZERS, run_preloaded
from running import ROOT

from sae_core.trainer.resume import SavedStates
from sae_core.trainer.training_state import TrainingState
from sae_core.utils.errors import SAEError
from sae_core.utils.run_lock import run_lock

STEPS = 8
"""In an epoch of the script's training."""

SCRIPT = ROOT / "tests/tools/interrupted_training.py"
IMPORTS = ("sae_core.sae_train", "sae_core.utils.cli", "synthetic", "hashed_code", OF_OPTIMIZERS)
TEMPORARY_FAILURE = 75
OFTEN = ("--checkpoint-freq", "1")


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, str(SCRIPT), str(folder), *options]


def train(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run_preloaded(IMPORTS, *command(folder, *options)[1:], cwd=ROOT, env={**os.environ})


def made(folder: Path) -> dict[str, bytes]:
    """Every file that a training leaves: the SAE, the checkpoints, the events."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = train(folder, *OFTEN)
    assert done.returncode == 0, done.stderr
    files = made(folder)
    assert {"sae/weights.pt", "sae/history.json", "sae/sae_weights.safetensors"} < set(files)
    assert not any("resume" in name or "lock" in name for name in files)
    return files


def hit(what: str, at: int, by: str = "KILL") -> tuple[str, ...]:
    return (*OFTEN, "--hit", what, "--at", str(at), "--by", by)


@pytest.mark.parametrize(
    ("what", "at"),
    [
        ("step", STEPS + 5),
        ("fsync", 7),  # between the files of a state
        ("rename", 4),  # between writing it and giving it its name
        ("rmtree", 9),  # before the one before it is deleted
        ("rename", 10),  # of a checkpoint
        ("rename", 21),  # between moving the best checkpoint aside and its successor in
    ],
)
def test_a_killed_training_ends_as_an_undisturbed_one(
    what: str, at: int, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    assert train(tmp_path, *hit(what, at)).returncode == -signal.SIGKILL
    done = train(tmp_path, *OFTEN)
    assert done.returncode == 0, done.stderr
    assert made(tmp_path) == undisturbed


def test_a_training_that_is_killed_again_and_again(
    undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    deaths = 0
    while train(tmp_path, *hit("step", 6)).returncode == -signal.SIGKILL:
        deaths += 1
        assert deaths < 10
    assert deaths >= 3
    assert made(tmp_path) == undisturbed


def test_what_is_done_is_not_trained_again(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    """As when an evaluation or upload that follows is killed."""
    assert train(tmp_path, *hit("export", 1)).returncode == -signal.SIGKILL
    done = train(tmp_path, *hit("step", 1))
    assert done.returncode == 0, done.stderr
    assert made(tmp_path) == undisturbed


@pytest.mark.parametrize("by", ["TERM", "USR1"])
def test_a_signal_stores_all_that_was_done(
    by: str, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    rarely = ("--resume-minutes", "60")
    stopped = train(tmp_path, *hit("step", 11, by), *rarely)
    assert stopped.returncode == TEMPORARY_FAILURE
    assert f"interrupted by SIG{by} after 11 of 24 steps; run it again" in stopped.stderr
    assert "Traceback" not in stopped.stderr and len(stopped.stderr.splitlines()) == 1
    done = train(tmp_path, *OFTEN, *rarely, *("--hit", "step", "--at", "14"))
    assert done.returncode == 0, done.stderr  # 13 steps were left
    assert made(tmp_path) == undisturbed


# What is not to be mixed in


def sae(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in made(folder).items() if name.startswith("sae/")}


def test_the_state_of_another_training_is_set_aside(
    undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    other = (*hit("step", 11), "--topk", "3")
    assert train(tmp_path, *other).returncode == -signal.SIGKILL
    done = train(tmp_path, *OFTEN)
    assert done.returncode == 0, done.stderr
    stale = tmp_path / "points/resume.stale"
    assert f"is of another training: sae.top_k, sae.top_k_aux differ; it is now in {stale}" in (
        done.stdout
    )
    assert list(stale.glob("1[01]/tensors.pt")), "that of step 11 was being written"
    assert sae(tmp_path) == {k: v for k, v in undisturbed.items() if k.startswith("sae/")}


def test_a_state_without_its_best_checkpoint_is_set_aside(
    undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    assert train(tmp_path, *hit("step", 11)).returncode == -signal.SIGKILL
    (tmp_path / "points/best_model.pt").rename(tmp_path / "elsewhere")
    done = train(tmp_path, *OFTEN)
    assert done.returncode == 0, done.stderr
    assert "the saved state lacks its best_model.pt" in done.stdout
    assert sae(tmp_path) == {k: v for k, v in undisturbed.items() if k.startswith("sae/")}


def truncate_tensors(folder: Path) -> None:
    os.truncate(folder / "tensors.pt", 200)


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "tensors.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "tensors.pt").write_bytes(content)


def replace_tensors(folder: Path) -> None:
    torch.save(["not tensors"], folder / "tensors.pt")


def delete_tensors(folder: Path) -> None:
    (folder / "tensors.pt").unlink()


def mangle_values(folder: Path) -> None:
    (folder / "state.json").write_text("[]")


def truncate_values(folder: Path) -> None:
    (folder / "state.json").write_text('{"values": ')


@pytest.mark.parametrize(
    "damage",
    [
        truncate_tensors,
        flip_a_bit,
        replace_tensors,
        delete_tensors,
        mangle_values,
        truncate_values,
    ],
)
def test_a_damaged_state_is_set_aside(
    damage: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    states = SavedStates(tmp_path / "resume", {})
    states.save(TrainingState({"x": torch.arange(3)}, {"n_done": 1}))
    damage(states.folder / "1")
    assert states.newest() is None
    out = capsys.readouterr().out
    assert "resume: the saved state cannot be read" in out
    assert out.count("\n") == 1 and (tmp_path / "resume.stale/1").is_dir()
    assert states.newest() is None


def test_a_second_process_is_refused_until_the_first_is_dead(
    undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    waiting = command(tmp_path, *hit("step", 5, "wait"))
    first = subprocess.Popen(waiting, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        assert any("waiting" in line for line in first.stdout)
        second = train(tmp_path)
        assert second.returncode == 1
        assert f"process {first.pid} on {socket.gethostname()} is training this SAE" in (
            second.stderr
        )
    finally:
        first.kill()
        first.communicate(timeout=60)
    done = train(tmp_path, *OFTEN)
    assert done.returncode == 0, done.stderr
    assert made(tmp_path) == undisturbed


def test_a_lock_file_that_nobody_holds_locks_nobody_out(tmp_path: Path) -> None:
    (tmp_path / "training.lock").write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    with run_lock(tmp_path):
        with pytest.raises(SAEError, match=f"process {os.getpid()} on .* is training this SAE"):
            with run_lock(tmp_path):
                pass
    with run_lock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
