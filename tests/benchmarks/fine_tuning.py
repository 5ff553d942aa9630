"""An SAE that was trained here, exported to SAELens's format and read back as another tool's, then
trained a little further: is it worse than its origin?

FVU is pooled over held-out tokens, at the threshold that gives them the L0 that the origin has at
its own threshold. Run on the shards of a harvest (`tests/benchmarks/shards.py`).
"""

import argparse
import tempfile
from pathlib import Path

import torch
from machine import DEVICE, describe
from sae_figures import Trained, at_l0, at_threshold
from torch import Tensor

from sae_core.activations.store import CachedSource
from sae_core.formats.checkpoint import load_sae, write_files
from sae_core.formats.saelens import saelens_files
from sae_core.models.language_model import Hook
from sae_core.sae.config import SAEConfig
from sae_core.sae_base import SparseAutoencoder
from sae_core.sae_train import train_sae
from sae_core.train_config import TrainingConfig
from sae_core.trainer.events import Observer
from sae_core.trainer.origin import origin_of
from sae_core.trainer.training_inputs import Activations, Provenance, Settings

MODEL = "the model of the shards"


def source_of(shards: list[Path], hook: Hook, tokens: int | None, seed: int) -> CachedSource:
    """The stored activations, or those of the first windows."""
    source = CachedSource(shards, hook, tokens_per_step=4096, seed=seed, device=DEVICE)
    if tokens is not None:
        source.n_train = min(source.n_train, -(-tokens // source.positions))
        source.tokens_per_step = min(source.tokens_per_step, source.n_rows)
    return source


def trained(
    source: CachedSource, hook: Hook, sae: SAEConfig, training: TrainingConfig, folder: Path
) -> SparseAutoencoder:
    origin = origin_of(sae, hook, None, source.d_in, MODEL, folder / "sae")
    provenance = Provenance(MODEL, None, source.dtype, "texts", "", prepend_bos=False)
    activations = Activations(source, hook, source.d_in, provenance, origin=origin)
    settings = Settings(sae=sae, training=training)
    return load_sae(train_sae(activations, settings, folder / "sae", folder / "points", Observer()))


def figures(sae: SparseAutoencoder, x: Tensor, l0: float | None) -> tuple[float, float]:
    """FVU and L0; at the threshold that gives this L0, or at the SAE's own."""
    own = Trained(sae.pre_activations, sae.decode, float(sae.known_threshold))
    found = at_threshold(own, x, own.threshold) if l0 is None else at_l0(own, x, l0)
    return found.fvu, found.l0


def held_out(source: CachedSource, sae: SparseAutoencoder) -> Tensor:
    """(N, D) the tokens of every other held-out window, but for outliers."""
    indices = torch.arange(1, source.n_validation, 2)
    x = source.read("validation", 0, indices).flatten(0, 1).float().to(DEVICE)
    return x[x.norm(dim=-1) <= sae.spec.metadata["outlier_norm"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", type=Path, nargs="+", help="folders of a harvest")
    parser.add_argument("--hook", default="blocks.14.hook_resid_post")
    parser.add_argument("--topk", type=int, default=32)
    parser.add_argument("--expansion", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=1, help="of the origin's training")
    parser.add_argument("--origin-tokens", type=int, help="that an epoch of it reads, at most")
    parser.add_argument("--tokens", type=int, default=100_000, help="of the fine-tuning")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 1e-3])
    options = parser.parse_args()
    hook = Hook.parse(options.hook)
    config = SAEConfig(topk=options.topk, sae_expansion=options.expansion)
    print(f"Fine-tuning an SAE of SAELens's format ({describe()}, {DEVICE})\n")
    print("| learning rate | tokens | L0 | FVU | over the origin's |\n|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        first = source_of(options.shards, hook, options.origin_tokens, seed=0)
        training = TrainingConfig(num_epochs=options.epochs, lr="auto", early_stopping_patience=0)
        origin = trained(first, hook, config, training, folder / "origin")
        write_files(folder / "theirs", saelens_files(origin))
        x = held_out(first, origin)
        fvu, l0 = figures(origin, x, None)
        print(f"| | {origin.spec.metadata['tokens']:,} | {l0:.1f} | {fvu:.4f} | |", flush=True)
        begun = SAEConfig(
            topk=options.topk,
            sae_expansion=options.expansion,
            init_from=str(folder / "theirs"),
        )
        for rate in options.rates:
            source = source_of(options.shards, hook, options.tokens, seed=1)
            training = TrainingConfig(num_epochs=1, lr=rate)
            sae = trained(source, hook, begun, training, folder / f"rate_{rate}")
            own, _ = figures(sae, x, l0)
            tokens = sae.spec.metadata["tokens"]
            print(f"| {rate} | {tokens:,} | {l0:.1f} | {own:.4f} | {own / fvu:.4f} |", flush=True)


if __name__ == "__main__":
    main()
