"""A training that is interrupted, at any step and by any signal, ends as one that is not."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
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

STEPS = 8
"""In an epoch of `SparseDirections`."""

EPOCHS = 4


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
