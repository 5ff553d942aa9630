"""The statistics kept for every feature while a corpus is read, in bounded memory.

A feature's best windows, a random sample of its windows and one of its tokens are kept in the same
way, as the records with the largest keys so far: the key is the activation for the first, a hash
for the others. Which pairs of features are active together is counted on a random sample of tokens.

Bytes: F (R (16 + 2 C) + 16 (16 + 2 C) + 64 * 16 + 8 * 160 + 8 (5 + S)), with R windows kept for
each feature, twice while the records are sorted at the end, and some 100 `PAIR_BUDGET`. With the
default R = 10 and C = 40 that is 0.3 GB for 65,536 features, however long the corpus is.

Shapes: B windows of L tokens in a batch, N = B L, F features, S subjects, P pairs of a sparse code,
R records (one for each window and feature that is active in it), C tokens of context.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sae_core.sae.sparse_ops import SparseCode, add_at

SAMPLE = 16
"""Windows of a feature that are kept at random, for its lower quantiles."""

TOKEN_SAMPLE = 64
"""Tokens of a feature that are kept at random, for the words that it is active on."""

OCTAVES, BINS_AN_OCTAVE = 20, 4
"""The histograms' bins go by log2 of the activation, from -OCTAVES to OCTAVES."""

PAIR_BUDGET = 2**22
"""Pairs of features active on one token that are kept, over all sampled tokens."""

NOWHERE = 2**62
"""The place of a missing record: after all others."""

MANTISSA = 2**24
"""Integers below it are exact in float32."""

BEFORE = 0.75
"""Share of the context that is before the peak: causal models have seen nothing else."""


def hashed(index: Tensor, salt: int) -> Tensor:
    """A fixed number in [0, 1) for each integer: the finaliser of MurmurHash3."""
    bits = index + salt * 0x9E3779B1
    for factor in (-0xAE502812AA7333, -0x3B314601E57A13AD):  # wraps around, as int64 does
        bits = (bits ^ (bits >> 33 & 0x7FFFFFFF)) * factor
    return ((bits >> 40) & (MANTISSA - 1)).float() / MANTISSA


class Best:
    """The `n` records of each feature with the largest keys; of equal keys, the earlier places.

    A record stays in its slot until a better one takes it: only `ordered` sorts them.

    Args:
        context: tokens of context kept with each record.
    """

    def __init__(self, n_features: int, n: int, context: int, device: torch.device) -> None:
        shape = (n_features, n)
        self.key = torch.full(shape, -torch.inf, device=device)
        self.value = torch.zeros(shape, device=device)
        self.place = torch.full(shape, NOWHERE, device=device)
        self.context = torch.zeros(*shape, context, dtype=torch.bfloat16, device=device)

    def offer(
        self,
        feature: Tensor,
        key: Tensor,
        value: Tensor,
        place: Tensor,
        context: Callable[[Tensor], Tensor],
    ) -> None:
        """Keep whichever of R records are among the best.

        Args:
            feature: (R,), in any order; key, value and place likewise, places ascending.
            context: from (K,) indices of records to their (K, C) contexts.
        """
        n = self.key.shape[1]
        least = self.key.amin(1)
        passed = (key > least[feature]).nonzero().squeeze(1)
        passed = passed[key[passed].argsort(descending=True, stable=True)]
        passed = passed[feature[passed].argsort(stable=True)]
        rows, inverse, counts = torch.unique_consecutive(
            feature[passed], return_inverse=True, return_counts=True
        )
        rank = torch.arange(len(passed), device=passed.device)
        rank -= (counts.cumsum(0) - counts)[inverse]
        first = rank < n
        new = torch.full((len(rows), n), -1, device=passed.device)
        new[inverse[first], rank[first]] = passed[first]
        new_key = torch.where(new >= 0, key[new], -torch.inf)
        kept = _greatest(
            torch.cat([self.key[rows], new_key], 1),
            torch.cat([self.place[rows], torch.where(new >= 0, place[new], NOWHERE)], 1),
            n,
        )
        # As many new ones are kept in a row as old ones are not.
        row, slot = (~kept[:, :n]).nonzero(as_tuple=True)
        record = new[kept[:, n:]]
        at = rows[row], slot
        self.key[at], self.value[at] = key[record], value[record]
        self.place[at], self.context[at] = place[record], context(record).bfloat16()

    def ordered(self) -> "Records":
        """The records of every feature on the CPU, largest keys first."""
        key, place = self.key.cpu(), self.place.cpu()
        order = _order(key, place)
        wide = order[..., None].expand(-1, -1, self.context.shape[2])
        place = place.gather(1, order)
        return Records(
            self.value.cpu().gather(1, order),
            torch.where(place == NOWHERE, -1, place),
            self.context.cpu().gather(1, wide),
        )


class Records(NamedTuple):
    """Records of every feature, the best first."""

    value: Tensor
    """(F, n) activation; 0 where there are fewer."""
    place: Tensor
    """(F, n) token, counted through all windows; -1 where there are fewer."""
    context: Tensor
    """(F, n, C) activations around it."""


def _order(key: Tensor, place: Tensor) -> Tensor:
    """(A, M) the entries of each row, the largest keys first; of equal keys, the earlier places."""
    order = place.argsort(dim=1, stable=True)
    return order.gather(1, key.gather(1, order).argsort(dim=1, descending=True, stable=True))


def _greatest(key: Tensor, place: Tensor, n: int) -> Tensor:
    """(A, M) bool: the first `n` entries of each row in `_order`."""
    least = key.topk(n, dim=1).values[:, -1:]
    above, equal = key > least, key == least
    left = n - above.sum(1, keepdim=True)
    kept = above | (equal & (equal.cumsum(1) <= left))
    # Of records that are equal the earlier ones: only these rows have to be sorted. Missing ones
    # (-inf) are all alike.
    choice = (equal.sum(1, keepdim=True) > left) & (least > -torch.inf)
    rows = choice.squeeze(1).nonzero().squeeze(1)
    first = _order(key[rows], place[rows])[:, :n]
    kept[rows] = torch.zeros_like(kept[rows]).scatter_(1, first, True)
    return kept


class Together(NamedTuple):
    """Pairs of features that are active on the same tokens."""

    first: Tensor
    """(Q,) the lower-numbered feature; second, tokens likewise."""
    second: Tensor
    tokens: Tensor
    """On how many sampled tokens both are active."""
    active: Tensor
    """(F,) on how many sampled tokens each feature is."""
    n_tokens: int
    """How many were sampled."""

    @property
    def jaccard(self) -> Tensor:
        """(Q,) tokens with both over tokens with either."""
        either = self.active[self.first] + self.active[self.second] - self.tokens
        return self.tokens / either

    @property
    def pmi(self) -> Tensor:
        """(Q,) pointwise mutual information in bits: the log2 of how many times as often both are
        active as if one knew nothing of the other."""
        chance = self.active[self.first] * self.active[self.second] / self.n_tokens
        return (self.tokens / chance).log2()

    @property
    def correlation(self) -> Tensor:
        """(Q,) between being active and not (the phi coefficient); 0 with a feature that is active
        on every token."""
        a, b = (self.active[pair].double() / self.n_tokens for pair in (self.first, self.second))
        spread = (a * (1 - a) * b * (1 - b)).sqrt()
        both = self.tokens / self.n_tokens
        return torch.where(spread > 0, (both - a * b) / spread, 0.0)


class TokenSample:
    """The codes of a random sample of tokens, as large as `PAIR_BUDGET` allows.

    A token is in while its hash is below `rate`, which is halved when the sample grows too large.
    """

    def __init__(self) -> None:
        self.rate = 1.0
        self.n_tokens = 0
        """Sampled tokens, active or not."""
        self._n_pairs = 0
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        """For each batch: the sampled tokens, and the token and feature of each entry."""

    def add(self, tokens: Tensor, token: Tensor, feature: Tensor) -> None:
        """Count a batch: the counted tokens (N,), and the entries (P,) of their codes, by token."""
        self._parts.append(self._below_rate(tokens.cpu(), token.cpu(), feature.cpu()))
        self._count(self._parts[-1])
        while self._n_pairs > PAIR_BUDGET:
            self.rate /= 2
            self.n_tokens = self._n_pairs = 0
            self._parts = [self._below_rate(*part) for part in self._parts]
            for part in self._parts:
                self._count(part)

    def _below_rate(
        self, tokens: Tensor, token: Tensor, feature: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        kept = hashed(token, 1) < self.rate
        return tokens[hashed(tokens, 1) < self.rate], token[kept], feature[kept]

    def _count(self, part: tuple[Tensor, Tensor, Tensor]) -> None:
        tokens, token, _ = part
        _, counts = torch.unique_consecutive(token, return_counts=True)
        self.n_tokens += len(tokens)
        self._n_pairs += int((counts * (counts - 1) // 2).sum())

    def pairs(self, n_features: int) -> Together:
        """Every pair that is active on a sampled token, with its count."""
        _, tokens, features = zip(*self._parts, strict=True)
        feature = torch.cat(features)
        _, counts = torch.unique_consecutive(torch.cat(tokens), return_counts=True)
        last = counts.cumsum(0).repeat_interleave(counts)  # where each entry's token ends
        partners = last - torch.arange(len(feature)) - 1
        left = torch.arange(len(feature)).repeat_interleave(partners)
        start = partners.cumsum(0) - partners
        right = left + 1 + torch.arange(len(left)) - start[left]
        both, n_both = torch.unique(feature[left] * n_features + feature[right], return_counts=True)
        active = torch.bincount(feature, minlength=n_features)
        return Together(both // n_features, both % n_features, n_both, active, self.n_tokens)


class Tally:
    """Counts, sums, histograms and records of F features.

    Position 0 of a window is counted separately and outliers are not counted: neither trained the
    SAE.
    """

    def __init__(
        self, n_features: int, n_subjects: int, top: int, context: int, device: torch.device
    ) -> None:
        self.n_features, self.n_subjects = n_features, n_subjects
        precise = torch.float32 if device.type == "mps" else torch.float64  # it has no other
        counts = partial(torch.zeros, dtype=torch.long, device=device)
        sums = partial(torch.zeros, dtype=precise, device=device)
        self.count = counts(n_features)
        """(F,) tokens on which a feature is active."""
        self.windows = counts(n_features)
        """(F,) windows in which it is."""
        self.at_first = counts(n_features)
        """(F,) windows on whose position 0 it is."""
        self.total = sums(n_features)
        """(F,) sums of activations."""
        self.by_subject = sums(n_features, n_subjects)
        """(F, S) sums of activations."""
        self.histogram = counts(n_features, 2 * OCTAVES * BINS_AN_OCTAVE)
        self.subject_tokens = counts(n_subjects)
        self.n_tokens = self.n_outliers = self.n_windows = self.n_first_active = 0
        self.context, self.before = context, int(BEFORE * (context - 1))
        self.best = Best(n_features, top, context, device)
        self.sample = Best(n_features, SAMPLE, context, device)
        self.spread = Best(n_features, TOKEN_SAMPLE, 0, device)
        self.tokens = TokenSample()

    def add(
        self, code: SparseCode, outlier: Tensor, subject: Tensor | None, seen: Tensor | None = None
    ) -> None:
        """Count a batch of windows, which follow the windows counted before.

        Args:
            code: of its N tokens.
            outlier: (B, L) bool.
            subject: (B, L) index of each token's subject, if they are known.
            seen: (B, L) bool, as `seen_tokens`; by default all but each window's first.
        """
        length = outlier.shape[1]
        first_token = self.n_windows * length
        if seen is None:
            seen = torch.ones_like(outlier)
            seen[:, 0] = False
        counted = (seen & ~outlier).view(-1)
        on_first = code.pairs.row % length == 0
        self.at_first += self._bincount(code.pairs.column[on_first])
        self.n_first_active += int(on_first.sum())
        keep = counted[code.pairs.row]
        row, feature = code.pairs.row[keep], code.pairs.column[keep]
        value = code.value[keep].float()
        self._add_sums(row, feature, value, None if subject is None else subject.view(-1))
        if subject is not None:
            here = torch.bincount(subject.view(-1)[counted], minlength=self.n_subjects)
            self.subject_tokens += here
        self._add_records(row, feature, value, outlier.shape)
        place = first_token + row
        self.spread.offer(
            feature,
            hashed(place * self.n_features + feature, 3),
            value,
            place,
            lambda chosen: value.new_zeros(len(chosen), 0),
        )
        self.tokens.add(first_token + counted.nonzero().squeeze(1), place, feature)
        self.n_windows += len(outlier)
        self.n_tokens += int(counted.sum())
        self.n_outliers += int((seen & outlier).sum())

    def cpu(self) -> "Tally":
        """This tally with its counts and sums on the CPU; nothing is added afterwards."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.cpu())
        return self

    def _bincount(self, feature: Tensor) -> Tensor:
        return torch.bincount(feature, minlength=self.n_features)

    def _add_sums(
        self, row: Tensor, feature: Tensor, value: Tensor, subject: Tensor | None
    ) -> None:
        self.count += self._bincount(feature)
        precise = value.to(self.total.dtype)
        add_at(self.total, feature, precise)
        if subject is not None:
            cell = feature * self.n_subjects + subject[row]
            add_at(self.by_subject.view(-1), cell, precise)
        n_bins = self.histogram.shape[1]
        bin_ = ((value.log2() + OCTAVES) * BINS_AN_OCTAVE).long().clamp(0, n_bins - 1)
        self.histogram.view(-1).index_add_(0, feature * n_bins + bin_, torch.ones_like(feature))

    def _add_records(
        self, row: Tensor, feature: Tensor, value: Tensor, shape: tuple[int, ...]
    ) -> None:
        """Each window's peak of each feature, its first if it has several."""
        n, length = self.n_features, shape[1]
        group = row // length * n + feature  # a window and a feature: a record
        peak = value.new_zeros(shape[0] * n).scatter_reduce(0, group, value, "amax")
        is_peak = value == peak[group]
        at = torch.full_like(peak, shape[0] * length, dtype=torch.long)
        at.scatter_reduce_(0, group[is_peak], row[is_peak], "amin")
        record = peak.nonzero().squeeze(1)
        who, where, height = record % n, at[record], peak[record]
        self.windows += self._bincount(who)
        number = torch.empty_like(at)
        number[record] = torch.arange(len(record), device=at.device)
        offset = row - at[group] + self.before
        near = (offset >= 0) & (offset < self.context)
        of_record, offset, value = number[group[near]], offset[near], value[near]

        def context(chosen: Tensor) -> Tensor:
            slot = torch.full_like(record, -1)
            slot[chosen] = torch.arange(len(chosen), device=slot.device)
            mine = slot[of_record]
            found = value.new_zeros(len(chosen), self.context)
            found[mine[mine >= 0], offset[mine >= 0]] = value[mine >= 0]
            return found

        place = self.n_windows * length + where
        self.best.offer(who, height, height, place, context)
        window = self.n_windows + record // n
        self.sample.offer(who, hashed(window * n + who, 2), height, place, context)
