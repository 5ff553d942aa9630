"""Absorption where it is planted, and the words that it is measured on."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from synthetic import random_sae

from sae_core.evaluation.absorption import absorbed, absorption, first_letter_absorption
from sae_core.evaluation.first_letters import CONTEXT, LETTERS, read_words, vocabulary_words
from sae_core.evaluation.window_means import Samples
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.sae.precision import Precision
from sae_core.sae_base import SparseAutoencoder

N_LETTERS, EACH, STRENGTH = 5, 40, 8.0
N = N_LETTERS * EACH
D = N_LETTERS + 20
FLOAT32 = Precision(torch.float32, torch.float32)

letter = np.repeat(np.arange(N_LETTERS), EACH)
IS_TEST = np.arange(N) % EACH >= 0.75 * EACH
"""The last quarter of a letter's words."""


def planted(main: Any, other: Any) -> tuple[Samples, torch.Tensor]:
    """Words along their letter's direction, and the code of it: on each word feature L of its
    letter L has the share `main`, and a feature of the word alone the share `other`."""
    x = 0.01 * np.random.default_rng(0).standard_normal((N, D))
    x[np.arange(N), letter] += STRENGTH
    code = np.zeros((N, N_LETTERS + N))
    code[np.arange(N), letter] = STRENGTH * main
    code[np.arange(N), N_LETTERS + np.arange(N)] = STRENGTH * other
    W_dec = np.eye(D)[np.concatenate([np.arange(N_LETTERS), letter])]
    return Samples(x, sparse.csc_array(code), letter), torch.from_numpy(W_dec)


def test_the_known_share_of_words_is_absorbed() -> None:
    is_absorbed = np.random.default_rng(1).random(N) < 0.3
    found = absorption(*planted(~is_absorbed, is_absorbed))
    assert found is not None and found["n_test"] == IS_TEST.sum()
    shares = [is_absorbed[IS_TEST & (letter == i)].mean() for i in range(N_LETTERS)]
    assert 0 < min(shares) < max(shares) < 1
    for i, share in enumerate(shares):
        of = found["letters"][LETTERS[i]]
        assert of["features"] == [i] and of["n_words"] == EACH / 4 and of["f1"] == 1
        assert of["fraction"] == of["full"] == pytest.approx(share)
    assert found["mean"]["fraction"] == pytest.approx(np.mean(shares))


@pytest.mark.parametrize("share", [0, 0.25, 0.75])
def test_words_are_absorbed_in_part(share: float) -> None:
    """Less than 0.4 of the projection is no absorption, and with the letter's feature active none
    is full."""
    found = absorption(*planted(1 - share, share))
    assert found is not None
    expected = share if share >= 0.4 else 0
    mean = {"fraction": expected, "full": 0, "n_features": 1}
    assert found["mean"] == pytest.approx(mean, abs=0.01)


def test_a_letter_s_feature_that_is_split_in_two_is_not_absorbed() -> None:
    samples, W_dec = planted(1, 0)
    code = samples.code.toarray()
    code[::2, N_LETTERS : 2 * N_LETTERS] = code[::2, :N_LETTERS]
    code[::2, :N_LETTERS] = 0
    rows = W_dec.clone()
    rows[N_LETTERS : 2 * N_LETTERS] = W_dec[:N_LETTERS]
    found = absorption(samples._replace(code=sparse.csc_array(code)), rows)
    assert found is not None
    assert found["mean"] == {"fraction": 0, "full": 0, "n_features": 2}


def test_activations_without_letters_have_no_figures() -> None:
    samples, W_dec = planted(1, 0)
    mixed = samples._replace(subject=np.random.default_rng(0).permutation(letter))
    assert absorption(mixed, W_dec) is None
    few = Samples(samples.x[:11], samples.code[:11], letter[:11])
    assert absorption(few, W_dec) is None


def by_definition(
    x: np.ndarray, a: np.ndarray, W_dec: np.ndarray, p: np.ndarray, main: list[int]
) -> tuple[float, bool]:
    """The fraction and whether it is full, of one word and a p of length 1."""
    cosine = [float(row @ p / np.linalg.norm(row)) for row in W_dec]
    part = [float(a_f * (row @ p)) for a_f, row in zip(a, W_dec, strict=True)]
    P, M = float(x @ p), sum(part[f] for f in main)
    others = [part[f] for f in range(len(part)) if f not in main and cosine[f] >= 0.1]
    A = sum(sorted(o for o in others if o > 0)[-3:])
    if P <= 0 or P <= M or A < 0.4 * P:
        fraction = 0.0
    elif M <= 0:
        fraction = 1.0
    else:
        fraction = min(A, P - M) / (min(A, P - M) + M)
    best = max(range(len(part)), key=part.__getitem__)
    silent = all(a[f] == 0 for f in main)
    return fraction, silent and P > 0 and part[best] >= 0.4 * P and cosine[best] >= 0.025


def test_words_are_absorbed_by_the_definition() -> None:
    draw = np.random.default_rng(0)
    n, d, f = 400, 6, 15
    W_dec = draw.standard_normal((f, d))
    code = draw.random((n, f)) * (draw.random((n, f)) < 0.3)
    x = code @ W_dec + 0.3 * draw.standard_normal((n, d))
    p, main = draw.standard_normal(d), [2, 7]
    found = absorbed(x, code, W_dec, p, main)
    unit = p / np.linalg.norm(p)
    expected = [by_definition(x[i], code[i], W_dec, unit, main) for i in range(n)]
    fraction, full = (np.array(column) for column in zip(*expected, strict=True))
    np.testing.assert_allclose(found.fraction, fraction, atol=1e-9)
    assert np.array_equal(found.full, full)
    assert full.sum() > 20 and ((fraction > 0) & (fraction < 1)).sum() > 20


def vocabulary(*names: str) -> Any:
    return SimpleNamespace(get_vocab=lambda: {name: i for i, name in enumerate(names)})


def test_a_word_of_the_vocabulary_counts_once() -> None:
    names = ("a", "Ġcat", "cat", "ĠCat", "▁dog", "riVer", "it's", "##s", "x1", "é", "ĠĠab", "<cd>")
    assert vocabulary_words(vocabulary(*names), 260, 0) == {"cat": 1, "dog": 4}


def test_words_are_spread_over_the_vocabulary_in_random_order() -> None:
    names = [f"a{x}{y}" for x in LETTERS for y in LETTERS] + ["bee"]
    words = vocabulary_words(vocabulary(*names), 26 * 5, 0)
    assert sorted(words.values()) == [0, 169, 338, 506, 675, 676]
    other = vocabulary_words(vocabulary(*names), 26 * 5, 1)
    assert list(other) != list(words) and other == words
    assert not vocabulary_words(vocabulary(*names), 0, 0)


def a_sae(language_model: LanguageModel, **changes: Any) -> SparseAutoencoder:
    changes = {"d_in": language_model.d_model, "d_sae": 64, "hook_layer": 2} | changes
    return random_sae("topk", torch.float32, **changes)


def test_words_are_read_after_the_example(language_model: LanguageModel) -> None:
    sae, bos = a_sae(language_model), 7
    words = dict(zip(("th", "of", "in"), (300, 310, 320), strict=True))
    samples = read_words(language_model, sae, words, bos, 2, FLOAT32)
    assert samples.subject.tolist() == [19, 14, 8]
    hook = Hook(2, "hook_resid_post")
    context = language_model.tokenizer(CONTEXT)["input_ids"]
    for row, token in enumerate(words.values()):
        tokens = torch.tensor([[bos, *context, token]])
        x = language_model.activations(tokens, [hook])[hook][0, -1].float()
        np.testing.assert_allclose(samples.x[row], x, rtol=1e-4, atol=1e-5)
        code = sae.encode(x).detach()
        assert 0 < (code > 0).sum() < 64
        np.testing.assert_allclose(samples.code[[row]].toarray()[0], code, rtol=1e-3, atol=1e-4)


def test_what_has_no_absorption(language_model: LanguageModel) -> None:
    """No words, a transcoder, and a random model that knows no letters."""
    measured = partial(first_letter_absorption, language_model)
    rest = (None, 2, FLOAT32, 0)
    sae = a_sae(language_model)
    assert measured(sae, 0, *rest) is None and measured(sae, 2000, *rest) is None
    assert measured(a_sae(language_model, target_hook_name="hook_mlp_out"), 2000, *rest) is None
