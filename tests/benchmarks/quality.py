"""FVU of BatchTopK SAEs on the same activations: ours, sae-lens's and dictionary-learning's.

All see the same tokens in the same order, centred and scaled, without outliers, with a warm-up and
a decay over the last fifth; each is trained at several step sizes, and at several learning rates
for each of these. FVU is pooled over held-out tokens, at the threshold that gives them an L0 of k;
the learning rate is chosen by other held-out tokens. Run where the peers are, on the shards of a
harvest: `make bench`. The whole grid takes hours on two cores: the options restrict it. What has
been found before with the same settings, data and code is not trained again.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import our_training
import peer_training
import peer_windows
from machine import DEVICE, describe
from our_training import OURS, Harvest, Own, in_steps
from recipe_tables import contenders_table
from sae_figures import Data, Trained, at_l0, at_threshold
from trial_records import RECORDS, Figures, Record, Records, Settings

from sae_core.utils.code_hash import code_hash
from sae_core.utils.devices import keep_freed_memory

BENCHMARKS = "tests/benchmarks"
WINDOWS = f"{BENCHMARKS}/peer_windows.py"

Train = Callable[[Data, int, int, float, int], Trained]
"""From data, features, k, learning rate and seed."""


def _peer(package: str, *more: str) -> str:
    files = (f"{BENCHMARKS}/peer_training.py", f"{BENCHMARKS}/sae_figures.py", *more)
    return f"{describe(package).split(', ')[-1]}, {code_hash(*files)}"


def _own(sae_type: str) -> str:
    files = (f"{BENCHMARKS}/our_training.py", f"{BENCHMARKS}/sae_figures.py")
    return code_hash(*files, sae_type=sae_type)


@dataclass(frozen=True)
class Contender:
    """A way to train an SAE."""

    train: Train
    code: Callable[[], str]
    """What stands for its code."""


def _ours(own: Own) -> Contender:
    return Contender(partial(our_training.train, own=own), partial(_own, own.sae_type))


CONTENDERS: dict[str, Contender] = {
    **{name: _ours(own) for name, own in OURS.items()},
    "sae-lens": Contender(peer_training.sae_lens, partial(_peer, "sae-lens")),
    "dictionary-learning": Contender(
        peer_training.dictionary_learning, partial(_peer, "dictionary-learning")
    ),
    "sae-lens, early auxiliary loss": Contender(
        peer_windows.sae_lens, partial(_peer, "sae-lens", WINDOWS)
    ),
    "dictionary-learning, early auxiliary loss": Contender(
        peer_windows.dictionary_learning, partial(_peer, "dictionary-learning", WINDOWS)
    ),
}


def measure(sae: Trained, data: Data, k: int, seconds: float) -> Figures:
    """All figures of a trained SAE."""
    found, own = at_l0(sae, data.held_out, k), at_threshold(sae, data.held_out, sae.threshold)
    chosen_by = at_l0(sae, data.calibration, k).fvu
    return Figures(found.fvu, found.dead, own.fvu, own.l0, chosen_by, round(seconds, 1))


class Bench:
    """Trains what is not among the records.

    Args:
        shards: folders of a harvest.
    """

    def __init__(self, shards: tuple[Path, ...], records: Records) -> None:
        self.shards, self.records = shards, records
        self._loaded: tuple[tuple[str, int, int], Data] | None = None

    def record(self, settings: Settings) -> Record:
        """The training with these settings, done now if it has to be."""
        contender = CONTENDERS[settings.contender]
        code = contender.code()
        if found := self.records.find(settings, code):
            return found
        data = in_steps(self._data(settings), settings.tokens_per_step)
        start = time.process_time()
        sae = contender.train(data, settings.features, settings.k, settings.lr, settings.seed)
        figures = measure(sae, data, settings.k, time.process_time() - start)
        record = Record(settings, figures, code, describe())
        self.records.add(record)
        return record

    def _data(self, settings: Settings) -> Data:
        key = settings.hook, settings.tokens, settings.seed
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # two at once may be more than the memory holds
            harvest = Harvest(self.shards, settings.hook)
            self._loaded = key, harvest.load(settings.tokens, settings.seed)
        return self._loaded[1]


def grid(options: argparse.Namespace) -> Iterator[Settings]:
    """Every training that the options ask for; those on the same data follow each other."""
    pairs = list(product(options.tokens_per_step, options.rates))
    for hook, seed, features, k, contender in product(
        options.hooks, options.seeds, options.features, options.topks, options.contenders
    ):
        harvest = Harvest(tuple(options.shards), hook)
        rest = options.tokens, harvest.identity, our_training.TOKENS_TO_DEAD
        wanted = list(pairs)
        if options.auto and contender in OURS:
            own = OURS[contender]
            sizes = harvest.d_in, features, k, options.tokens
            wanted.append(our_training.automatic(own, *sizes))
        for size, lr in dict.fromkeys(wanted):
            yield Settings(contender, hook, k, features, size, lr, seed, *rest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", type=Path, nargs="+", help="folders of a harvest")
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in (9, 14)]
    parser.add_argument("--hooks", nargs="+", default=hooks)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--features", type=int, nargs="+", default=[4608, 9216])
    parser.add_argument("--topks", type=int, nargs="+", default=[16, 32, 64])
    sizes = [128, 256, 512, 1024, 2048, 4096]
    parser.add_argument("--tokens-per-step", type=int, nargs="*", choices=sizes, default=sizes[2:])
    parser.add_argument("--rates", type=float, nargs="*", default=[1.5e-3, 3e-3, 6e-3, 1.2e-2])
    parser.add_argument("--auto", action="store_true", help="ours also as `auto` has both")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--tokens", type=int, default=900_000, help="to train, about")
    parser.add_argument("--records", type=Path, default=RECORDS, help="what has been found")
    options = parser.parse_args()
    keep_freed_memory()
    bench = Bench(tuple(options.shards), Records(options.records))
    found = [bench.record(settings) for settings in grid(options)]
    print(f"\nFVU on held-out tokens ({describe('sae-lens', 'dictionary-learning')}, {DEVICE})\n")
    print(contenders_table(found))


if __name__ == "__main__":
    main()
