"""Probes on activations whose directions and subjects are planted."""

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor

from sae_core.evaluation.probes import probe_subjects
from sae_core.evaluation.window_means import Samples, WindowMeans
from sae_core.sae import sparse_ops

SUBJECTS = ["physics", "chemistry", "biology"]
N, D, F = 60, 24, 40
"""Windows per subject, width, features."""


@pytest.fixture(scope="module")
def W_dec() -> Tensor:
    return torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0)))[0][
        torch.arange(F) % D
    ]


@pytest.fixture(scope="module")
def planted(W_dec: Tensor) -> Samples:
    """Feature i is a little more active on subject i; all others know nothing."""
    draw = np.random.default_rng(0)
    subject = np.repeat(np.arange(3), N)
    code = draw.random((3 * N, F)) * (draw.random((3 * N, F)) < 0.3)
    code[:, :3] = 0.1 * draw.random((3 * N, 3)) + 3 * np.eye(3)[subject]
    x = code @ W_dec.double().numpy() + 0.01 * draw.standard_normal((3 * N, D))
    return Samples(x, sparse.csc_array(code), subject)


def test_one_feature_per_subject_is_found(planted: Samples, W_dec: Tensor) -> None:
    found = probe_subjects(planted, SUBJECTS, W_dec, seed=0)
    assert found is not None and (found["n_train"], found["n_test"]) == (135, 45)
    for index, subject in enumerate(SUBJECTS):
        figures = found["subjects"][subject]
        assert figures["features"][0] == index
        assert figures["dense"] == figures["sae"]["1"] == 1
        assert 0.3 < figures["random"]["1"] < 0.8
    assert found["mean"]["sae"] == dict.fromkeys(("1", "2", "5", "20"), 1.0)


def test_zeroing_a_subject_blinds_its_own_probe(planted: Samples, W_dec: Tensor) -> None:
    """Half is what a probe can lose: it then calls every window another subject."""
    found = probe_subjects(planted, SUBJECTS, W_dec, seed=0)
    assert found is not None
    assert found["mean"]["perturbation"]["5"] == pytest.approx(0.5, abs=0.05)


def test_a_code_that_knows_nothing_tells_nothing(planted: Samples, W_dec: Tensor) -> None:
    blind = planted._replace(code=planted.code[np.random.default_rng(1).permutation(3 * N)])
    found = probe_subjects(blind, SUBJECTS, None, seed=0)
    assert found is not None and abs(found["mean"]["sae"]["5"] - 0.5) < 0.15
    assert "perturbation" not in found["mean"]


def test_the_seed_draws_the_random_features(planted: Samples, W_dec: Tensor) -> None:
    first, again, other = (probe_subjects(planted, SUBJECTS, None, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_one_subject_has_no_probe(planted: Samples) -> None:
    alone = planted._replace(subject=np.zeros_like(planted.subject))
    assert probe_subjects(alone, SUBJECTS, None, seed=0) is None


def test_means_are_over_the_counted_tokens_of_windows_of_one_subject() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, D, generator=draw)
    dense = torch.rand(24, F, generator=draw) * (torch.rand(24, F, generator=draw) < 0.2)
    counted = torch.rand(4, 6, generator=draw) < 0.7
    counted[3] = False
    subject = torch.tensor([0, 1, 1, 0])[:, None].expand(4, 6).clone()
    subject[1, 5] = 2
    means = WindowMeans()
    means.add(x, sparse_ops.sparse([dense]), counted, subject)
    samples = means.samples()
    assert samples is not None and WindowMeans().samples() is None
    assert samples.subject.tolist() == [0, 1]
    for row, window in enumerate((0, 2)):
        at = counted[window]
        torch.testing.assert_close(torch.tensor(samples.x[row]), x[window][at].mean(0))
        expected = dense.view(4, 6, F)[window][at].mean(0)
        got = samples.code.toarray()[row]
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-7)
