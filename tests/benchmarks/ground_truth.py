"""How many known features each kind of SAE recovers, as a Markdown table.

    python tests/benchmarks/ground_truth.py

The kinds without a k are trained with each of the `--penalties`, which libraries are compared at
the same L0 by. An lr_decay of 0.9 goes with `active_adam`. `--peers` adds their SAEs of the same
kinds, where the peers are: they have all but `multi_batch_topk`.
L0, FVU and dead features are those of held-out tokens, at each SAE's own threshold.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/tools")]

import peer_kinds  # noqa: E402
import peer_training  # noqa: E402
import torch  # noqa: E402
from known_features import RECOVERED, KnownFeatures, learn, recovery  # noqa: E402
from machine import DEVICE, describe  # noqa: E402
from our_training import ACTIVE_ADAM  # noqa: E402
from sae_figures import Data, Trained, at_threshold  # noqa: E402
from torch import Tensor  # noqa: E402

from sae_core.sae.config import SAEConfig  # noqa: E402
from sae_core.sae.kinds import KINDS  # noqa: E402
from sae_core.sae.normalisation import Normalisation  # noqa: E402
from sae_core.train_config import TrainingConfig  # noqa: E402

D_IN, N_FEATURES, N_ACTIVE, EXPANSION = 128, 512, 6, 8
N_TOKENS, TOKENS_PER_STEP, EPOCHS = 2**19, 1024, 2
PENALISED = ("standard", "gated")
"""The kinds without a k."""
OPTIMIZERS = {"adam": TrainingConfig(), "active_adam": ACTIVE_ADAM}
BATCH_TOPK: dict[str, Callable[[Data, int, int, float, int], Trained]] = {
    "sae-lens": peer_training.sae_lens,
    "dictionary-learning": peer_training.dictionary_learning,
}
OTHER_KINDS: dict[str, Callable[[Data, SAEConfig, float, int], Trained]] = {
    "sae-lens": peer_kinds.sae_lens,
    "dictionary-learning": peer_kinds.dictionary_learning,
}
THEIRS = {
    "sae-lens": ["batch_topk", *peer_kinds.KINDS],
    "dictionary-learning": ["batch_topk", *peer_kinds.TRAINERS],
}
"""The kinds that a peer is compared in."""


class Learnt(NamedTuple):
    """What has been trained, in any way."""

    sae: Trained
    """Of normalised activations."""
    held_out: Tensor
    """(N, D), normalised."""
    seconds: float
    """CPU time of the training."""


def configured(kinds: list[str], penalties: list[float]) -> dict[str, SAEConfig]:
    """The SAEs that are asked for, by their names in the table."""
    wanted = {kind: (kind, 0.0) for kind in kinds if kind not in PENALISED}
    for kind, penalty in product([k for k in kinds if k in PENALISED], penalties):
        wanted[f"{kind}, {penalty:g}"] = kind, penalty
    return {
        name: SAEConfig(
            sae_type=kind, sae_expansion=EXPANSION, topk=N_ACTIVE, sparsity_penalty=penalty
        )
        for name, (kind, penalty) in wanted.items()
    }


def ours(config: SAEConfig, optimizer: str, source: KnownFeatures, lr: float) -> Learnt:
    """One of our SAEs."""
    training = replace(OPTIMIZERS[optimizer], num_epochs=EPOCHS, lr=lr)
    start = time.process_time()
    trainer = learn(config, source, training)
    seconds = time.process_time() - start
    sae = trainer.sae.eval()
    return Learnt(
        Trained(sae.encode, sae.decode, 0.0), held_out(source, trainer.normalise), seconds
    )


def peers(peer: str, config: SAEConfig, source: KnownFeatures, lr: float) -> Learnt:
    """A peer's SAE of the same kind."""
    drawn = [x for epoch in range(EPOCHS) for x in source.train_batches(epoch)]
    normalise = Normalisation.measure(torch.cat(drawn[:8]).to(DEVICE))
    held = held_out(source, normalise)
    data = Data([normalise(x.to(DEVICE)) for x in drawn], held, held)
    start = time.process_time()
    if config.sae_type == "batch_topk":
        sae = BATCH_TOPK[peer](data, D_IN * EXPANSION, N_ACTIVE, lr, 0)
    else:
        sae = OTHER_KINDS[peer](data, config, lr, 0)
    return Learnt(sae, held, time.process_time() - start)


def held_out(source: KnownFeatures, normalise: Normalisation) -> Tensor:
    """(N, D) the tokens that validate, normalised."""
    windows = source.read("validation", 0, torch.arange(source.n_validation))
    return normalise(windows.flatten(0, 1).to(DEVICE))


@torch.no_grad()
def row(
    name: str, train: Callable[[KnownFeatures, float], Learnt], lr: float, n_tokens: int
) -> str:
    """One line of the table: a training from scratch."""
    source = KnownFeatures(
        d_in=D_IN,
        n_features=N_FEATURES,
        n_active=N_ACTIVE,
        n_tokens=n_tokens,
        tokens_per_step=TOKENS_PER_STEP,
    )
    with torch.enable_grad():
        sae, held, seconds = train(source, lr)
    one_each = torch.eye(D_IN * EXPANSION, device=DEVICE)
    found = recovery(
        sae.decode(one_each) - sae.decode(torch.zeros_like(one_each)), source.directions
    )
    own = at_threshold(sae, held, sae.threshold)
    return (
        f"| {name} | {lr:g} | {found.share:.1%} | {found.mean_cosine:.3f} "
        f"| {own.l0:.1f} | {own.fvu:.4f} | {own.dead:.1%} | {seconds:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--optimizers", nargs="*", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--peers", nargs="*", choices=THEIRS, default=[], help="where they are")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 1e-2])
    parser.add_argument("--penalties", type=float, nargs="+", default=[0.15, 0.25])
    parser.add_argument("--tokens", type=int, default=N_TOKENS, help="an epoch; there are two")
    options = parser.parse_args()
    print(
        f"{N_FEATURES} known features in {D_IN} dimensions, {N_ACTIVE} active a token, "
        f"{D_IN * EXPANSION} features to find them with, {EPOCHS * options.tokens:,} tokens; "
        f"{describe()}\n"
    )
    print(f"| SAE | lr | recovered (cosine > {RECOVERED}) | mean cosine | L0 | FVU | dead | s |")
    print("|---" + "|--:" * 7 + "|")
    saes = configured(options.kinds, options.penalties)
    contenders = {
        f"{name}, {optimizer}": partial(ours, config, optimizer)
        for (name, config), optimizer in product(saes.items(), options.optimizers)
    }
    contenders |= {
        f"{name}, {peer}": partial(peers, peer, config)
        for peer, (name, config) in product(options.peers, saes.items())
        if config.sae_type in THEIRS[peer]
    }
    for name, train in contenders.items():
        for lr in options.rates:
            print(row(name, train, lr, options.tokens), flush=True)


if __name__ == "__main__":
    main()
