"""What the Triton kernels compute, with PyTorch's own operations: for a CPU, where it is slow, and
to compare with. The sizes are fixed here too. Arguments and results are as for the kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sae_core.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from sae_core.sae.normalisation import Normalisation
from sae_core.sae.static.facts import Facts, Weighting
from sae_core.sae.static.moments import EPS, LEAST_LENGTH, PLAIN, Moments, Rule
from sae_core.sae.static.pairs import Codes, Gradients, Prepared, Slots
from sae_core.sae.static.sharing import own_ties

PATTERNS = 2**15


def prepare(raw: Tensor, sites: Sequence[Normalisation], bias: Tensor) -> Prepared:
    """See `row_kernels`."""
    parts = raw.float().split(len(bias), dim=1)
    norms = torch.stack([part.norm(dim=1) for part in parts])
    limits = [norm <= site.max_norm for norm, site in zip(norms, sites, strict=True)]
    kept = limits[0] & limits[-1]
    scaled = [
        torch.where(kept[:, None], site.scaled(part), 0.0)
        for part, site in zip(parts, sites, strict=True)
    ]
    x = scaled[0] - bias
    return Prepared(x, x.bfloat16(), scaled[-1], kept, norms.isfinite().all(0))


def errors(
    decoded: Tensor, bias: Tensor, wanted: Tensor, kept: Tensor, some: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `row_kernels`."""
    by_first, by_second = decoded.chunk(2)
    error = torch.where(kept[:, None], by_first + bias - wanted, 0.0)
    residual = torch.where(some[:, None], -error, 0.0)
    both = torch.stack([error, by_second - residual])
    squares = both.square().sum(2)
    return both.flatten(0, 1), residual, torch.stack([squares[0], squares[0], squares[1]])


def spread(residual: Tensor, mean: Tensor, some: Tensor, squares: Tensor) -> None:
    """See `row_kernels`."""
    squares[1] = torch.where(some[:, None], residual - mean, 0.0).square().sum(1)


def select(
    pre: Tensor,
    rows: Tensor,
    columns: Tensor,
    total: Tensor,
    n_slots: int,
    floor: Tensor,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Slots:
    """See `select_kernels`."""
    n, n_features = pre.shape
    key = torch.where(rows[:, None] & columns, pre.view(torch.int16).int(), 0).clamp(min=0).view(-1)
    number = key.new_zeros(PATTERNS).scatter_add_(0, key.long(), torch.ones_like(key))
    number[0] = 0
    of_all = group.all_reduce(number)
    reached = of_all.flip(0).cumsum(0).flip(0) >= total
    pattern = torch.arange(PATTERNS, dtype=torch.int32, device=pre.device)
    least = torch.where(reached, pattern, 0).amax()
    above, is_tie = key > least, (key == least) & (key > 0)
    ties = total - torch.where(pattern > least, of_all, 0).sum()
    ties = own_ties(ties, is_tie.sum(), group)
    kept = above | (is_tie & (is_tie.cumsum(0) <= ties))
    slots = Slots.empty(n, n_features, n_slots, least)
    place = torch.where(kept, kept.cumsum(0) - 1, n_slots)
    entry = torch.arange(len(key), dtype=torch.int32, device=pre.device)
    given = entry // n_features, entry % n_features, pre.view(-1).float()
    row, column, value = (
        torch.cat([unused, unused[:1]]).scatter(0, place, written)[:n_slots]
        for unused, written in zip(slots[:3], given, strict=True)
    )
    ends = kept.view(n, n_features).sum(1).cumsum(0).int()
    return slots._replace(
        row=row, column=column, value=value, start=torch.cat([ends.new_zeros(1), ends])
    )


def _padded(W: Tensor) -> Tensor:
    """With a row of zeros for the feature that is none."""
    return torch.cat([W, W.new_zeros(1, W.shape[1])])


def decode(codes: Codes, W: Tensor) -> Tensor:
    """See `pair_kernels`."""
    out = torch.zeros(codes.n_rows, W.shape[1], device=W.device)
    rows = _padded(W.float())[codes.column.long()]
    return out.index_add_(0, codes.row, codes.value[:, None] * rows)


def sampled(codes: Codes, A: Tensor, W: Tensor) -> Tensor:
    """See `pair_kernels`."""
    rows = _padded(W.float())[codes.column.long()]
    return (A.float()[codes.row.long()] * rows).sum(1)


def gradients(codes: Codes, d_value: Tensor, G: Tensor, X: Tensor, n_features: int) -> Gradients:
    """See `pair_kernels`."""
    column, row = codes.column.long(), codes.row.long()
    W_dec, W_enc = (torch.zeros(n_features + 1, X.shape[1], device=X.device) for _ in range(2))
    W_dec.index_add_(0, column, codes.value[:, None] * G[row])
    W_enc.index_add_(0, column, d_value[:, None] * X[row % codes.n_tokens])
    b_enc, first = torch.zeros(2, n_features + 1, device=X.device), codes.n_first
    b_enc[0].index_add_(0, column[:first], d_value[:first])
    b_enc[1].index_add_(0, column[first:], d_value[first:])
    return Gradients(W_dec[:-1], W_enc[:-1], b_enc[:, :-1])


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
    """See `scalar_kernels`."""
    tokens, (error, variance, aux_error) = n.clamp(min=1).float(), sums.unbind()
    is_aux, variance = (variance > 0) & (aux_total > 0), variance.clamp(min=1e-30)
    recon, l1 = error / tokens, l1_sum / tokens
    aux_loss = torch.where(is_aux, aux_error / variance, 0.0)
    parts = weights.recon * recon, weights.l1 * l1
    loss = parts[0] + parts[1] + weights.aux * aux_loss
    none, aux_least = torch.zeros_like(loss), torch.where(aux_total > 0, aux_least, torch.nan)
    counts = n_pairs.float(), n.float()
    figures = loss, recon, l1, *parts, aux_loss, none, *counts, least, aux_least, none
    by_aux = torch.where(is_aux, 2 * weights.aux / variance, 0.0)
    scales = 2 * weights.recon / tokens, by_aux, weights.l1 / tokens
    return torch.stack(figures), torch.stack(scales)


def decide(figures: Tensor, squared: Tensor, facts: Facts) -> Tensor:
    """See `scalar_kernels`."""
    length = squared.sqrt()
    taken = (figures[0] + length).isfinite() & (figures[8] > 0) & facts.finite & facts.sure
    taken = taken & ~facts.halted
    facts.halted.copy_(~taken)
    for count in facts.counts:
        count += taken
    step = facts.counts[0].double().clamp(min=1)
    rate = facts.lr / (1 - facts.rule.beta1**step)
    root = (1 - facts.rule.beta2**step).sqrt()
    clip = torch.where(length > facts.max_length, facts.max_length / (length + 1e-6), 1.0)
    row = torch.cat([figures[:-1], taken[None].float()])
    facts.record.index_copy_(0, facts.at[None], row[None])
    facts.at.add_(1)
    return torch.stack([rate.float(), root.float(), clip, taken.float(), facts.lr.float()])


def squares(g_dec: Tensor, W_dec: Tensor, g_enc: Tensor) -> tuple[Tensor, Tensor]:
    """See `update_kernels`."""
    along = (g_dec * W_dec).sum(1)
    left = g_dec - along[:, None] * W_dec
    return along, left.pow(2).sum(1) + g_enc.pow(2).sum(1)


def _adam(
    W: Tensor, G: Tensor, moments: Moments, rate: Tensor, scalars: Tensor, rule: Rule
) -> list[Tensor]:
    """The weights and moments after a step."""
    assert moments.second is not None
    first = rule.beta1 * moments.first + (1 - rule.beta1) * G
    second = rule.beta2 * moments.second + (1 - rule.beta2) * G * G
    return [W - rate * first / (second.sqrt() / scalars[1] + EPS), first, second]


def _put(
    scalars: Tensor,
    W: Tensor,
    moments: Moments,
    new: list[Tensor],
    G: Tensor,
    only_active: bool,
) -> None:
    """Take the new weights and moments, if the step is taken; the weights, which come first,
    perhaps only where there is a gradient."""
    if only_active:
        moves = (G != 0).any(1, keepdim=True) if G.dim() == 2 else G != 0
        new = [torch.where(moves, new[0], W), *new[1:]]
    old = [W, *(moment for moment in moments if moment is not None)]
    for before, after in zip(old, new, strict=True):
        before.copy_(torch.where(scalars[3] != 0, after, before))


def move_decoder(
    W: Tensor,
    G: Tensor,
    moments: Moments,
    along: Tensor,
    scalars: Tensor,
    copy: Tensor | None = None,
    rule: Rule = PLAIN,
) -> None:
    """See `update_kernels`."""
    projected = (G - along[:, None] * W) * scalars[2]
    if moments.second is None:
        momentum = rule.beta1 * moments.first + (1 - rule.beta1) * projected
        length = momentum.norm(dim=1, keepdim=True).clamp(min=LEAST_LENGTH)
        new = [W - rule.decoder_lr_scale * scalars[4] * momentum / length, momentum]
    else:
        new = _adam(W, projected, moments, rule.decoder_lr_scale * scalars[0], scalars, rule)
    new[0] = new[0] / new[0].norm(dim=1, keepdim=True).clamp(min=LEAST_LENGTH)
    _put(scalars, W, moments, new, G, rule.only_active)
    if copy is not None:
        copy.copy_(W)


def move_encoder(
    W: Tensor,
    G: Tensor,
    moments: Moments,
    scalars: Tensor,
    copy: Tensor,
    rule: Rule = PLAIN,
) -> None:
    """See `update_kernels`."""
    new = _adam(W, G * scalars[2], moments, scalars[0], scalars, rule)
    _put(scalars, W, moments, new, G, rule.only_active)
    copy.copy_(W)


def move_vector(
    W: Tensor, G: Tensor, moments: Moments, scalars: Tensor, rule: Rule = PLAIN
) -> None:
    """See `update_kernels`."""
    new = _adam(W, G * scalars[2], moments, scalars[0], scalars, rule)
    _put(scalars, W, moments, new, G, rule.only_active)
