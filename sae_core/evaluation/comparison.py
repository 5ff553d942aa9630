"""Two SAEs side by side: each feature's nearest one in the other.

    by decoder: the cosine of their decoder rows, for SAEs of one hook of one model
    by activation: Pearson's correlation over tokens of their activations, for any two that read
                   the same texts through the same model

A feature whose nearest one is above 0.7 (0.9) has a twin. Matches are made both ways, as several
features may share a nearest one. Features active on fewer than 10 tokens have no correlation here:
any two that fire on one token, and on the same, would correlate at 1.

Memory of the correlation: 8 F G bytes for SAEs of F and G features.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_core.activations.token_windows import seen_tokens
from sae_core.corpus.tokens import token_ids
from sae_core.evaluation.unseen import ModelIdentity
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.sae_base import SparseAutoencoder
from sae_core.utils.errors import SAEError
from sae_core.utils.naming import same_name

TWIN = (0.7, 0.9)
"""How near a twin is."""

ROWS = 1024
"""Features of the first SAE that are compared at once."""

MOST_PAIRS = 2**29
"""Most pairs of features that are correlated: 4 GiB."""

FEWEST_TOKENS = 10
"""Features active on fewer tokens are not correlated."""

NEVER = -2.0
"""Stands for the correlation with a feature that is active on too few tokens."""


class Matches(NamedTuple):
    """The nearest feature in the other SAE, for each of F features."""

    feature: Tensor
    """(F,) its number."""
    nearness: Tensor
    """(F,) cosine or correlation; NaN for a feature that is active on too few tokens."""

    @property
    def n_compared(self) -> int:
        """How many features have a nearest one."""
        return int((~self.nearness.isnan()).sum())

    def share(self, least: float) -> float:
        """The share of the compared features that have a twin; 0 if none was compared."""
        return int((self.nearness > least).sum()) / max(self.n_compared, 1)


def by_decoder(a: SparseAutoencoder, b: SparseAutoencoder) -> Matches:
    """For each feature of `a`, the one of `b` with the largest cosine of decoder rows.

    Raises:
        SAEError: their outputs belong to different models or hooks, or have different widths.
    """
    check_one_model(a, b)
    sites = [(sae.spec.target_hook_spec, sae.spec.d_in) for sae in (a, b)]
    if sites[0] != sites[1]:
        raise SAEError(
            f"--by decoder: one SAE is of {sites[0][0]} with width {sites[0][1]}, the other of "
            f"{sites[1][0]} with {sites[1][1]}; compare them with --by activation"
        )
    rows, others = (F.normalize(sae.W_dec.detach().float(), dim=1) for sae in (a, b))
    found = [(part @ others.T).max(1) for part in rows.split(ROWS)]
    return Matches(torch.cat([m.indices for m in found]), torch.cat([m.values for m in found]))


def check_one_model(a: SparseAutoencoder, b: SparseAutoencoder) -> None:
    """Refuse SAEs that record two language models.

    Raises:
        SAEError: they do.
    """
    one, other = (ModelIdentity.recorded(sae.spec) for sae in (a, b))
    if one is None or other is None:
        return
    if one.sha256 and other.sha256:
        is_one = one.sha256 == other.sha256
    else:
        is_one = same_name(one.name) == same_name(other.name)
    if not is_one:
        raise SAEError(
            f"the SAEs are of two language models, of {one} and of {other}: give two SAEs of one"
        )


@torch.no_grad()
def by_activation(
    model: LanguageModel, a: SparseAutoencoder, b: SparseAutoencoder, windows: Tensor
) -> tuple[Matches, Matches]:
    """The matches of each by correlation over the tokens of `windows` (W, L) that train both SAEs:
    no first of a window, no outlier, and none that one of them excludes.

    Raises:
        SAEError: together they have too many features, or one is for another model.
    """
    check_one_model(a, b)
    for sae in (a, b):
        if sae.spec.hook_layer >= model.n_layers or sae.spec.d_in != model.d_model:
            raise SAEError(
                f"--by activation: one SAE is of {sae.spec.site} with width {sae.spec.d_in}, and "
                f"the model has {model.n_layers} layers of width {model.d_model}; give two SAEs of "
                "one model"
            )
    n_pairs = a.spec.d_sae * b.spec.d_sae
    if n_pairs > MOST_PAIRS:
        raise SAEError(
            f"--by activation: {a.spec.d_sae} x {b.spec.d_sae} features are more than "
            f"{MOST_PAIRS:,} pairs; compare them with --by decoder"
        )
    n, cross = 0, torch.zeros(a.spec.d_sae, b.spec.d_sae, dtype=torch.float64)
    sums = [torch.zeros(3, sae.spec.d_sae, dtype=torch.float64) for sae in (a, b)]
    for both in _features(model, a, b, windows):
        f, g = (features.double().cpu() for features in both)
        n += len(f)
        cross.addmm_(f.T, g)
        for total, features in zip(sums, (f, g), strict=True):
            total += torch.stack([features.sum(0), features.pow(2).sum(0), (features > 0).sum(0)])
    is_rare = [total[2] < FEWEST_TOKENS for total in sums]
    (mean_f, square_f, _), (mean_g, square_g, _) = (total / n for total in sums)
    deviation_f = (square_f - mean_f.pow(2)).clamp(min=0).sqrt()
    deviation_g = (square_g - mean_g.pow(2)).clamp(min=0).sqrt()
    correlation = cross.div_(n).addr_(mean_f, mean_g, alpha=-1)  # in place: it may take 4 GiB
    correlation.div_(deviation_f[:, None]).div_(deviation_g)
    correlation.nan_to_num_(nan=NEVER, posinf=NEVER, neginf=NEVER)
    correlation[is_rare[0]] = NEVER
    correlation[:, is_rare[1]] = NEVER
    return _nearest(correlation, 1), _nearest(correlation, 0)


def _features(
    model: LanguageModel, a: SparseAutoencoder, b: SparseAutoencoder, windows: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """(N, F) and (N, G) of some windows at a time."""
    hooks = [Hook(sae.spec.hook_layer, sae.spec.hook_name) for sae in (a, b)]
    names = {*a.spec.excluded_tokens, *b.spec.excluded_tokens}
    excluded = token_ids(model.tokenizer, sorted(names))
    for part in windows.split(model.windows_at_once(windows.shape[1], 8)):
        found = model.activations(part, hooks)
        x, y = (found[hook].float() for hook in hooks)
        seen = seen_tokens(part, excluded).to(x.device)
        seen &= ~(a.is_outlier(x) | b.is_outlier(y))
        yield a.encode(x[seen]), b.encode(y[seen])


def _nearest(correlation: Tensor, dim: int) -> Matches:
    known = correlation.max(dim)
    return Matches(known.indices, torch.where(known.values < -1.5, torch.nan, known.values))
