"""One optimizer step on the weights, in Triton, with one program per feature.

For a feature's decoder row w of unit norm with gradient g, and its encoder row:

    g' = g - (g . w) w                                      what the unit norm would undo
    squares = |g'|^2 + |g_enc|^2                            summed, the length of all gradients

and when the length is known, Adam or `active_adam` (`trainer/optimizer.py`) on the clipped
gradients, the decoder's row then back to unit norm. Weights, moments and gradients are read once
and written once, and with them what the next step's products read in bfloat16. By `active_adam` the
decoder has no second moment, and a row that has a gradient moves by a length along its momentum.

`scalars` (5,) float32 come from the device: the learning rate over the first moment's correction,
the root of the second's, the factor of the clipping, whether the step is taken (0: nothing is
written), and the learning rate.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_core.sae.static import launching
from sae_core.sae.static.moments import EPS, LEAST_LENGTH, PLAIN, Moments, Rule

LEAST = tl.constexpr(LEAST_LENGTH)


@triton.jit
def _squares(g_dec, W_dec, g_enc, along, squares, D, BLOCK: tl.constexpr):
    """Of one feature: `g . w`, and the squared length of what is left of both gradients."""
    feature = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    at = feature * D + d
    g = tl.load(g_dec + at, mask=d < D, other=0.0)
    w = tl.load(W_dec + at, mask=d < D, other=0.0)
    e = tl.load(g_enc + at, mask=d < D, other=0.0)
    product = tl.sum(g * w, 0)
    g -= product * w
    tl.store(along + feature, product)
    tl.store(squares + feature, tl.sum(g * g, 0) + tl.sum(e * e, 0))


@triton.jit
def _adam(w, g, m, v, rate, root, beta1, beta2, eps):
    """The weights and moments after a step."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    return w - rate * m / (tl.sqrt(v) / root + eps), m, v


@triton.jit
def _move_rows(
    W, G, M, V, along, scalars, copy, D, scale, beta1, beta2, eps,
    DECODER: tl.constexpr, NORMALISED: tl.constexpr, COPIED: tl.constexpr,
    ONLY_ACTIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of the decoder or the encoder; NORMALISED: by a length along its momentum, without
    V."""
    if tl.load(scalars + 3) != 0:
        feature = tl.program_id(0).to(tl.int64)
        d = tl.arange(0, BLOCK)
        at, inside = feature * D + d, d < D
        old = tl.load(W + at, mask=inside, other=0.0)
        g = tl.load(G + at, mask=inside, other=0.0)
        m = tl.load(M + at, mask=inside, other=0.0)
        moves, w = tl.max(tl.abs(g), 0) > 0, old
        if DECODER:
            g -= tl.load(along + feature) * w
        g *= tl.load(scalars + 2)
        if NORMALISED:
            m = beta1 * m + (1 - beta1) * g
            length = tl.sqrt(tl.sum(m * m, 0))
            w -= scale * tl.load(scalars + 4) * m / tl.maximum(length, LEAST)
        else:
            v = tl.load(V + at, mask=inside, other=0.0)
            rate, root = scale * tl.load(scalars), tl.load(scalars + 1)
            w, m, v = _adam(w, g, m, v, rate, root, beta1, beta2, eps)
            tl.store(V + at, v, mask=inside)
        if DECODER:
            length = tl.sqrt(tl.sum(tl.where(inside, w * w, 0.0), 0))
            w = w / tl.maximum(length, LEAST)
        if ONLY_ACTIVE:
            w = tl.where(moves, w, old)
        if COPIED:
            tl.store(copy + at, w.to(tl.bfloat16), mask=inside)
        tl.store(W + at, w, mask=inside)
        tl.store(M + at, m, mask=inside)


@triton.jit
def _move_vector(
    W, G, M, V, scalars, N, beta1, beta2, eps, ONLY_ACTIVE: tl.constexpr, BLOCK: tl.constexpr
):
    """A block of a bias."""
    if tl.load(scalars + 3) != 0:
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = at < N
        w = tl.load(W + at, mask=inside, other=0.0)
        gradient, old = tl.load(G + at, mask=inside, other=0.0), w
        g = gradient * tl.load(scalars + 2)
        m = tl.load(M + at, mask=inside, other=0.0)
        v = tl.load(V + at, mask=inside, other=0.0)
        rate, root = tl.load(scalars), tl.load(scalars + 1)
        w, m, v = _adam(w, g, m, v, rate, root, beta1, beta2, eps)
        if ONLY_ACTIVE:
            w = tl.where(gradient != 0, w, old)
        tl.store(W + at, w, mask=inside)
        tl.store(M + at, m, mask=inside)
        tl.store(V + at, v, mask=inside)


def _warps(d: int) -> int:
    return 4 if d <= 1024 else 8


def squares(g_dec: Tensor, W_dec: Tensor, g_enc: Tensor) -> tuple[Tensor, Tensor]:
    """(F,) `g . w` of the decoder's rows, and (F,) squared lengths without that, the encoder's
    added."""
    n_features, d = W_dec.shape
    along, found = (torch.empty(n_features, device=W_dec.device) for _ in range(2))
    given = g_dec, W_dec, g_enc, along, found, d
    block = triton.next_power_of_2(d)
    launching.launch(_squares, (n_features,), *given, BLOCK=block, num_warps=_warps(d))
    return along, found


def move_decoder(
    W: Tensor,
    G: Tensor,
    moments: Moments,
    along: Tensor,
    scalars: Tensor,
    copy: Tensor | None = None,
    rule: Rule = PLAIN,
) -> None:
    """A step of the decoder (F, D), by Adam if it has a second moment; G is not projected yet.

    Args:
        copy: (F, D) bfloat16, written.
    """
    _rows(W, G, moments, along, scalars, copy, True, rule)


def move_encoder(
    W: Tensor,
    G: Tensor,
    moments: Moments,
    scalars: Tensor,
    copy: Tensor,
    rule: Rule = PLAIN,
) -> None:
    """A step of the encoder (F, D) and its copy (F, D) in bfloat16."""
    _rows(W, G, moments, W, scalars, copy, False, rule)


def _rows(
    W: Tensor,
    G: Tensor,
    moments: Moments,
    along: Tensor,
    scalars: Tensor,
    copy: Tensor | None,
    decoder: bool,
    rule: Rule,
) -> None:
    n_features, d = W.shape
    is_copied, copy = copy is not None, W if copy is None else copy
    scale = rule.decoder_lr_scale if decoder else 1.0
    first, second = moments
    both = first, first if second is None else second  # without a second one it is not read
    given = W, G, *both, along, scalars, copy, d, scale, rule.beta1, rule.beta2, EPS
    constants = {"DECODER": decoder, "NORMALISED": second is None, "COPIED": is_copied}
    constants |= {"ONLY_ACTIVE": rule.only_active, "BLOCK": triton.next_power_of_2(d)}
    launching.launch(_move_rows, (n_features,), *given, **constants, num_warps=_warps(d))


def move_vector(
    W: Tensor, G: Tensor, moments: Moments, scalars: Tensor, rule: Rule = PLAIN
) -> None:
    """A step of a bias (n,)."""
    n = len(W)
    given = W, G, *moments, scalars, n, rule.beta1, rule.beta2, EPS
    constants = {"ONLY_ACTIVE": rule.only_active, "BLOCK": 1024}
    launching.launch(_move_vector, (triton.cdiv(n, 1024),), *given, **constants)
