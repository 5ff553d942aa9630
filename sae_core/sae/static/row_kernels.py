"""What is done to each token of a batch, in Triton, with one program per token: each row is read
once.

`prepare` makes of raw activations what enters the SAE, outliers masked. `errors` compares with it
what both codes decode to; `spread` adds the variance of the residual, whose mean has to be known.

Shapes: N tokens, D width of the activations.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_core.sae.normalisation import Normalisation
from sae_core.sae.static import launching
from sae_core.sae.static.pairs import Prepared


@triton.jit
def _prepare(
    raw, mean, target_mean, bias, x, half, wanted, kept, finite, D,
    scale, max_norm, target_scale, target_max_norm, SITES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token; of a transcoder, its activation at the hook is followed by the target's."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    given = tl.load(raw + row * SITES * D + d, mask=inside, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(given * given, 0))
    keep, is_finite = length <= max_norm, length < float("inf")
    scaled = (given - tl.load(mean + d, mask=inside, other=0.0)) / scale
    result = scaled
    if SITES == 2:
        target = tl.load(raw + (row * 2 + 1) * D + d, mask=inside, other=0.0).to(tl.float32)
        length = tl.sqrt(tl.sum(target * target, 0))
        keep = keep & (length <= target_max_norm)
        is_finite = is_finite & (length < float("inf"))
        result = (target - tl.load(target_mean + d, mask=inside, other=0.0)) / target_scale
    scaled = tl.where(keep, scaled, 0.0) - tl.load(bias + d, mask=inside, other=0.0)
    tl.store(x + row * D + d, scaled, mask=inside)
    tl.store(half + row * D + d, scaled.to(tl.bfloat16), mask=inside)
    tl.store(wanted + row * D + d, tl.where(keep, result, 0.0), mask=inside)
    tl.store(kept + row, keep)
    tl.store(finite + row, is_finite)


@triton.jit
def _errors(decoded, bias, wanted, kept, some, both, residual, squares, N, D, BLOCK: tl.constexpr):
    """One token's errors of both codes, and its residual; see `errors`."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside, at = d < D, row * D + d
    x_hat = tl.load(decoded + at, mask=inside, other=0.0)
    x_hat += tl.load(bias + d, mask=inside, other=0.0)
    error = x_hat - tl.load(wanted + at, mask=inside, other=0.0)
    error = tl.where(inside & (tl.load(kept + row) != 0), error, 0.0)
    left = tl.where(tl.load(some + row) != 0, -error, 0.0)
    aux_error = tl.load(decoded + N * D + at, mask=inside, other=0.0) - left
    tl.store(both + at, error, mask=inside)
    tl.store(both + N * D + at, aux_error, mask=inside)
    tl.store(residual + at, left, mask=inside)
    tl.store(squares + row, tl.sum(error * error, 0))
    tl.store(squares + 2 * N + row, tl.sum(aux_error * aux_error, 0))


@triton.jit
def _spread(residual, mean, some, squares, N, D, BLOCK: tl.constexpr):
    """One token's squared distance from the mean; see `spread`."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    off = tl.load(residual + row * D + d, mask=d < D, other=0.0)
    off -= tl.load(mean + d, mask=d < D, other=0.0)
    off = tl.where(tl.load(some + row) != 0, off, 0.0)
    tl.store(squares + N + row, tl.sum(off * off, 0))


def _constants(d: int) -> dict[str, int]:
    return {"BLOCK": triton.next_power_of_2(d), "num_warps": 4 if d <= 2048 else 8}


def prepare(raw: Tensor, sites: Sequence[Normalisation], bias: Tensor) -> Prepared:
    """Centre, scale and mask (N, D) raw activations, or (N, 2 D) for a transcoder.

    Args:
        bias: (D,) that the input is centred on once it is scaled.
    """
    n, d = len(raw), len(bias)
    x, wanted = (torch.empty(n, d, device=raw.device) for _ in range(2))
    half = torch.empty_like(x, dtype=torch.bfloat16)
    kept, finite = (torch.empty(n, dtype=torch.bool, device=raw.device) for _ in range(2))
    first, last = sites[0], sites[-1]
    out = x, half, wanted, kept, finite
    numbers = first.scale, first.max_norm, last.scale, last.max_norm
    launching.launch(
        _prepare, (n,), raw, first.mean, last.mean, bias, *out, d, *numbers,
        SITES=len(sites), **_constants(d),
    )  # fmt: skip
    return Prepared(*out)


def errors(
    decoded: Tensor, bias: Tensor, wanted: Tensor, kept: Tensor, some: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(2 N, D) the errors of both codes, (N, D) the residual of the first on `some` rows, and
    (3, N) squared lengths: of the errors, what `spread` adds, and of the second code's errors.

    Args:
        decoded: (2 N, D) without the bias (D,).
        wanted: (N, D)
        kept, some: (N,) bool: rows of the first code and of the second.
    """
    n, d = wanted.shape
    both, residual = torch.empty_like(decoded), torch.empty_like(wanted)
    squares = torch.empty(3, n, device=wanted.device)
    given = decoded, bias, wanted, kept, some, both, residual, squares, n, d
    launching.launch(_errors, (n,), *given, **_constants(d))
    return both, residual, squares


def spread(residual: Tensor, mean: Tensor, some: Tensor, squares: Tensor) -> None:
    """Write into the second of `squares` (3, N) each row's squared distance from the mean (D,)."""
    n, d = residual.shape
    launching.launch(_spread, (n,), residual, mean, some, squares, n, d, **_constants(d))
