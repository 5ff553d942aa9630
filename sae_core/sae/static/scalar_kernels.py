"""The scalars of a step, in two Triton programs: with PyTorch they are 70 operations.

`terms` makes the loss of sums over the batch, and what the gradients are scaled by; `decide` says
whether the step is taken and how far it goes, counts it, and keeps its figures for the host.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from sae_core.sae.static import launching
from sae_core.sae.static.facts import FIGURES, Facts, Weighting


@triton.jit
def _terms(
    sums, l1_sum, n, n_pairs, least, aux_total, aux_least, figures, scales,
    recon_weight, l1_weight, aux_weight,
):  # fmt: skip
    """See `terms`."""
    tokens = tl.maximum(tl.load(n), 1).to(tl.float32)
    variance, wanted = tl.load(sums + 1), tl.load(aux_total)
    is_aux = (variance > 0) & (wanted > 0)
    variance = tl.maximum(variance, 1e-30)
    recon, l1 = tl.load(sums) / tokens, tl.load(l1_sum) / tokens
    aux = tl.where(is_aux, tl.load(sums + 2) / variance, 0.0)
    recon_part, l1_part = recon_weight * recon, l1_weight * l1
    tl.store(figures, recon_part + l1_part + aux_weight * aux)
    tl.store(figures + 1, recon)
    tl.store(figures + 2, l1)
    tl.store(figures + 3, recon_part)
    tl.store(figures + 4, l1_part)
    tl.store(figures + 5, aux)
    tl.store(figures + 6, 0.0)
    tl.store(figures + 7, tl.load(n_pairs).to(tl.float32))
    tl.store(figures + 8, tl.load(n).to(tl.float32))
    tl.store(figures + 9, tl.load(least))
    tl.store(figures + 10, tl.where(wanted > 0, tl.load(aux_least), float("nan")))
    tl.store(scales, 2 * recon_weight / tokens)
    tl.store(scales + 1, tl.where(is_aux, 2 * aux_weight / variance, 0.0))
    tl.store(scales + 2, l1_weight / tokens)


@triton.jit
def _decide(
    figures, squared, finite, sure, lr, halted, count_0, count_1, count_2, count_3, at, record,
    scalars, log_beta1, log_beta2, max_length, FIGURES: tl.constexpr,
):  # fmt: skip
    """See `decide`."""
    length = tl.sqrt(tl.load(squared))
    fine = tl.abs(tl.load(figures) + length) < float("inf")  # NaN is not
    fine = fine & (tl.load(figures + 8) > 0) & (tl.load(finite) != 0) & (tl.load(sure) != 0)
    fine = fine & (tl.load(halted) == 0)
    taken = fine.to(tl.float32)
    step = tl.load(count_0) + taken
    tl.store(count_0, step)
    tl.store(count_1, tl.load(count_1) + taken)
    tl.store(count_2, tl.load(count_2) + taken)
    tl.store(count_3, tl.load(count_3) + taken)
    tl.store(halted, fine == 0)
    t = tl.maximum(step, 1.0).to(tl.float64)
    rate = tl.load(lr) / (1 - tl.exp(t * log_beta1))
    root = tl.sqrt(1 - tl.exp(t * log_beta2))
    tl.store(scalars, rate.to(tl.float32))
    tl.store(scalars + 1, root.to(tl.float32))
    tl.store(scalars + 2, tl.where(length > max_length, max_length / (length + 1e-6), 1.0))
    tl.store(scalars + 3, taken)
    tl.store(scalars + 4, tl.load(lr).to(tl.float32))
    line = tl.load(at)
    place = tl.arange(0, 16)
    row = tl.load(figures + place, mask=place < FIGURES, other=0.0)
    row = tl.where(place == FIGURES - 1, taken, row)
    tl.store(record + line * FIGURES + place, row, mask=place < FIGURES)
    tl.store(at, line + 1)


def terms(
    sums: Tensor,
    l1_sum: Tensor,
    n_pairs: Tensor,
    least: Tensor,
    aux_least: Tensor,
    aux_total: Tensor,
    n: Tensor,
    weights: Weighting,
) -> tuple[Tensor, Tensor]:
    """(FIGURES,) the figures of a batch, all but whether the step is taken, and (3,) what scales
    the gradients: of the errors, of the auxiliary errors, and what is added to dL/dvalue.

    Args:
        sums: (3,) of squares: errors, residual without its mean, auxiliary errors.
        l1_sum: () of the first code's values.
        n_pairs: () int32, of the first code.
        least, aux_least: () the smallest value that each code kept.
        n: () int32 tokens.
        aux_total: () int32; 0 without dead features.
    """
    figures, scales = sums.new_zeros(FIGURES), sums.new_empty(3)
    given = sums, l1_sum, n, n_pairs, least, aux_total, aux_least
    launching.launch(_terms, (1,), *given, figures, scales, *weights, num_warps=1)
    return figures, scales


def decide(figures: Tensor, squared: Tensor, facts: Facts) -> Tensor:
    """(5,) what `update_kernels` takes: rate, root, clipping, whether the step is taken, and the
    learning rate.

    Counts the step, halts those after it unless it is taken, and records its figures.

    Args:
        squared: () the squared length of all gradients.
    """
    scalars = figures.new_empty(5)
    given = facts.finite, facts.sure, facts.lr, facts.halted, *facts.counts, facts.at, facts.record
    logs = math.log(facts.rule.beta1), math.log(facts.rule.beta2)
    launching.launch(
        _decide, (1,), figures, squared, *given, scalars, *logs, facts.max_length, FIGURES=FIGURES,
        num_warps=1,
    )  # fmt: skip
    return scalars
