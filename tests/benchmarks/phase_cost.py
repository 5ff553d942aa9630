"""What an end-to-end phase costs and brings, by its length and by the share of windows that are
spliced.

The steps before a phase are taken once for all phases of its length, and their time counts for
each. Prints a Markdown table: the cross-entropy that the SAE costs on held-out windows when
attention sinks (outliers, and a window's first token) keep their activation, the processor time of
the whole training, and the gap and the time as multiples of the first row's. Activations are read
from the model, not from a store. One thread (`OMP_NUM_THREADS=1`) makes the times comparable.
"""

import copy
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from end_to_end import Options as EndToEndOptions
from end_to_end import gap_beside_sinks, model_and_windows, training_source
from machine import describe
from torch import Tensor

from sae_core.activations.token_windows import TokenWindows
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.sae.config import SAEConfig
from sae_core.sae.kinds import build
from sae_core.train_config import DataConfig, EndToEndConfig, TrainingConfig
from sae_core.trainer.end_to_end import EndToEnd
from sae_core.trainer.events import Observer
from sae_core.trainer.training_inputs import sae_spec
from sae_core.trainer.training_state import TrainingState
from sae_core.training import Trainer
from sae_core.utils import cli
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

    val_fraction: float = 0.15
    """Share of the texts that is held out."""

    max_validation: int = 64
    """Windows that the training validates on after an epoch, at most."""

    fractions: tuple[float, ...] = (0.0, 0.1, 0.1)
    """Shares of the steps with end-to-end losses, a phase each; 0 is none."""

    strides: tuple[int, ...] = (1, 1, 4)
    """One window in so many is spliced, of each phase."""


class Reached(Exception):
    """The step at which the phases begin is done."""


class StopsAt(Observer):
    """Stops a training after so many steps."""

    def __init__(self, n_steps: int) -> None:
        self.left = n_steps

    def on_step(self, epoch: int, step: int, loss: Tensor, l0: float) -> None:
        self.left -= 1
        if self.left == 0:
            raise Reached


class Row(NamedTuple):
    """Of a phase."""

    name: str
    gap: float
    seconds: float


class Trainings:
    """Trainings with the same texts and settings, but for the phase."""

    def __init__(self, options: Options, model: LanguageModel, windows: TokenWindows) -> None:
        self.options, self.model, self.windows = options, model, windows
        self.hook = Hook(options.layer, "hook_resid_post")
        self._starts: dict[float, tuple[TrainingState, float]] = {}

    def phase(self, fraction: float, stride: int) -> EndToEnd:
        config = EndToEndConfig(end_to_end_fraction=fraction, end_to_end_stride=stride)
        return EndToEnd(self.model, self.windows, self.hook, config, self.options.batch_size)

    def trainer(self, phase: EndToEnd | None, observer: Observer | None = None) -> Trainer:
        options, device = self.options, torch.device("cpu")
        config = SAEConfig(topk=options.topk, sae_expansion=options.expansion)
        sae = build(sae_spec(config, self.hook, self.model.d_model, device, {}))
        sae.initialise(generator(options.seed, "weights"))
        source, epochs = training_source(options, self.model, self.windows, self.hook)
        source.n_validation = min(source.n_validation, options.max_validation)
        training = TrainingConfig(
            num_epochs=epochs,
            tokens_per_step=options.tokens_per_step,
            lr=options.lr,
            early_stopping_patience=0,
        )
        return Trainer(sae, source, training, observer or Observer(), end_to_end=phase)

    def start(self, fraction: float) -> tuple[TrainingState, float]:
        """The state in which a phase of that length begins, and the seconds until then."""
        if fraction not in self._starts:
            phase = self.phase(fraction, 1)
            observer = StopsAt(self.trainer(phase).batches.n_local_steps)
            trainer, started = self.trainer(phase, observer), time.process_time()
            try:
                for _ in trainer.train():
                    pass
            except Reached:
                pass
            self._starts[fraction] = trainer.state(), time.process_time() - started
        return self._starts[fraction]

    def row(self, fraction: float, stride: int) -> Row:
        """Train to the end, from where the phase begins."""
        trainer, seconds = self.trainer(self.phase(fraction, stride) if fraction else None), 0.0
        if fraction:
            state, seconds = self.start(fraction)
            tensors = {name: tensor.clone() for name, tensor in state.tensors.items()}
            trainer.restore(TrainingState(tensors, copy.deepcopy(state.values)))
        started = time.process_time()
        for _ in trainer.train():
            pass
        seconds += time.process_time() - started
        normalise = trainer.normalise
        sae = trainer.sae.folded(normalise.mean, normalise.scale, torch.float32)
        held_out = self.windows.evaluation()[: self.options.max_windows]
        gap = gap_beside_sinks(self.phase(1.0, 1), sae, held_out, normalise.max_norm)
        name = f"last {fraction:g}" if fraction else "none"
        name += f", one window in {stride}" if stride > 1 else ""
        row = Row(name, gap, seconds)
        print(row, flush=True)
        return row


def table(rows: list[Row]) -> str:
    """Compared with the first."""
    lines = [
        "| end-to-end | CE gap, sinks kept | seconds | gap, × | time, × |",
        "|---|--:|--:|--:|--:|",
    ]
    first = rows[0]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.gap:.4f} | {row.seconds:.0f} | {row.gap / first.gap:.2f} "
            f"| {row.seconds / first.seconds:.2f} |"
        )
    return "\n".join(lines)


def run(options: Options) -> None:
    data = DataConfig(
        max_text_length=options.length, seed=options.seed, val_fraction=options.val_fraction
    )
    model, windows = model_and_windows(options, data, torch.device("cpu"))
    trainings = Trainings(options, model, windows)
    print(f"End-to-end phases ({describe('transformers')}, {model.dtype})\n", flush=True)
    phases = zip(options.fractions, options.strides, strict=True)
    print(table([trainings.row(*phase) for phase in phases]))


if __name__ == "__main__":
    cli.run(run, Options, __doc__)
