"""Feature absorption: a feature for words that begin with a letter is silent on some of these,
because features of the words themselves have taken over its direction.

As in Chanin et al. (arXiv 2409.14507) and SAEBench (arXiv 2503.09532), for each letter:

* A linear probe tells words with the letter from others by their activations x; p is its unit
  direction. A letter counts if the probe's F1 score on test words is above `LEAST_F1`.
* The main features are the best k for the letter, by correlation. k grows from 1 while the F1 score
  of a probe that reads them rises by more than `F1_JUMP`; more than one is feature splitting.
* On test words with the letter that the dense probe gets right, feature f with activation a_f
  contributes a_f (W_dec[f] . p) to the projection P = x . p. M is what the main features
  contribute. A is the sum of the `N_ABSORBERS` largest positive contributions of other features
  whose decoder rows have a cosine with p of at least `FRACTION_COSINE`.
* A word's absorbed fraction is 0 if P <= 0, M >= P or A < `SHARE` P. Otherwise it is 1 if M <= 0,
  and A' / (A' + M) with A' = min(A, P - M) if not.
* A word is fully absorbed if no main feature is active, and the feature that contributes most
  contributes at least `SHARE` P > 0 and has a cosine with p of at least `FULL_COSINE`.

A letter's figures are means over these words, an SAE's are means over the letters that count.
SAEBench trains the dense probe with Adam, and ranks features by the weights of a probe with an L1
penalty.

Shapes: W words, n of them, D width, F features.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from sae_core.evaluation.first_letters import LETTERS, read_words, vocabulary_words
from sae_core.evaluation.probes import fit_probe
from sae_core.evaluation.window_means import Samples
from sae_core.models.language_model import LanguageModel
from sae_core.sae.precision import Precision
from sae_core.sae_base import SparseAutoencoder
from sae_core.train_config import BatchSize

FEWEST = 12
"""Words that a letter must have."""

LEAST_F1 = 0.6
"""F1 score of the dense probe from which on a letter counts."""

F1_JUMP = 0.03

MOST_MAIN = 10
"""Main features of a letter, at most."""

N_ABSORBERS = 3

SHARE = 0.4

FRACTION_COSINE, FULL_COSINE = 0.1, 0.025

Array = NDArray[Any]


class Absorbed(NamedTuple):
    """How far single words are absorbed."""

    fraction: Array
    """(n,) between 0 and 1."""
    full: Array
    """(n,) bool."""


def first_letter_absorption(
    model: LanguageModel,
    sae: SparseAutoencoder,
    most: int,
    bos: int | None,
    batch_size: BatchSize,
    precision: Precision,
    seed: int,
) -> dict[str, Any] | None:
    """`absorption` on words of the model's vocabulary; None for a transcoder, whose decoder writes
    elsewhere than where the probe reads.

    Args:
        most: words that are read; 0 for none.
        bos: the token that texts begin with, if any.
        seed: of the words' order, which decides which of them test.
    """
    words = vocabulary_words(model.tokenizer, most, seed)
    if not words or sae.spec.target_hook_name:
        return None
    return absorption(read_words(model, sae, words, bos, batch_size, precision), sae.W_dec)


def absorption(samples: Samples, W_dec: Tensor) -> dict[str, Any] | None:
    """The figures of this module as JSON values; None if no letter counts.

    Args:
        samples: words; the class is the letter.
        W_dec: (F, D)
    """
    counts = np.bincount(samples.subject, minlength=len(LETTERS))
    chosen = [letter for letter, count in enumerate(counts) if count >= FEWEST]
    if len(chosen) < 2:
        return None
    train, test = samples.split(chosen)
    rows = W_dec.detach().float().cpu().numpy()
    found = {LETTERS[letter]: _letter(train, test, rows, letter) for letter in chosen}
    letters = {letter: of for letter, of in found.items() if of is not None}
    if not letters:
        return None
    keys = ("fraction", "full", "n_features")
    return {
        "n_train": len(train.subject),
        "n_test": len(test.subject),
        "mean": {key: float(np.mean([of[key] for of in letters.values()])) for key in keys},
        "letters": letters,
    }


def _letter(train: Samples, test: Samples, W_dec: Array, letter: int) -> dict[str, Any] | None:
    """The figures of one letter; None if its dense probe is not good enough."""
    own, tested = train.subject == letter, test.subject == letter
    probe, scale = dense_probe(train.x, own)
    predicted = probe.predict(test.x / scale)
    f1 = float(f1_score(tested, predicted))
    if f1 <= LEAST_F1:
        return None
    main = main_features(train, test, letter)
    right = tested & predicted
    words = absorbed(test.x[right], test.code[right].toarray(), W_dec, probe[-1].coef_[0], main)
    return {
        "f1": f1,
        "n_words": int(right.sum()),
        "features": main,
        "n_features": len(main),
        "fraction": float(words.fraction.mean()),
        "full": float(words.full.mean()),
    }


def dense_probe(x: Array, own: Array) -> tuple[Pipeline, float]:
    """A probe on activations (W, D) divided by a number, and that number: with one for each column
    its direction would lean towards columns that hardly vary."""
    scale = float(x.std(axis=0).mean())
    probe = make_pipeline(
        StandardScaler(with_std=False), LogisticRegression(class_weight="balanced", max_iter=1000)
    )
    return probe.fit(x / scale, own), scale


def main_features(train: Samples, test: Samples, letter: int) -> list[int]:
    """The features that together tell words with a letter from others."""
    own, tested = train.subject == letter, test.subject == letter
    best = np.argsort(-_correlation(train.code, own), kind="stable")[:MOST_MAIN].tolist()
    main: list[int] = []
    reached = -np.inf
    for k in range(1, len(best) + 1):
        probe = fit_probe(train.code[:, best[:k]].toarray(), own)
        f1 = f1_score(tested, probe.predict(test.code[:, best[:k]].toarray()))
        if f1 <= reached + F1_JUMP:
            break
        main, reached = best[:k], f1
    return main


def absorbed(x: Array, code: Array, W_dec: Array, direction: Array, main: list[int]) -> Absorbed:
    """How far each of n words is absorbed.

    Args:
        x: (n, D) activations.
        code: (n, F)
        W_dec: (F, D)
        direction: (D,) the dense probe's, of any length.
        main: the main features.
    """
    p = direction / np.linalg.norm(direction)
    along = W_dec @ p
    cosine = along / np.linalg.norm(W_dec, axis=1).clip(min=1e-12)
    parts, whole = code * along, x @ p
    own = parts[:, main].sum(1)
    others = np.where(cosine >= FRACTION_COSINE, parts, 0).clip(min=0)
    others[:, main] = 0
    n = min(N_ABSORBERS, others.shape[1])
    taken = np.partition(others, -n, axis=1)[:, -n:].sum(1)
    missing = np.minimum(taken, whole - own)
    with np.errstate(divide="ignore", invalid="ignore"):
        shared = np.where(own <= 0, 1.0, missing / (missing + own))
    none = (whole <= 0) | (own >= whole) | (taken < SHARE * whole)
    fraction = np.where(none, 0.0, shared)
    strongest = parts.argmax(1)
    most = parts[np.arange(len(x)), strongest]
    full = (code[:, main] == 0).all(1) & (cosine[strongest] >= FULL_COSINE)
    full &= (whole > 0) & (most >= SHARE * whole)
    return Absorbed(fraction.clip(0, 1), full)


def _correlation(code: sparse.csc_array, own: Array) -> Array:
    """(F,) the correlation of each feature with being of a class; 0 for one that is constant."""
    n = len(own)
    mean = np.asarray(code.mean(axis=0)).ravel()
    square = np.asarray(code.multiply(code).mean(axis=0)).ravel()
    spread = np.sqrt((square - mean**2).clip(min=0))
    share = own.mean()
    both = np.asarray(code[own].sum(axis=0)).ravel() / n
    scale = spread * np.sqrt(share * (1 - share))
    return np.divide(both - share * mean, scale, out=np.zeros_like(mean), where=scale > 1e-9)
