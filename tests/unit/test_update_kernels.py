"""The kernels that move the weights, in Triton's interpreter, and their twins in PyTorch: against
the formulas in float64."""

import pytest
import torch
import torch.nn.functional as F
from synthetic import normal
from torch import Tensor

from sae_core.sae.static import backend
from sae_core.sae.static.backend import TWIN, Backend
from sae_core.sae.static.moments import RULES, Moments

D, FEATURES = 12, 40
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=[backend.kernels(), TWIN], ids=["kernels", "twin"])
def ops(request: pytest.FixtureRequest) -> Backend:
    return request.param


def adam_state() -> tuple[list[Tensor], list[Moments]]:
    """Unit decoder rows, encoder rows, gradients of both, and their moments."""
    W_dec = F.normalize(normal(FEATURES, D, seed=8), dim=1).float()
    W_enc, g_dec, g_enc = (normal(FEATURES, D, seed=seed).float() for seed in (9, 10, 11))
    moments = [
        Moments(normal(FEATURES, D, seed=s).float(), normal(FEATURES, D, seed=s + 1).float() ** 2)
        for s in (12, 14)
    ]
    return [W_dec, W_enc, g_dec, g_enc], moments


def adam(w: Tensor, g: Tensor, moments: Moments, rate: float, root: float) -> Tensor:
    assert moments.second is not None
    m = 0.9 * moments.first.double() + 0.1 * g
    v = 0.999 * moments.second.double() + 0.001 * g * g
    return w - rate * m / (v.sqrt() / root + 1e-8)


def test_a_step_of_the_rows_is_that_of_the_formulas(ops: Backend) -> None:
    (W_dec, W_enc, g_dec, g_enc), (of_dec, of_enc) = adam_state()
    d, e, gd, ge = (t.double() for t in (W_dec, W_enc, g_dec, g_enc))
    along, squares = ops.squares(g_dec, W_dec, g_enc)
    projected = gd - (gd * d).sum(1, keepdim=True) * d
    length = projected.pow(2).sum(1) + ge.pow(2).sum(1)
    torch.testing.assert_close(squares.double(), length, **CLOSE)
    rate, root, clip = 0.01, 0.3, 0.25
    moved = adam(d, clip * projected, of_dec, 2 * rate, root)
    wanted = F.normalize(moved, dim=1), adam(e, clip * ge, of_enc, rate, root)
    copies = [torch.zeros_like(W).bfloat16() for W in (W_dec, W_enc)]
    for taken in (0.0, 1.0):
        before = W_dec.clone(), W_enc.clone(), *(t.clone() for t in (*of_dec, *of_enc))
        scalars = torch.tensor([rate, root, clip, taken, torch.nan])
        ops.move_decoder(W_dec, g_dec, of_dec, along, scalars, copies[0])
        ops.move_encoder(W_enc, g_enc, of_enc, scalars, copies[1])
        if not taken:
            after = W_dec, W_enc, *of_dec, *of_enc
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for found, right, copy in zip((W_dec, W_enc), wanted, copies, strict=True):
        torch.testing.assert_close(found.double(), right, **CLOSE)
        torch.testing.assert_close(copy.float(), found, rtol=2**-7, atol=0)  # the interpreter cuts


def test_a_step_of_a_bias(ops: Backend) -> None:
    b, g = normal(FEATURES, seed=16).float(), normal(FEATURES, seed=17).float()
    moments = Moments(normal(FEATURES, seed=18).float(), normal(FEATURES, seed=19).float() ** 2)
    wanted = adam(b.double(), 0.5 * g.double(), moments, 0.1, 0.7)
    ops.move_vector(b, g, moments, torch.tensor([0.1, 0.7, 0.5, 1.0, torch.nan]))
    torch.testing.assert_close(b.double(), wanted, **CLOSE)


def test_features_without_a_gradient_stay_where_they_are(ops: Backend) -> None:
    (W_dec, W_enc, g_dec, g_enc), (of_dec, of_enc) = adam_state()
    b, g_b = normal(FEATURES, seed=16).float(), normal(FEATURES, seed=17).float()
    of_b = Moments(normal(FEATURES, seed=18).float(), normal(FEATURES, seed=19).float() ** 2)
    of_dec, rule = of_dec._replace(second=None), RULES["active_adam"]
    still = torch.arange(FEATURES) % 3 == 0
    for gradient in (g_dec, g_enc, g_b):
        gradient[still] = 0
    before = [t.clone() for t in (W_dec, W_enc, b)]
    scalars = torch.tensor([0.01, 0.3, 0.25, 1.0, 0.005])
    assert of_enc.second is not None
    moment = 0.98 * of_enc.second.double() + 0.02 * (0.25 * g_enc.double()) ** 2
    first = 0.9 * of_enc.first.double() + 0.1 * 0.25 * g_enc.double()
    moved = W_enc - 0.01 * first / (moment.sqrt() / 0.3 + 1e-8)
    along, _ = ops.squares(g_dec, W_dec, g_enc)
    ops.move_decoder(W_dec, g_dec, of_dec, along, scalars, None, rule)
    ops.move_encoder(W_enc, g_enc, of_enc, scalars, torch.zeros_like(W_enc).bfloat16(), rule)
    ops.move_vector(b, g_b, of_b, scalars, rule)
    for old, new in zip(before, (W_dec, W_enc, b), strict=True):
        changed = (old != new).flatten(1).any(1) if old.dim() > 1 else old != new
        assert torch.equal(changed, ~still)
    torch.testing.assert_close(W_enc[~still].double(), moved[~still], **CLOSE)
    torch.testing.assert_close(of_enc.second.double(), moment, **CLOSE)


def test_a_normalised_step_of_the_decoder(ops: Backend) -> None:
    """By a length, whatever that of the momentum."""
    (W, _, G, _), (of_W, _) = adam_state()
    m = of_W.first
    G[0] *= 1e-6
    m[0] *= 1e-6
    w, g = W.double(), G.double()
    lr, clip = 0.005, 0.25
    momentum = 0.9 * m.double() + 0.1 * clip * (g - (g * w).sum(1, keepdim=True) * w)
    moved = w - 14 * lr * momentum / momentum.norm(dim=1, keepdim=True)
    along, _ = ops.squares(G, W, G)
    copy = torch.zeros_like(W).bfloat16()
    for taken in (0.0, 1.0):
        before = W.clone(), m.clone()
        scalars = torch.tensor([torch.nan, torch.nan, clip, taken, lr])
        ops.move_decoder(W, G, Moments(m, None), along, scalars, copy, RULES["active_adam"])
        if not taken:
            assert torch.equal(W, before[0]) and torch.equal(m, before[1])
    torch.testing.assert_close(W.double(), F.normalize(moved, dim=1), **CLOSE)
    torch.testing.assert_close(m.double(), momentum, **CLOSE)
    torch.testing.assert_close(copy.float(), W, rtol=2**-7, atol=0)
