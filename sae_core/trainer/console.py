"""What a training run shows on the terminal."""

from pathlib import Path

from torch import Tensor

from sae_core.formats.checkpoint import History
from sae_core.trainer.events import EpochRecord, Observer
from sae_core.utils.progress import Progress, progress_bar

SHOWN = (
    "loss",
    "recon_loss",
    "logit_kl",
    "total_post_layer_mse",
    "sparsity",
    "dead_features",
    "skipped_batches",
    "val_loss",
    "val_logit_kl",
    "val_sparsity",
    "val_skipped_batches",
)
"""The figures of an epoch that are shown, if it has them."""


class Console(Observer):
    """One progress bar per epoch, with the loss, and one line after it.

    Args:
        log_freq: steps between updates of the figures in the bar.
        name: of one of several SAEs that are trained together: each line begins with it, and there
            is no bar.
    """

    def __init__(self, log_freq: int, name: str = "") -> None:
        self.log_freq, self.has_bar = log_freq, not name
        self.before = f"{name}: " if name else ""
        self.bar: Progress | None = None

    def on_start(self, n_epochs: int, steps_per_epoch: int) -> None:
        self.n_epochs, self.steps_per_epoch = n_epochs, steps_per_epoch

    def on_resume(self, n_epochs: int, steps_per_epoch: int, step: int) -> None:
        self.on_start(n_epochs, steps_per_epoch)
        print(f"{self.before}an interrupted training continues after step {step}", flush=True)

    def on_step(self, epoch: int, step: int, loss: Tensor, l0: float) -> None:
        if not self.has_bar:
            return
        if self.bar is None:
            self.bar = progress_bar(f"epoch {epoch}/{self.n_epochs}", "step", self.steps_per_epoch)
        self.bar.update(step - self.bar.n)
        if step % self.log_freq == 0 or step == self.steps_per_epoch:
            self.bar.set_postfix(loss=f"{float(loss):.4f}", l0=f"{l0:.1f}")

    def on_skip(self, epoch: int, step: int, what: str) -> None:
        print(f"{self.before}epoch {epoch}: step {step} skipped: {what} not finite", flush=True)

    def on_epoch(self, record: EpochRecord) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        figures = {n: v for n, v in record.metrics.items() if "skipped_batches" not in n or v}
        shown = (f"{name} {figures[name]:.4g}" for name in SHOWN if name in figures)
        print(
            f"{self.before}epoch {record.epoch}/{record.n_epochs}: {', '.join(shown)}", flush=True
        )

    def on_checkpoint(self, folder: Path, best: bool) -> None:
        what = "best so far" if best else "checkpoint"
        print(f"{self.before}{what}: {folder}", flush=True)

    def on_end(self, history: History, stopped_early: bool) -> None:
        if stopped_early:
            last = history["epoch"][-1]
            print(f"{self.before}stopped after epoch {last}: the validation loss no longer falls")
        if skipped := sum(filter(None, history.get("skipped_batches", []))):
            what = "batches were skipped: they contained NaN or infinite numbers"
            print(f"{self.before}{skipped} {what}")
