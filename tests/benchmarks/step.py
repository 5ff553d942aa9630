"""Time of one training step: ours, sae-lens's and dictionary-learning's BatchTopK, interleaved.

Same batches and shapes for all; beside them the bare encoder product in float32, the one dense
product that an exact step cannot do without. Prints Markdown tables of medians, the first without
dead features, the second with a fifth of them dead. `make bench` runs it where the peers are.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle
from typing import NamedTuple

import torch
import torch.nn.functional as F
from machine import DEVICE, describe, wait
from torch import Tensor

from sae_core.activations.store import ActivationSource
from sae_core.models.language_model import Hook
from sae_core.sae.config import SAEConfig, SAEType
from sae_core.sae.kinds import build
from sae_core.sae.precision import pick_precision
from sae_core.sae.reconstruction import Compute
from sae_core.sae_base import SparseAutoencoder
from sae_core.train_config import TrainingConfig
from sae_core.trainer.training_inputs import sae_spec
from sae_core.training import Batch, Observer, Trainer
from sae_core.utils.devices import keep_freed_memory
from sae_core.utils.seeding import generator

LR = 1e-3
DEAD_SHARE = 0.2
N_BATCHES = 4
EARLY_STEPS = 30
OURS = {"float32", "auto"}


class Shape(NamedTuple):
    """What is trained."""

    d: int
    width: int
    k: int
    tokens: int


SHAPES = [
    Shape(d, width, k, tokens)
    for d, width, k in ((576, 9216, 64), (1024, 4096, 128), (512, 8192, 32))
    for tokens in (4096, 1024)
]

Step = Callable[[Tensor], object]


def batches(shape: Shape) -> list[Tensor]:
    """Positive combinations of 32 known directions a token, and noise, with E||x||^2 = 1."""
    draw = generator(0, "batches", shape)
    n_true = 2 * shape.width
    directions = F.normalize(torch.randn(n_true, shape.d, generator=draw), dim=1)
    size = (shape.tokens, 32)
    found = []
    for _ in range(N_BATCHES):
        which = torch.randint(n_true, size, generator=draw)
        strength = torch.rand(size, generator=draw)
        x = F.embedding_bag(which, directions, per_sample_weights=strength, mode="sum")
        x += 0.02 * torch.randn(x.shape, generator=draw)
        found.append((x / x.pow(2).sum(1).mean().sqrt()).to(DEVICE))
    return found


class NoSource(ActivationSource):
    """Batches are handed to the step."""

    def read(self, part: str, epoch: int, indices: Tensor) -> Tensor:
        raise NotImplementedError


def our_sae(shape: Shape, kind: SAEType = "batch_topk") -> SparseAutoencoder:
    """An SAE as the trainer begins with."""
    return copy.deepcopy(_initial(shape, kind))


@cache
def _initial(shape: Shape, kind: SAEType) -> SparseAutoencoder:
    config = SAEConfig(kind, topk=shape.k)
    spec = sae_spec(config, Hook(0, "hook_resid_post"), shape.d, DEVICE, {})
    spec.d_sae = shape.width
    sae = build(spec)
    sae.initialise(generator(0, "weights"))
    return sae.to(DEVICE)


def dead_features(shape: Shape) -> Tensor:
    """(F,) bool: which features are kept dead, none or every fifth."""
    return torch.arange(shape.width, device=DEVICE) % round(1 / DEAD_SHARE) == 0


def ours(shape: Shape, compute_dtype: str, dead: bool, kind: SAEType = "batch_topk") -> Step:
    """A step of the trainer."""
    sae = our_sae(shape, kind)
    if dead:
        sae.num_batches_not_active[dead_features(shape)] = 10**6
        sae.W_enc.data[:, dead_features(shape)] *= 0.1
    compute = Compute(precision=pick_precision(compute_dtype, DEVICE))
    trainer = Trainer(sae, NoSource(1, 0, 1, 1, 0), TrainingConfig(), Observer(), compute)
    return lambda x: trainer.step(Batch(x), LR)


def sae_lens(shape: Shape, dead: bool) -> Step:
    """What `SAETrainer` does in a step, without its bookkeeping."""
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    config = BatchTopKTrainingSAEConfig(
        d_in=shape.d, d_sae=shape.width, k=shape.k, device=DEVICE.type
    )
    sae = BatchTopKTrainingSAE(config)
    mask = dead_features(shape) & dead
    sae.W_enc.data[:, mask] *= 0.1
    adam = torch.optim.Adam(sae.parameters(), lr=LR)

    def step(x: Tensor) -> None:
        given = TrainStepInput(
            sae_in=x,
            dead_neuron_mask=mask,
            coefficients={},
            n_training_steps=1,
            is_logging_step=False,
        )
        sae.training_forward_pass(given).loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    return step


def dictionary_learning(shape: Shape, dead: bool) -> Step:
    """`BatchTopKTrainer.update`."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

    trainer = BatchTopKTrainer(
        10**6, shape.d, shape.width, shape.k, 0, "none", lr=LR, warmup_steps=1, device=DEVICE.type
    )
    if dead:
        mask = dead_features(shape)
        trainer.num_tokens_since_fired[mask] = 10**9
        trainer.ae.encoder.weight.data[mask] *= 0.1
    return lambda x: trainer.update(1, x)


def bare_product(shape: Shape) -> Step:
    W_enc = our_sae(shape).W_enc.detach()
    return lambda x: x @ W_enc


def contenders(shape: Shape, dead: bool) -> dict[str, Step]:
    return {
        "product": bare_product(shape),
        "float32": ours(shape, "float32", dead),
        "auto": ours(shape, "auto", dead),
        "sae-lens": sae_lens(shape, dead),
        "dictionary-learning": dictionary_learning(shape, dead),
    }


def measure(steps: dict[str, Step], shape: Shape, repeats: int) -> dict[str, float]:
    """Median milliseconds of each step, taken in turn.

    Ours are trained a little before: a step's time depends on how well the last one's threshold
    foretells the next one's, which changes fast in the first few steps alone.
    """
    data: Iterator[Tensor] = cycle(batches(shape))
    for _ in range(EARLY_STEPS):
        x = next(data)
        for name in OURS & set(steps):
            steps[name](x)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 2):
        x = next(data)
        for name, step in steps.items():
            wait()
            start = time.perf_counter()
            step(x)
            wait()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(taken[2:]) for name, taken in times.items()}


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 20 else f"{value:.2g}"


def table(repeats: int, dead: bool, shapes: list[Shape]) -> Iterator[str]:
    """Milliseconds, and how many times as long the peers take."""
    yield (
        "| d, F, k, N | product | ours, float32 | over the product | ours, auto "
        "| sae-lens | × float32 | × auto | dictionary-learning | × float32 | × auto |"
    )
    yield "|---" + "|--:" * 10 + "|"
    for shape in shapes:
        ms = measure(contenders(shape, dead), shape, repeats)
        cells = [
            f"{shape.d}, {shape.width:,}, {shape.k}, {shape.tokens:,}",
            _ms(ms["product"]),
            _ms(ms["float32"]),
            f"{ms['float32'] / ms['product']:.2f}",
            _ms(ms["auto"]),
        ]
        for peer in ("sae-lens", "dictionary-learning"):
            ratios = [f"{ms[peer] / ms[own]:.1f}" for own in ("float32", "auto")]
            cells += [_ms(ms[peer]), *ratios]
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--first", type=int, default=len(SHAPES), help="shapes to measure")
    options = parser.parse_args()
    keep_freed_memory()
    print(f"A training step, milliseconds ({describe('sae-lens', 'dictionary-learning')})")
    for dead in (False, True):
        print(f"\n{'A fifth' if dead else 'None'} of the features dead\n")
        for row in table(options.repeats, dead, SHAPES[: options.first]):
            print(row, flush=True)


if __name__ == "__main__":
    main()
