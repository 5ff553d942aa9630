"""Our sparse probing and absorption against sae-bench's on the same tensors, in its environment:
`make test-interop`.

What differs by design is left out: sae-bench draws as many windows of other classes as a class has,
where we weigh the classes, so there are two classes of one size; and it trains the first-letter
probe in another way, so both get one direction. Its evaluations as a whole download data sets."""

import json
import os
import subprocess
from typing import NamedTuple

import numpy as np
import pytest
import torch
from running import ROOT
from safetensors.torch import load_file, save_file
from scipy import sparse

from sae_core.evaluation.absorption import absorbed
from sae_core.evaluation.probes import probe_subjects
from sae_core.evaluation.window_means import Samples

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("interop-probes")]

TOLERANCE = 0.02
TIMEOUT = 300
N, D, F = 2000, 24, 60
"""Windows of each class, width, features."""
MAIN = [2, 7]


def windows() -> Samples:
    """Two classes that overlap: the larger f, the less feature f tells them apart."""
    draw = np.random.default_rng(0)
    subject = np.tile([0, 1], N)
    code = draw.exponential(size=(2 * N, F)) * (draw.random((2 * N, F)) < 0.4)
    code += draw.random((2 * N, F)) * (subject == 0)[:, None] / (1 + np.arange(F) / 4)
    x = code @ draw.standard_normal((F, D)) / 4 + draw.standard_normal((2 * N, D))
    x[subject == 0] += 0.3
    return Samples(x.astype(np.float32), sparse.csc_array(code), subject)


def words() -> dict[str, torch.Tensor]:
    """Words that are partly absorbed, and unit decoder rows."""
    draw = torch.Generator().manual_seed(2)
    W_dec = torch.nn.functional.normalize(torch.randn(15, 6, generator=draw), dim=1)
    code = torch.rand(400, 15, generator=draw) * (torch.rand(400, 15, generator=draw) < 0.3)
    x = code @ W_dec + 0.1 * torch.randn(400, 6, generator=draw)
    p = torch.nn.functional.normalize(W_dec[MAIN].sum(0) + torch.randn(6, generator=draw), dim=0)
    return {"x": x, "code": code, "W_dec": W_dec, "p": p, "main": torch.tensor(MAIN)}


class Theirs(NamedTuple):
    accuracy: dict[str, float]
    absorbed: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    folder = tmp_path_factory.mktemp("probes")
    parts = dict(zip(("train", "test"), windows().split([0, 1]), strict=True))
    tensors = {
        f"{part}.{name}": torch.from_numpy(np.ascontiguousarray(value))
        for part, of in parts.items()
        for name, value in (
            ("x", of.x),
            ("code", of.code.toarray().astype(np.float32)),
            ("subject", of.subject),
        )
    }
    save_file(tensors, folder / "probes.safetensors")
    save_file(words(), folder / "words.safetensors")
    script = ROOT / "tests/tools/peer_probes.py"
    done = subprocess.run(
        [os.environ["PEERS"], str(script), str(folder)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    accuracy = json.loads((folder / "theirs.json").read_text())
    return Theirs(accuracy, load_file(folder / "absorbed.safetensors"))


def test_sparse_probing_agrees(theirs: Theirs) -> None:
    ours = probe_subjects(windows(), ["a", "b"], None, seed=0)
    assert ours is not None
    found = {"dense": ours["mean"]["dense"], **ours["mean"]["sae"]}
    assert found == pytest.approx(theirs.accuracy, rel=TOLERANCE)
    assert 0.55 < found["1"] < found["20"] < 0.95, "neither chance nor perfect"


def test_absorption_agrees(theirs: Theirs) -> None:
    given = {name: value.double().numpy() for name, value in words().items()}
    ours = absorbed(given["x"], given["code"], given["W_dec"], given["p"], MAIN)
    np.testing.assert_allclose(ours.fraction, theirs.absorbed["fraction"], atol=1e-4)
    assert np.array_equal(ours.full, theirs.absorbed["full"].bool())
    assert ours.full.sum() > 20 and ((ours.fraction > 0) & (ours.fraction < 1)).sum() > 20
