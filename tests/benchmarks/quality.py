"""FVU of BatchTopK SAEs on the same activations: ours, sae-lens's and dictionary-learning's.

All see the same tokens in the same order, centred and scaled, without outliers, in as many steps
(but for one line of ours), with a warm-up and a decay over the last fifth; each is trained at
several learning rates. FVU is pooled over held-out tokens, at inference; thresholds are calibrated
on other held-out tokens. Ours counts features as dead after three steps: trainings are as short
as 200. Run where the peers are, on the shards of a harvest: `make bench`.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, cycle
from pathlib import Path
from typing import NamedTuple

import torch
from machine import DEVICE, describe
from step import NoSource
from torch import Tensor

from sae_core.activations.store import CachedSource
from sae_core.models.language_model import Hook
from sae_core.sae.config import SAEConfig
from sae_core.sae.kinds import build
from sae_core.sae.losses import fraction_of_variance_unexplained
from sae_core.sae.precision import pick_precision
from sae_core.sae_base import Compute
from sae_core.train_config import TrainingConfig
from sae_core.trainer.training_inputs import sae_spec
from sae_core.training import Batch, Normalisation, Observer, Trainer, learning_rate
from sae_core.utils.devices import keep_freed_memory
from sae_core.utils.seeding import generator

ROWS = 512
"""Tokens whose dense code is in memory at once."""


TOPK = 32
STEPS_TO_DEAD = 3

Train = Callable[[float], "Trained"]
"""From a learning rate to a trained SAE."""


class Data(NamedTuple):
    """Normalised activations: the steps' batches, and two disjoint held-out parts."""

    batches: list[Tensor]
    calibration: Tensor
    held_out: Tensor


class Trained(NamedTuple):
    """An SAE after training, whichever library it is of."""

    pre: Callable[[Tensor], Tensor]
    """(N, D) -> (N, F) pre-activations."""
    decode: Callable[[Tensor], Tensor]
    threshold: float


class Figures(NamedTuple):
    fvu: float
    l0: float
    dead: float
    """Share of the features that are active on no held-out token."""


def load(shards: list[Path], hook: Hook, epochs: int, tokens_per_step: int, seed: int) -> Data:
    source = CachedSource(shards, hook, tokens_per_step=tokens_per_step, seed=seed)
    batches = chain.from_iterable(source.train_batches(epoch) for epoch in range(epochs))
    raw = [batch.to(DEVICE) for batch in batches]
    normalise = Normalisation.measure(torch.cat(raw[:8]).float())
    held_out = [
        normalise(source.read("validation", 0, indices).flatten(0, 1))
        for indices in (torch.arange(first, source.n_validation, 2) for first in (0, 1))
    ]
    return Data([normalise(batch) for batch in raw], *held_out)


@torch.no_grad()
def figures(sae: Trained, x: Tensor, threshold: float) -> Figures:
    error, n_active, fired = 0.0, 0, torch.zeros_like(sae.pre(x[0]), dtype=torch.bool)
    for rows in x.split(ROWS):
        pre = sae.pre(rows)
        code = torch.relu(pre) * (pre > threshold)
        error += float((sae.decode(code) - rows).pow(2).sum())
        n_active += int((code > 0).sum())
        fired |= (code > 0).any(0)
    fvu = fraction_of_variance_unexplained(error, x.pow(2).sum(), x.sum(0), len(x))
    return Figures(fvu, n_active / len(x), 1 - float(fired.float().mean()))


@torch.no_grad()
def threshold_for(sae: Trained, x: Tensor, l0: float) -> float:
    """The threshold at which (N, D) tokens have `l0` active features on average."""
    total = round(l0 * len(x))
    largest = [torch.relu(sae.pre(rows)).flatten() for rows in x.split(ROWS)]
    kept = torch.cat([part[part > 0] for part in largest])
    return float(kept.kthvalue(max(1, len(kept) - total)).values)


def ours(data: Data, config: SAEConfig, lr: float, compute_dtype: str) -> Trained:
    d_in = data.held_out.shape[1]
    sae = build(sae_spec(config, Hook(0, "hook_resid_post"), d_in, DEVICE, {}))
    sae.initialise(generator(0, "weights"))
    sae.to(DEVICE)
    compute = Compute(precision=pick_precision(compute_dtype, DEVICE))
    trainer = Trainer(sae, NoSource(1, 0, 1, 1, 0), TrainingConfig(lr=lr), Observer(), compute)
    for step, x in enumerate(data.batches):
        trainer.step(Batch(x), learning_rate(step, len(data.batches), lr))
    sae.calibrate(iter([data.calibration]))
    return Trained(sae.pre_activations, sae.decode, float(sae.threshold))


def sae_lens(data: Data, config: SAEConfig, lr: float) -> Trained:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(0)
    d_in, n_steps = data.held_out.shape[1], len(data.batches)
    scale = d_in**0.5  # what its normalisation of activations comes to
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=d_in,
            d_sae=d_in * config.sae_expansion,
            k=config.topk,
            device=DEVICE.type,
        )
    )
    size = len(data.batches[0])
    trainer_config = SAETrainerConfig(
        total_training_samples=n_steps * size,
        train_batch_size_samples=size,
        lr=lr,
        lr_end=lr / 10,
        lr_warm_up_steps=n_steps // 20,
        lr_decay_steps=n_steps // 5,
        device=DEVICE.type,
    )
    SAETrainer(trainer_config, sae, (scale * x for x in cycle(data.batches))).fit()
    return Trained(
        lambda x: sae.encode_with_hidden_pre(scale * x)[1],
        lambda code: sae.decode(code) / scale,
        float(sae.topk_threshold),
    )


def dictionary_learning(data: Data, config: SAEConfig, lr: float) -> Trained:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

    d_in, n_steps = data.held_out.shape[1], len(data.batches)
    trainer = BatchTopKTrainer(
        n_steps,
        d_in,
        d_in * config.sae_expansion,
        config.topk,
        0,
        "none",
        lr=lr,
        warmup_steps=n_steps // 20,
        decay_start=n_steps - n_steps // 5,
        threshold_start_step=n_steps // 2,
        threshold_beta=0.9,
        seed=0,
        device=DEVICE.type,
    )
    for step, x in enumerate(data.batches):
        trainer.update(step, x)
    ae = trainer.ae
    return Trained(lambda x: ae.encoder(x - ae.b_dec), ae.decode, float(ae.threshold))


def best(data: Data, train: Train, rates: list[float]) -> tuple[float, Trained]:
    """The learning rate with the least FVU on the calibration tokens at equal L0, and its SAE."""
    trained = {lr: train(lr) for lr in rates}

    def fvu(lr: float) -> float:
        threshold = threshold_for(trained[lr], data.calibration, TOPK)
        return figures(trained[lr], data.calibration, threshold).fvu

    lr = min(trained, key=fvu)
    return lr, trained[lr]


def table(data: Data, rates: list[float], expansion: int) -> Iterator[str]:
    """A line a contender: at its own threshold, and beside ours at the same L0."""
    config = SAEConfig(topk=TOPK, sae_expansion=expansion, n_batches_to_dead=STEPS_TO_DEAD)
    matryoshka = replace(config, sae_type="matryoshka_batch_topk")
    quarters = data._replace(batches=[part for x in data.batches for part in x.chunk(4)])
    in_quarters = replace(config, n_batches_to_dead=4 * STEPS_TO_DEAD)
    contenders: dict[str, Train] = {
        "ours": lambda lr: ours(data, config, lr, "auto"),
        "ours, compute_dtype float32": lambda lr: ours(data, config, lr, "float32"),
        "ours, matryoshka_batch_topk": lambda lr: ours(data, matryoshka, lr, "auto"),
        "ours, a quarter of the tokens a step": lambda lr: ours(quarters, in_quarters, lr, "auto"),
        "sae-lens": lambda lr: sae_lens(data, config, lr),
        "dictionary-learning": lambda lr: dictionary_learning(data, config, lr),
    }
    yield "| SAE | learning rate | FVU | L0 | dead | FVU of ours at this L0 | ours over it |"
    yield "|---" + "|--:" * 6 + "|"
    own: Trained | None = None
    for name, train in contenders.items():
        lr, sae = best(data, train, rates)
        own = own or sae
        found = figures(sae, data.held_out, sae.threshold)
        at_its_l0 = figures(own, data.held_out, threshold_for(own, data.held_out, found.l0)).fvu
        yield (
            f"| {name} | {lr:g} | {found.fvu:.4f} | {found.l0:.1f} | {found.dead:.1%} "
            f"| {at_its_l0:.4f} | {at_its_l0 / found.fvu:.3f} |"
        )
        if name == "dictionary-learning":
            l0 = figures(own, data.held_out, own.threshold).l0
            again = figures(sae, data.held_out, threshold_for(sae, data.held_out, l0))
            ratio = figures(own, data.held_out, own.threshold).fvu / again.fvu
            yield (
                f"| dictionary-learning, recalibrated to our L0 | {lr:g} | {again.fvu:.4f} "
                f"| {again.l0:.1f} | {again.dead:.1%} | {again.fvu * ratio:.4f} | {ratio:.3f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", type=Path, nargs="+", help="folders of a harvest")
    parser.add_argument("--hook", default="blocks.14.hook_resid_post")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--expansion", type=int, default=8)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 6e-3])
    options = parser.parse_args()
    keep_freed_memory()
    data = load(options.shards, Hook.parse(options.hook), options.epochs, 4096, 0)
    n_tokens = sum(map(len, data.batches))
    print(f"\nFVU on held-out tokens ({describe('sae-lens', 'dictionary-learning')})")
    print(
        f"{options.hook}, k {TOPK}, {n_tokens:,} tokens to train, {len(data.held_out):,} held out; "
        f"the best of the learning rates {', '.join(map(str, options.rates))}\n"
    )
    for line in table(data, options.rates, options.expansion):
        print(line, flush=True)


if __name__ == "__main__":
    main()
