"""What an end-to-end phase costs and brings: by its length, by the share of windows that are
spliced, and by the weight of the KL divergence.

All phases begin in states of one training without a phase. The time of a phase is the processor
time of that training up to there, and its own. Prints a Markdown table: the cross-entropy that the
SAE costs on held-out windows when attention sinks (outliers, and a window's first token) keep their
activation; the FVU of these windows; the time; and the gap and the time as multiples of those
without a phase, with the standard error of the former over the windows. Activations are read from
the model, not from a store. One thread (`OMP_NUM_THREADS=1`) makes the times comparable.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from end_to_end import HeldOut, model_and_windows, training_source
from end_to_end import Options as EndToEndOptions
from machine import describe
from torch import Tensor

from sae_core.activations.store import ActivationSource, CachedSource
from sae_core.activations.token_windows import TokenWindows
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.sae.config import SAEConfig
from sae_core.sae.kinds import build
from sae_core.train_config import DataConfig, EndToEndConfig, OptimizerName, TrainingConfig
from sae_core.trainer.end_to_end import EndToEnd
from sae_core.trainer.events import Observer
from sae_core.trainer.training_inputs import sae_spec
from sae_core.trainer.training_state import TrainingState
from sae_core.training import Trainer
from sae_core.utils import cli
from sae_core.utils.errors import SAEError
from sae_core.utils.seeding import generator


@dataclass(frozen=True)
class Options(EndToEndOptions):
    """What to train on, and which phases."""

    tokens: int = 96_520
    """Training tokens, about; of the sample chapters, four passes over all windows."""

    layer: int = 9
    """0-based layer; the hook is hook_resid_post."""

    tokens_per_step: int = 1024
    """Tokens in an optimizer step."""

    optimizer: OptimizerName = TrainingConfig.optimizer
    """As in a training."""

    lr_decay: float = TrainingConfig.lr_decay
    """Share of the steps, the last ones, over which the learning rate falls to zero."""

    val_fraction: float = 0.15
    """Share of the texts that is held out."""

    max_validation: int = 64
    """Windows that the training validates on after an epoch, at most."""

    fractions: tuple[float, ...] = (0.1, 0.1)
    """Shares of the steps with end-to-end losses, a phase each; below 1."""

    strides: tuple[int, ...] = (1, 4)
    """One window in so many is spliced, of each phase."""

    weights: tuple[float, ...] = (0.01, 0.01)
    """`logit_kl_weight` of each phase."""

    shards: tuple[Path, ...] = ()
    """Of a harvest of these windows (`tests/benchmarks/shards.py`): the activations before a phase
    are taken from there, and the time that the model would take for them is estimated."""

    timed_windows: int = 32
    """Windows that this estimate is made from."""


class Start(NamedTuple):
    """Where phases begin."""

    state: TrainingState
    seconds: float
    """Processor time until there."""

    @classmethod
    def of(cls, trainer: Trainer, seconds: float) -> "Start":
        state = trainer.state()
        tensors = {name: tensor.clone() for name, tensor in state.tensors.items()}
        return cls(TrainingState(tensors, copy.deepcopy(state.values)), seconds)


class Starts(Observer):
    """Keeps the states after some numbers of steps; the time that this takes does not count.

    Args:
        reading: processor time to add for each step.
    """

    def __init__(self, wanted: set[int], reading: float) -> None:
        self.wanted, self.found, self.reading = wanted, dict[int, Start](), reading
        self.trainer: Trainer
        self.n_steps, self.started = 0, time.process_time()

    @property
    def seconds(self) -> float:
        """Processor time so far."""
        return time.process_time() - self.started + self.n_steps * self.reading

    def on_step(self, epoch: int, step: int, loss: Tensor, l0: float) -> None:
        self.n_steps += 1
        if self.n_steps in self.wanted:
            before = time.process_time()
            self.found[self.n_steps] = Start.of(self.trainer, self.seconds)
            self.started += time.process_time() - before


class Row(NamedTuple):
    """Of a training."""

    name: str
    gaps: Tensor
    """(W,) of the held-out windows."""
    fvu: float
    seconds: float


class Trainings:
    """Trainings with the same texts and settings, but for the phase."""

    def __init__(self, options: Options, model: LanguageModel, windows: TokenWindows) -> None:
        self.options, self.model, self.windows = options, model, windows
        self.hook = Hook(options.layer, "hook_resid_post")
        self.starts: dict[int, Start] = {}

    def source(self) -> tuple[ActivationSource, int]:
        """The activations before a phase, and the epochs."""
        options = self.options
        if not options.shards:
            return training_source(options, self.model, self.windows, self.hook)
        size, seed = options.tokens_per_step, options.seed
        source = CachedSource(options.shards, self.hook, tokens_per_step=size, seed=seed)
        if not source.is_of(self.windows):
            raise SAEError(f"{options.shards[0]}: of other windows; give the texts and --length")
        epochs = -(-options.tokens // source.n_rows)
        source.n_train = max(1, options.tokens // (epochs * source.positions))
        return source, epochs

    def reading(self) -> float:
        """Processor time per token of what the shards spare; none without shards."""
        if not self.options.shards:
            return 0.0
        tokens = self.windows.train(0, torch.arange(self.options.timed_windows))
        parts = tokens.split(self.model.windows_at_once(tokens.shape[1], self.options.batch_size))
        started = time.process_time()
        for part in parts:
            self.model.activations(part, [self.hook])
        return (time.process_time() - started) / tokens[:, 1:].numel()

    def phase(self, config: EndToEndConfig) -> EndToEnd:
        return EndToEnd(self.model, self.windows, self.hook, config, self.options.batch_size)

    def trainer(self, phase: EndToEnd | None, observer: Observer) -> Trainer:
        options, device = self.options, torch.device("cpu")
        config = SAEConfig(topk=options.topk, sae_expansion=options.expansion)
        sae = build(sae_spec(config, self.hook, self.model.d_model, device, {}))
        sae.initialise(generator(options.seed, "weights"))
        source, epochs = self.source()
        source.n_validation = min(source.n_validation, options.max_validation)
        training = TrainingConfig(
            num_epochs=epochs,
            tokens_per_step=options.tokens_per_step,
            lr=options.lr,
            lr_decay=options.lr_decay,
            optimizer=options.optimizer,
            early_stopping_patience=0,
        )
        return Trainer(sae, source, training, observer, end_to_end=phase)

    def without(self, phases: Sequence[EndToEndConfig]) -> Row:
        """Train with local losses only, and keep the states in which the phases begin."""
        n_local = {self._n_local(phase) for phase in phases}
        observer = Starts(n_local, self.options.tokens_per_step * self.reading())
        trainer = observer.trainer = self.trainer(None, observer)
        for _ in trainer.train():
            pass
        seconds, self.starts = observer.seconds, observer.found
        held_out = self.windows.evaluation()[: self.options.max_windows]
        norm = trainer.normalise.max_norm
        self.held_out = HeldOut(self.phase(EndToEndConfig()), held_out, norm)
        return self._row("none", trainer, seconds)

    def row(self, config: EndToEndConfig) -> Row:
        """Train to the end, from where the phase begins."""
        trainer = self.trainer(self.phase(config), Observer())
        before = self.starts[trainer.batches.n_local_steps]
        tensors, values = before.state
        values = copy.deepcopy(values) | {"end_to_end": dict(trainer.batches.phase.weights)}
        trainer.restore(TrainingState({k: v.clone() for k, v in tensors.items()}, values))
        started = time.process_time()
        for _ in trainer.train():
            pass
        seconds = time.process_time() - started
        return self._row(_name(config), trainer, before.seconds + seconds)

    def _n_local(self, config: EndToEndConfig) -> int:
        return self.trainer(self.phase(config), Observer()).batches.n_local_steps

    def _row(self, name: str, trainer: Trainer, seconds: float) -> Row:
        normalise = trainer.normalise
        sae = trainer.sae.folded(normalise.mean, normalise.scale, torch.float32)
        row = Row(name, self.held_out.gaps(sae), self.held_out.fvu(sae), seconds)
        print(name, f"{float(row.gaps.mean()):.4f} {row.fvu:.4f} {seconds:.0f} s", flush=True)
        return row


def _name(config: EndToEndConfig) -> str:
    name = f"last {config.end_to_end_fraction:g}"
    if config.end_to_end_stride > 1:
        name += f", one window in {config.end_to_end_stride}"
    if config.logit_kl_weight != EndToEndConfig.logit_kl_weight:
        name += f", weight × {config.logit_kl_weight / EndToEndConfig.logit_kl_weight:g}"
    return name


def table(rows: list[Row]) -> str:
    """Compared with the first."""
    lines = [
        "| end-to-end | CE gap, sinks kept | FVU | seconds | gap, × | time, × |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    first = rows[0]
    for row in rows:
        ratio, error = ratio_of_means(row.gaps, first.gaps)
        lines.append(
            f"| {row.name} | {float(row.gaps.mean()):.4f} | {row.fvu:.4f} | {row.seconds:.0f} "
            f"| {ratio:.2f} ± {error:.2f} | {row.seconds / first.seconds:.2f} |"
        )
    return "\n".join(lines)


def ratio_of_means(a: Tensor, b: Tensor) -> tuple[float, float]:
    """The mean of a (W,) over that of b (W,), and its standard error (delta method)."""
    ratio = a.mean() / b.mean()
    error = (a - ratio * b).std() / len(a) ** 0.5 / b.mean().abs()
    return float(ratio), float(error)


def run(options: Options) -> None:
    data = DataConfig(
        max_text_length=options.length, seed=options.seed, val_fraction=options.val_fraction
    )
    model, windows = model_and_windows(options, data, torch.device("cpu"))
    trainings = Trainings(options, model, windows)
    print(f"End-to-end phases ({describe('transformers')}, {model.dtype})\n", flush=True)
    settings = zip(options.fractions, options.strides, options.weights, strict=True)
    phases = [
        EndToEndConfig(end_to_end_fraction=fraction, end_to_end_stride=k, logit_kl_weight=weight)
        for fraction, k, weight in settings
    ]
    rows = [trainings.without(phases), *map(trainings.row, phases)]
    print(f"\n{rows[0].gaps.numel()} held-out windows\n\n{table(rows)}")


if __name__ == "__main__":
    cli.run(run, Options, __doc__)
