"""What a short end-to-end phase is worth: local losses only, a phase at the end, and end-to-end
losses throughout, at equal tokens and seed, each evaluated on the same held-out windows.

Prints a Markdown table: the cross-entropy that the SAE costs (`ce_sae - ce_clean`) when every token
is spliced, and when attention sinks (outliers, and a window's first token), which never train an
SAE, keep their activation; FVU, L0, KL, dead features, minutes of training, and the second gap and
the time as multiples of those of local losses only.
The local steps read their activations from the model too, so that "times" are beside a streaming
run; from stored activations local training is several times faster.
"""

import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from demo_model import demo_record, read_chapters
from machine import describe
from torch import Tensor

from sae_core.activations.clean_pass import CleanPass
from sae_core.activations.store import StreamingSource
from sae_core.activations.token_windows import TokenWindows, read_windows
from sae_core.evaluation.metrics import evaluate
from sae_core.formats.checkpoint import load_sae
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.sae.config import SAEConfig
from sae_core.sae.losses import fraction_of_variance_unexplained
from sae_core.sae_base import SparseAutoencoder
from sae_core.sae_train import SAETrainer
from sae_core.train_config import (
    DataConfig,
    EndToEndConfig,
    ModelConfig,
    RuntimeConfig,
    TrainingConfig,
)
from sae_core.trainer.console import Console
from sae_core.trainer.end_to_end import EndToEnd
from sae_core.trainer.training_inputs import Activations, Provenance, Settings
from sae_core.utils import cli
from sae_core.utils.devices import pick_device


@dataclass(frozen=True)
class Options:
    """What to train on, and how long."""

    chapters: Path = Path("sae_core/data/raw_data")
    """A folder that holds a folder of Markdown chapters a subject."""

    tokens: int = 200_000
    """Training tokens of each SAE, about."""

    layer: int = 14
    """0-based layer; the hook is hook_resid_post."""

    model: Path | None = None
    """Directory of a language model; the demo's when omitted."""

    topk: int = 32
    """Mean number of active features a token."""

    expansion: int = 8
    """Number of features, as a multiple of the activation's width."""

    lr: float | Literal["auto"] = 2e-3
    """Peak learning rate; `auto` as in a training."""

    tokens_per_step: int = 4096
    """Tokens in an optimizer step."""

    length: int = 128
    """Tokens in a window."""

    batch_size: int = 8
    """Windows in a forward pass of the language model."""

    fractions: tuple[float, ...] = (0.0, 0.1, 1.0)
    """Shares of the steps with end-to-end losses, one SAE each; the first is compared with."""

    max_windows: int = 256
    """Held-out windows that are evaluated, at most."""

    seed: int = 420
    """Seed of everything random."""


def model_and_windows(
    options: Options, data: DataConfig, device: torch.device
) -> tuple[LanguageModel, TokenWindows]:
    """The language model, and the windows of the chapters."""
    with tempfile.TemporaryDirectory() as scratch:
        texts = read_chapters(options.chapters, Path(scratch))
    path = demo_record().path if options.model is None else str(options.model)
    model = LanguageModel.load(ModelConfig(model_name=path), device)
    return model, read_windows(model.tokenizer, texts, data)


def training_source(
    options: Options, model: LanguageModel, windows: TokenWindows, hook: Hook
) -> tuple[StreamingSource, int]:
    """A source, and the epochs of it that make up `options.tokens`."""
    source = StreamingSource(
        model,
        windows,
        hook,
        batch_size=options.batch_size,
        tokens_per_step=options.tokens_per_step,
        seed=options.seed,
    )
    epochs = -(-options.tokens // (source.n_train * source.positions))
    source.n_train = max(1, options.tokens // (epochs * source.positions))
    return source, epochs


class HeldOut:
    """W windows that no SAE was trained on, run through the unmodified model once.

    Args:
        losses: of the hook; those of a phase, which is not used otherwise.
        windows: (W, L) tokens.
        norm: sinks are longer, and keep their activation.
    """

    def __init__(self, losses: EndToEnd, windows: Tensor, norm: float) -> None:
        self.losses = losses
        self.passes = losses.clean(windows, norm)
        hidden = torch.cat([part.hidden for part in self.passes])
        self.clean = self._cross_entropy(torch.cat([part.tokens for part in self.passes]), hidden)

    @torch.no_grad()
    def gaps(self, sae: SparseAutoencoder) -> Tensor:
        """(W,) the cross-entropy per token that the SAE costs each window."""
        spliced = [self._spliced(part, sae(part.x[part.kept].float())) for part in self.passes]
        return torch.cat(spliced) - self.clean

    @torch.no_grad()
    def fvu(self, sae: SparseAutoencoder) -> float:
        """Of the tokens that are spliced."""
        x = torch.cat([part.x[part.kept].float() for part in self.passes])
        error = (sae(x) - x).pow(2).sum()
        return float(fraction_of_variance_unexplained(error, x.pow(2).sum(), x.sum(0), len(x)))

    def _spliced(self, part: CleanPass, x_hat: Tensor) -> Tensor:
        value = part.x.float().masked_scatter(part.kept[..., None], x_hat)
        model, hook = self.losses.model, self.losses.hook
        hidden, _ = model.resume_hidden(part.tokens, part.residual, hook, value)
        return self._cross_entropy(part.tokens, hidden)

    def _cross_entropy(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """(B,) of windows (B, L) with hidden states (B, L, D), a mean over the tokens."""
        unembed = self.losses.model.unembed
        pairs = zip(hidden, tokens, strict=True)
        means = [F.cross_entropy(unembed(rows[:-1]).float(), row[1:]) for rows, row in pairs]
        return torch.stack(means)


def measure(
    options: Options, fraction: float, model: LanguageModel, windows: TokenWindows, data: DataConfig
) -> dict[str, Any]:
    """Train one SAE and evaluate it."""
    hook = Hook(options.layer, "hook_resid_post")
    source, epochs = training_source(options, model, windows, hook)
    config = EndToEndConfig(end_to_end_fraction=fraction or 1.0)
    phase = EndToEnd(model, windows, hook, config, options.batch_size)
    with tempfile.TemporaryDirectory() as scratch:
        settings = Settings(
            sae=SAEConfig(topk=options.topk, sae_expansion=options.expansion),
            data=data,
            training=TrainingConfig(
                num_epochs=epochs,
                tokens_per_step=options.tokens_per_step,
                lr=options.lr,
                early_stopping_patience=0,
            ),
            end_to_end=replace(config, use_end_to_end=fraction > 0),
            runtime=RuntimeConfig(batch_size=options.batch_size, checkpoint_freq=0),
        )
        provenance = Provenance(
            str(options.model), None, str(model.dtype), "", "", windows.bos is not None
        )
        activations = Activations(
            source, hook, model.d_model, provenance, model=model, windows=windows
        )
        trainer = SAETrainer(activations, settings, Path(scratch) / "points", Console(log_freq=10))
        started = time.perf_counter()
        trainer.train()
        minutes = (time.perf_counter() - started) / 60
        sae = load_sae(trainer.export(Path(scratch) / "sae"))
    held_out = windows.evaluation()[: options.max_windows]
    figures = evaluate(model, sae, held_out, options.batch_size)
    beside = float(HeldOut(phase, held_out, trainer.loop.normalise.max_norm).gaps(sae).mean())
    figures |= {"gap": beside, "minutes": minutes, "tokens": trainer.loop.progress.tokens}
    print(json.dumps({"fraction": fraction} | figures), flush=True)
    return figures


def table(results: dict[float, dict[str, Any]]) -> str:
    """One row an SAE, compared with the first."""
    base = next(iter(results.values()))
    lines = [
        "| end-to-end | tokens | CE gap | sinks kept | FVU | L0 | KL | dead | minutes | gap, × | "
        "time, × |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for fraction, r in results.items():
        name = "none" if not fraction else "every step" if fraction == 1 else f"last {fraction:g}"
        lines.append(
            f"| {name} | {r['tokens']:,} | {r['ce_sae'] - r['ce_clean']:.4f} | {r['gap']:.4f} | "
            f"{r['fvu']:.4f} | {r['l0']:.1f} | "
            f"{r['kl']:.4f} | {r['dead_fraction']:.2%} | {r['minutes']:.1f} | "
            f"{r['gap'] / base['gap']:.2f} | {r['minutes'] / base['minutes']:.2f} |"
        )
    return "\n".join(lines)


def run(options: Options) -> None:
    data = DataConfig(max_text_length=options.length, seed=options.seed)
    model, windows = model_and_windows(options, data, pick_device("auto"))
    print(f"End-to-end losses ({describe('transformers')}, {model.dtype})\n", flush=True)
    print(table({f: measure(options, f, model, windows, data) for f in options.fractions}))


if __name__ == "__main__":
    cli.run(run, Options, __doc__)
