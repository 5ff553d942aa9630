"""Several trainings in lockstep, so that one pass of the model serves them all.

Each is a training like any other, with its own loop, states and checkpoints. They take their steps
in rounds: the trainings that are least far read the same activations, which the stream then reads
once, and each takes its step. One that stops early, or fails, is left out of later rounds, and its
hook of later passes. States are stored at the end of a step that all have taken. A process that is
killed while they are stored leaves some of them older: those trainings go first until all are
equally far.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sae_core.activations.shared_stream import SharedSource, SharedStream
from sae_core.distributed.interrupts import Interrupts
from sae_core.sae_train import Piece, SAETrainer
from sae_core.trainer.events import Observer
from sae_core.trainer.resume import Timer
from sae_core.trainer.training_inputs import Activations, Settings
from sae_core.utils.errors import Interrupted, PassingError, SAEError, one_line


class Training(NamedTuple):
    """One of the trainings."""

    name: str
    activations: Activations
    """Its `source` is a `SharedSource`."""
    settings: Settings
    output: Path
    """The SAE directory to write."""
    checkpoints: Path
    observer: Observer


class RoundTimer(Timer):
    """Says in all trainings of a round the same: whether their states are due after it."""

    def __init__(self, minutes: float) -> None:
        super().__init__(minutes)
        self.due = False

    def begin_round(self) -> None:
        """Look at the clock."""
        self.due = super().is_due

    @property
    def is_due(self) -> bool:
        return self.due


class Lockstep:
    """Trainings that take their steps together.

    Args:
        trainings: of SAEs with different names, on sources of one stream.
        stream: that stream.
        progress: called with the steps that all have done, and the steps in all.
    """

    def __init__(
        self,
        trainings: Sequence[Training],
        stream: SharedStream,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.stream, self.progress = stream, progress
        self.interrupts = Interrupts()
        self.timer = RoundTimer(trainings[0].settings.runtime.resume_minutes)
        self.sources: dict[str, SharedSource] = {}
        self.trainers = {
            t.name: SAETrainer(t.activations, t.settings, t.checkpoints, t.observer)
            for t in trainings
        }
        for training in trainings:
            source, trainer = training.activations.source, self.trainers[training.name]
            assert isinstance(source, SharedSource), "they read one stream"
            self.sources[training.name] = source
            trainer.interrupts, trainer.timer = self.interrupts, self.timer
        self.errors: dict[str, SAEError] = {}

    def train(self) -> dict[str, SAEError]:
        """Run all trainings, from where an interrupted process left them.

        Returns:
            Why some failed, by name; the others are done.

        Raises:
            Interrupted: a signal came; all that was done is stored.
        """
        trainers = list(self.trainers.values())
        for trainer in trainers:
            trainer.restore()
        with self.interrupts:
            try:
                self._rounds()
            except Interrupted as interrupted:
                going = [t for name, t in self.trainers.items() if name not in self.errors]
                _do_all(trainer.save_progress for trainer in going)
                least = min(trainers, key=lambda trainer: trainer.loop.place)
                raise Interrupted(least.told(interrupted)) from None
            finally:
                _do_all(trainer.state_writer.wait for trainer in trainers)
        return self.errors

    def _rounds(self) -> None:
        left = {name: trainer.pieces() for name, trainer in self.trainers.items()}
        while left:
            places = {name: self.trainers[name].loop.place for name in left}
            least = min(places.values())
            front = [name for name in left if places[name] == least]
            self.stream.expect(self.sources[name] for name in front)
            self.timer.begin_round()
            # What they read may be broken off, and what they make of it is done by all or by none.
            works = {name: self._next(name, left) for name in front}
            with self.interrupts.deferred():
                for name, work in works.items():
                    self._do(name, work, left)
            self.progress(least[0], self.trainers[front[0]].loop.batches.n_steps)

    def _next(self, name: str, left: dict[str, Iterator[Piece | None]]) -> Piece | None:
        """The next piece of a training, which is taken out of `left` if there is none."""
        try:
            return next(left[name])
        except StopIteration:
            del left[name]
        except SAEError as error:
            self._fail(name, error, left)
        return None

    def _do(self, name: str, work: Piece | None, left: dict[str, Iterator[Piece | None]]) -> None:
        try:
            if work:
                work()
        except SAEError as error:
            self._fail(name, error, left)

    def _fail(self, name: str, error: SAEError, left: dict[str, Iterator[Piece | None]]) -> None:
        """Go on without a training."""
        print(f"{name}: FAILED: {one_line(error)}; the others go on", flush=True)
        self.errors[name] = error
        del left[name]


def _do_all(works: Iterable[Callable[[], None]]) -> None:
    """Do all, also those after one that fails; then raise its error."""
    errors = []
    for work in works:
        try:
            work()
        except SAEError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def train_together(
    trainings: Sequence[Training],
    stream: SharedStream,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Train and export several SAEs. The last states stay, so that the same call goes on from
    there, until `forget_states`.

    Args:
        progress: as of `Lockstep`.

    Raises:
        SAEError: some have failed; the SAEs of the others are there.
    """
    lockstep = Lockstep(trainings, stream, progress)
    errors = lockstep.train()
    for training in trainings:
        if training.name not in errors:
            lockstep.trainers[training.name].export(training.output)
    if errors:
        may_pass = all(isinstance(error, PassingError) for error in errors.values())
        reasons = "; ".join(f"{name}: {one_line(error)}" for name, error in errors.items())
        message = f"{len(errors)} of {len(trainings)} SAEs failed: {reasons}"
        raise PassingError(message) if may_pass else SAEError(message)
