"""Linear probes for the subjects of the texts: can a few features tell what a window is about?

SAEBench (Karvonen et al., arXiv 2503.09532) takes labelled data sets; here the classes are the
subjects, and a sample is a window of one subject, as the mean over its tokens of the activation
(dense) or of the code (sparse). A probe is a logistic regression that tells one subject from all
others, on standardised columns, with balanced class weights; its figure is the balanced accuracy,
0.5 by chance. Of every subject, the first three quarters of the windows train it, the last test it.

Sparse probing (section 4.1): the k features whose mean differs most between the subject and the
others, against all D dense columns and against k random active features.

Targeted probe perturbation (section 4.1; Marks et al., arXiv 2403.19647): zeroing a subject's n
features, those with the largest

    max(0, mean of f on the subject - mean of f on the others) * (W_dec[f] . w),   w the weights,

takes mean_f * W_dec[f] out of a window's mean activation. The figure is how much accuracy that
subject's dense probe loses, less the mean of what the other probes lose: 0.5 at best.

Shapes: W windows, D width, F features, S subjects.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from sae_core.evaluation.window_means import Samples

PROBED = (1, 2, 5, 20)
"""Features that a sparse probe reads."""

ABLATED = (5, 20, 100)
"""Features that a perturbation zeroes."""

FEWEST = 8
"""Windows that a subject must have; with fewer it gets no probe."""

DRAWS = 5
"""Sets of random features, whose mean accuracy is given."""

Array = NDArray[Any]


def probe_subjects(
    samples: Samples, subjects: list[str], W_dec: Tensor | None, seed: int
) -> dict[str, Any] | None:
    """The figures of this module as JSON values; None if fewer than two subjects have windows.

    Args:
        subjects: names, by index.
        W_dec: (F, D), or None to leave the perturbation out: a transcoder writes elsewhere.
        seed: of the random features.
    """
    chosen = [i for i in range(len(subjects)) if (samples.subject == i).sum() >= FEWEST]
    if len(chosen) < 2:
        return None
    train, test = samples.split(chosen)
    rng = np.random.default_rng(seed)
    dense = {i: fit_probe(train.x, train.subject == i) for i in chosen}
    clean = {i: _accuracy(dense[i], test.x, test.subject == i) for i in chosen}
    found: dict[str, Any] = {}
    for i in chosen:
        found[subjects[i]] = {"dense": clean[i], **_sparse_probes(train, test, i, rng)}
        if W_dec is not None:
            rows = W_dec.float().cpu().numpy()
            found[subjects[i]]["perturbation"] = {
                str(n): _perturbation(train, test, rows, dense, clean, i, n) for n in ABLATED
            }
    return {
        "n_train": len(train.subject),
        "n_test": len(test.subject),
        "mean": _mean([{k: v for k, v in of.items() if k != "features"} for of in found.values()]),
        "subjects": found,
    }


def _sparse_probes(
    train: Samples, test: Samples, index: int, rng: np.random.Generator
) -> dict[str, Any]:
    """The accuracies of one subject's sparse probes, and the features that they read."""
    own = train.subject == index
    best = np.argsort(-np.abs(_difference(train.code, own)), kind="stable")
    active = np.flatnonzero(train.code.sum(axis=0))

    def accuracy(columns: Array) -> float:
        probe = fit_probe(train.code[:, columns].toarray(), own)
        return _accuracy(probe, test.code[:, columns].toarray(), test.subject == index)

    def at_random(k: int) -> float:
        draws = [rng.choice(active, min(k, len(active)), replace=False) for _ in range(DRAWS)]
        return float(np.mean([accuracy(draw) for draw in draws]))

    return {
        "sae": {str(k): accuracy(best[:k]) for k in PROBED},
        "random": {str(k): at_random(k) for k in PROBED},
        "features": [int(feature) for feature in best[: max(PROBED)]],
    }


def _perturbation(
    train: Samples,
    test: Samples,
    W_dec: Array,
    probes: dict[int, Pipeline],
    clean: dict[int, float],
    index: int,
    n: int,
) -> float:
    """What the subject's own probe loses when its n features are zeroed, less what others lose."""
    scaler, regression = probes[index][0], probes[index][-1]
    weights = regression.coef_[0] / scaler.scale_
    more = _difference(train.code, train.subject == index).clip(min=0)
    effect = more * (W_dec @ weights)
    zeroed = np.argsort(-effect, kind="stable")[:n]
    zeroed = zeroed[effect[zeroed] > 0]
    x = test.x - test.code[:, zeroed] @ W_dec[zeroed]
    lost = {i: clean[i] - _accuracy(probe, x, test.subject == i) for i, probe in probes.items()}
    own = lost.pop(index)
    return own - float(np.mean(list(lost.values())))


def _difference(code: sparse.csc_array, own: Array) -> Array:
    """(F,) the mean of every feature on a subject's windows, less its mean on the others."""
    means = (np.asarray(code[at].mean(axis=0)).ravel() for at in (own, ~own))
    return next(means) - next(means)


def fit_probe(x: Array, own: Array) -> Pipeline:
    """A probe that tells samples (W, D) of a class, where `own` (W,) is true, from the others."""
    probe = make_pipeline(
        StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000)
    )
    return probe.fit(x, own)


def _accuracy(probe: Pipeline, x: Array, own: Array) -> float:
    return float(balanced_accuracy_score(own, probe.predict(x)))


def _mean(figures: Sequence[Any]) -> Any:
    """The mean of equal structures of numbers."""
    if isinstance(figures[0], dict):
        return {key: _mean([of[key] for of in figures]) for key in figures[0]}
    return float(np.mean(figures))
