"""A training that is interrupted, by whatever and wherever, ends as one that is not."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from preloaded import OF_OPTIMIZERS, run_preloaded
from running import ROOT
from short_training import make_sae
from synthetic import KINDS, SparseDirections, SparseMap
from torch import Tensor

from sae_core.activations.store import ActivationSource
from sae_core.distributed.interrupts import SIGNALS, Interrupts
from sae_core.model_training.one_run import train_one
from sae_core.train_config import RunConfig, TrainingConfig
from sae_core.trainer.events import Observer
from sae_core.trainer.resume import SavedStates, StateWriter, forget_states
from sae_core.trainer.training_state import TrainingState
from sae_core.training import Trainer
from sae_core.utils import cli
from sae_core.utils.errors import Interrupted, SAEError
from sae_core.utils.run_lock import run_lock

STEPS = 8
"""In an epoch of `SparseDirections`."""

EPOCHS = 4
SCRIPT = ROOT / "tests/tools/interrupted_training.py"
IMPORTS = ("sae_core.sae_train", "synthetic", OF_OPTIMIZERS)
TEMPORARY_FAILURE = 75
OFTEN = ("--checkpoint-freq", "1")


class Stop(Exception):
    """Ends a training."""


class StopsAt(Observer):
    def __init__(self, step: int) -> None:
        self.left = step

    def on_step(self, epoch: int, step: int, loss: Tensor, l0: float) -> None:
        self.left -= 1
        if self.left == 0:
            raise Stop


def trainer(
    kind: str = "batch_topk",
    observer: Observer | None = None,
    source: ActivationSource | None = None,
    **config: Any,
) -> Trainer:
    """A new training, as a new process makes it; half of the features fall silent early."""
    sae = make_sae(kind, n_dead=30, aux_penalty=0.5)
    sae.spec.n_batches_to_dead = 3
    settings = TrainingConfig(
        **{"num_epochs": EPOCHS, "early_stopping_patience": 0, "lr": 0.01, **config}
    )
    return Trainer(sae, source or SparseDirections(), settings, observer or Observer())


def run(training: Trainer) -> Trainer:
    for _ in training.train():
        pass
    return training


def through_disk(state: TrainingState, folder: Path) -> TrainingState:
    SavedStates(folder, {}).save(state)
    stored = SavedStates(folder, {}).newest()
    assert stored is not None
    return stored


def assert_same(resumed: Trainer, whole: Trainer) -> None:
    assert resumed.history == whole.history
    assert resumed.progress == whole.progress
    tensors, expected = resumed.state().tensors, whole.state().tensors
    assert set(tensors) == set(expected) and len(expected) > 10
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_goes_on_as_if_nothing_had_been(kind: str, tmp_path: Path) -> None:
    interrupted = trainer(kind, StopsAt(STEPS + 3))
    with pytest.raises(Stop):
        run(interrupted)
    resumed = trainer(kind)
    resumed.restore(through_disk(interrupted.state(), tmp_path))
    assert_same(run(resumed), run(trainer(kind)))


def test_a_transcoder_goes_on_likewise(tmp_path: Path) -> None:
    def fresh(observer: Observer | None = None) -> Trainer:
        made = trainer("topk", observer, source=SparseMap())
        made.sae.spec.target_hook_name = "hook_mlp_out"
        return made

    interrupted = fresh(StopsAt(STEPS + 3))
    with pytest.raises(Stop):
        run(interrupted)
    resumed = fresh()
    resumed.restore(through_disk(interrupted.state(), tmp_path))
    assert resumed.normalise is not None and resumed.normalise.target is not None
    assert_same(run(resumed), run(fresh()))


@pytest.mark.parametrize("n_validation", [0, 8])
@pytest.mark.parametrize("step", [1, STEPS - 1, STEPS, STEPS + 1, EPOCHS * STEPS])
def test_every_step_is_one_to_go_on_from(step: int, n_validation: int, tmp_path: Path) -> None:
    def source() -> SparseDirections:
        return SparseDirections(n_validation=n_validation)

    interrupted = trainer(observer=StopsAt(step), source=source())
    with pytest.raises(Stop):
        run(interrupted)
    resumed = trainer(source=source())
    resumed.restore(through_disk(interrupted.state(), tmp_path))
    assert_same(run(resumed), run(trainer(source=source())))


def test_the_end_of_an_epoch_is_one_to_go_on_from(tmp_path: Path) -> None:
    interrupted = trainer()
    epochs = interrupted.train()
    next(epochs), next(epochs)
    resumed = trainer()
    resumed.restore(through_disk(interrupted.state(), tmp_path))
    assert_same(run(resumed), run(trainer()))


def test_patience_goes_on_being_counted(tmp_path: Path) -> None:
    impatient = {"early_stopping_patience": 2, "early_stopping_min_delta": 100.0}
    interrupted = trainer(observer=StopsAt(2 * STEPS + 1), **impatient)
    with pytest.raises(Stop):
        run(interrupted)
    resumed = trainer(**impatient)
    resumed.restore(through_disk(interrupted.state(), tmp_path))
    assert run(resumed).history["epoch"] == [1, 2, 3]


class FailsIn(SparseDirections):
    """Fails at the `n`th reading of a part."""

    def __init__(self, part: str, n: int) -> None:
        super().__init__()
        self.part, self.left = part, n

    def read(self, part: str, epoch: int, indices: Tensor) -> Tensor:
        self.left -= part == self.part
        if self.left == 0:
            self.left = -1
            raise Stop
        return super().read(part, epoch, indices)


@pytest.mark.parametrize(("part", "n"), [("train", 2), ("validation", 2), ("validation", 5)])
def test_reading_and_validating_leave_no_trace(part: str, n: int, tmp_path: Path) -> None:
    """So a signal is taken there at once."""
    interrupted = trainer(source=FailsIn(part, n))
    with pytest.raises(Stop):
        run(interrupted)
    resumed = trainer()
    resumed.restore(through_disk(interrupted.state(), tmp_path))
    assert_same(run(resumed), run(trainer()))


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_for_the_end_of_what_is_done_as_a_whole(number: int) -> None:
    done: list[str] = []
    with pytest.raises(Interrupted, match=f"by {signal.Signals(number).name}$"), Interrupts() as it:
        with it.deferred():
            done.append("before")
        with it.deferred():
            os.kill(os.getpid(), number)
            done.append("after")
        done.append("never")
    with pytest.raises(Interrupted), Interrupts():
        os.kill(os.getpid(), number)
        done.append("never")
    assert done == ["before", "after"]


def test_a_second_signal_does_not_disturb_what_the_first_began() -> None:
    with Interrupts():
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)


class Counted(SparseDirections):
    """Counts the windows that are read, three steps of them shuffled together."""

    shuffle_windows = 24
    n_read = 0

    def read(self, part: str, epoch: int, indices: Tensor) -> Tensor:
        self.n_read += len(indices)
        return super().read(part, epoch, indices)


@pytest.mark.parametrize("n_steps", [None, 5])
@pytest.mark.parametrize("skip", range(STEPS + 1))
def test_skipped_batches_are_not_read(skip: int, n_steps: int | None) -> None:
    expected = list(Counted().train_batches(1, n_steps))[skip:]
    source = Counted()
    found = list(source.train_batches(1, n_steps, skip))
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    needed = 8 * (n_steps or STEPS) - skip // 3 * 24
    assert source.n_read == (needed if expected else 0)


# A process, killed


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
    assert "the state of an interrupted training lacks its best_model.pt" in done.stdout
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
    assert "resume: the state of an interrupted training cannot be read" in out
    assert out.count("\n") == 1 and (tmp_path / "resume.stale/1").is_dir()
    assert states.newest() is None


def code_and_data(**changes: Any) -> dict[str, Any]:
    return {"code": "a", "sae": {"d_in": 2, "metadata": {"data_sha256": "b"}}, **changes}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"code": "c"}, "code"),
        ({"sae": {"d_in": 2, "metadata": {"data_sha256": "d"}}}, "sae.metadata.data_sha256"),
        ({"torch": "2"}, "torch"),
    ],
)
def test_a_fingerprint_has_to_be_the_same(
    changes: dict[str, Any], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "resume"
    state = TrainingState({"x": torch.arange(3)}, {"n_done": 1})
    SavedStates(folder, code_and_data()).save(state)
    assert SavedStates(folder, code_and_data(**changes)).newest() is None
    assert f"is of another training: {named} differ" in capsys.readouterr().out
    assert SavedStates(folder, code_and_data()).newest() is None


# A full disk


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.rename", "torch.save"])
def test_a_state_that_cannot_be_written_leaves_the_one_before(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = SavedStates(tmp_path / "resume", {})
    states.save(TrainingState({"x": torch.arange(1000)}, {"n_done": 1}))

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(call, fail)
    with pytest.raises(SAEError, match=r"resume/2: a state of 8,000 bytes cannot be written \(No"):
        states.save(TrainingState({"x": torch.arange(1000)}, {"n_done": 2}))
    monkeypatch.undo()
    found = states.newest()
    assert found is not None and found.values["n_done"] == 1
    assert [path.name for path in states.folder.iterdir()] == ["1"]


# Two at once


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


# A whole run


def test_a_run_that_is_done_is_not_trained_again(
    tiny_model: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by the batch pipeline, which begins again with its first model when the last failed."""
    (tmp_path / "texts.json").write_text(json.dumps(texts[:40]))
    options = (
        f"--model-name {tiny_model} --data-path {tmp_path}/texts.json --model-dtype float32 "
        "--device cpu --num-epochs 2 --max-text-length 32 --tokens-per-step 256 --sae-expansion 2 "
        f"--topk 4 --no-use-end-to-end --output-root {tmp_path}/saes "
        f"--checkpoint-root {tmp_path}/points"
    )
    config = cli.parse(RunConfig, "", options.split())
    first = train_one(config)
    weights = (first.folder / "weights.pt").read_bytes()
    shutil.rmtree(first.folder)
    monkeypatch.delattr(Trainer, "step")
    assert train_one(config) == first
    assert (first.folder / "weights.pt").read_bytes() == weights
    forget_states(first.checkpoints)
    with pytest.raises(AttributeError):  # it does train
        train_one(config)


class Slow(SavedStates):
    """Writes when it may."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, {})
        self.may_write = threading.Event()

    def save(self, state: TrainingState) -> None:
        assert self.may_write.wait(30)
        super().save(state)


def test_a_state_is_written_while_the_training_goes_on(tmp_path: Path) -> None:
    """It is the state as it was given, though all of it changes before it is written."""
    states = Slow(tmp_path / "resume")
    writer = StateWriter(states, torch.device("cpu"))
    x, values = torch.arange(6.0).view(2, 3).T, {"weights": {"kl": 1.0}}
    writer.begin(TrainingState({"x": x}, values))
    x.zero_()
    values["weights"]["kl"] = 2.0
    states.may_write.set()
    writer.wait()
    stored = states.newest()
    assert stored is not None and stored.values == {"weights": {"kl": 1.0}}
    assert torch.equal(stored.tensors["x"], torch.arange(6.0).view(2, 3).T)
    writer.begin(TrainingState({"x": x}, values))
    writer.begin(TrainingState({"x": x + 1, "y": x}, values))  # after the one before
    writer.wait()
    stored = states.newest()
    assert stored is not None and (stored.tensors["x"] == 1).all() and "y" in stored.tensors


def test_a_state_that_cannot_be_written_stops_the_training(tmp_path: Path) -> None:
    (tmp_path / "resume").write_text("a file in its place")
    writer = StateWriter(SavedStates(tmp_path / "resume", {}), torch.device("cpu"))
    writer.begin(TrainingState({"x": torch.zeros(3)}, {}))
    with pytest.raises(SAEError, match="a state of 12 bytes cannot be written"):
        writer.begin(TrainingState({"x": torch.zeros(3)}, {}))
