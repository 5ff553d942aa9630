"""The analysis of an SAE's features as files.

`<run>.jsonl`: one line per shown feature, with its windows. `<run>.csv`: one row for every
feature. `<run>.json`: the corpus, the position profile, similarity, co-occurrence and subjects.
"""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sae_core.evaluation.features import (
    SPECIFIC,
    Corpus,
    FeatureTable,
    logit_effects,
)
from sae_core.evaluation.identity import density_histogram
from sae_core.evaluation.tally import BINS_AN_OCTAVE, OCTAVES
from sae_core.models.language_model import LanguageModel
from sae_core.sae_base import SparseAutoencoder

N_TOKENS = 10
"""Tokens that a feature promotes, and suppresses, that are listed."""

QUANTILES = (0.75, 0.5, 0.25, 0.05)
"""Quantiles of a feature's windows by their largest activation; one window is shown for each."""

N_PAIRS, FEW_TOKENS = 200, 8
"""How many pairs of features are listed, and on how many tokens a pair must be active together."""

N_PARTNERS = 5

N_SPECIFIC = 30
"""Features of a subject that are listed."""

COSINE_BINS = 40
"""From -1 to 1."""

UNKNOWN = "\ufffd"
"""What a part of a character decodes to."""


class Pieces:
    """Tokens as text. A character made up of several tokens is assigned to the last of them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known: dict[int, str] = {}

    def one(self, token: int) -> str:
        if token not in self.known:
            self.known[token] = self.tokenizer.decode([token])
        return self.known[token]

    def of(self, tokens: Sequence[int]) -> list[str]:
        """The texts of consecutive tokens."""
        pieces = [self.one(token) for token in tokens]
        first = 0
        for i, piece in enumerate(pieces):
            if UNKNOWN not in piece:
                first = i + 1
            elif UNKNOWN not in (whole := self.tokenizer.decode(list(tokens[first : i + 1]))):
                pieces[first : i + 1] = [""] * (i - first) + [whole]
                first = i + 1
        return pieces


class Writer:
    """Creates the contents of the files from a finished analysis."""

    def __init__(
        self, model: LanguageModel, sae: SparseAutoencoder, corpus: Corpus, table: FeatureTable
    ) -> None:
        self.model, self.sae, self.corpus, self.table = model, sae, corpus, table
        self.pieces = Pieces(model.tokenizer)
        self.occurring = corpus.windows.tokens.unique()
        self.chapters = corpus.sources.of_texts() if corpus.sources else None
        self._partners = _partners(table)

    def entries(self, chosen: dict[int, str]) -> Iterator[dict[str, Any]]:
        """One JSON object for each feature of `chosen`, which says why it is shown."""
        directions = self.sae.W_dec[list(chosen)].float()
        effects = logit_effects(self.model, directions)
        for (feature, why), effect in zip(chosen.items(), effects, strict=True):
            yield self._figures(feature, why) | {
                "promoted": self._tokens(effect),
                "suppressed": self._tokens(-effect, sign=-1),
                "neighbours": [
                    [int(other), short(float(cosine))]
                    for other, cosine in zip(
                        self.table.neighbours[feature], self.table.cosines[feature], strict=True
                    )
                ],
                "partners": self._partners.get(feature, []),
                "top": self._top(feature),
                "quantiles": self._quantiles(feature),
            }

    def _figures(self, feature: int, why: str) -> dict[str, Any]:
        tally = self.table.tally
        count, first = int(tally.count[feature]), int(tally.at_first[feature])
        return {
            "feature": feature,
            "why": why,
            "density": short(float(self.table.density[feature])),
            "tokens": count,
            "windows": int(tally.windows[feature]),
            "mean": short(float(tally.total[feature]) / max(1, count)),
            "max": short(float(self.table.best.value[feature, 0])),
            "position_0": short(first / max(1, first + count)),
            "subjects": _shares(self.table, self.corpus.subjects, feature),
            "histogram": _histogram(tally.histogram[feature]),
        }

    def _tokens(self, effect: Tensor, sign: int = 1) -> list[list[Any]]:
        """The tokens with the largest `effect` (V,), among the tokens that occur."""
        best = effect[self.occurring].topk(min(N_TOKENS, len(self.occurring)))
        tokens = self.occurring[best.indices].tolist()
        found = zip(tokens, best.values.tolist(), strict=True)
        return [[self.pieces.one(token), short(sign * value)] for token, value in found]

    def _top(self, feature: int) -> list[dict[str, Any]]:
        best = self.table.best
        filled = best.place[feature] >= 0
        records = zip(best.place[feature][filled], best.context[feature][filled], strict=True)
        return [self._window(int(place), context) for place, context in records]

    def _quantiles(self, feature: int) -> list[dict[str, Any]]:
        """Windows at `QUANTILES` of the sampled ones, each once and none that is among the top."""
        sample, best = self.table.sample, self.table.best
        order = sample.value[feature].argsort(descending=True, stable=True)
        filled = order[sample.place[feature][order] >= 0].tolist()
        shown = set(best.place[feature].tolist())
        found = []
        for quantile in QUANTILES:
            at = filled[min(int((1 - quantile) * len(filled)), len(filled) - 1)] if filled else None
            if at is None or int(sample.place[feature, at]) in shown:
                continue
            place = int(sample.place[feature, at])
            shown.add(place)
            window = self._window(place, sample.context[feature, at])
            found.append({"quantile": quantile} | window)
        return found

    def _window(self, place: int, context: Tensor) -> dict[str, Any]:
        """The tokens around a peak, with the feature's activation on each."""
        windows, before = self.corpus.windows, self.table.tally.before
        window, peak = divmod(place, windows.tokens.shape[1])
        start = max(0, peak - before)
        tokens = windows.tokens[window, start : peak - before + len(context)]
        activations = context[start - (peak - before) :][: len(tokens)].float()
        text = int(windows.text[window, peak])
        chapter = self.chapters[text] if self.chapters else None
        return {
            "text": text,
            "chapter": chapter and chapter.file,
            "subject": chapter and chapter.subject,
            "position": peak,
            "peak": peak - start,
            "tokens": self.pieces.of(tokens.tolist()),
            "activations": [short(a, 3) if a else 0 for a in activations.tolist()],
        }

    def corpus_figures(self) -> dict[str, Any]:
        """The analysis of the corpus as a whole."""
        table, tally = self.table, self.table.tally
        n_windows, n_tokens = len(self.corpus.windows.tokens), max(1, tally.n_tokens)
        return {
            "end_of_text": self.pieces.one(self.corpus.end_of_text),
            "n_tokens": tally.n_tokens,
            "n_windows": n_windows,
            "n_texts": len(self.corpus.texts),
            "window_length": self.corpus.windows.tokens.shape[1],
            "n_outlier_tokens": tally.n_outliers,
            "l0": short(float(tally.count.sum()) / n_tokens),
            "active": int(table.active.sum()),
            "density_histogram": density_histogram(table.density),
            "position": {
                "only_position_0": int(table.only_first.sum()),
                "only_position_0_share": short(float(table.only_first.double().mean())),
                "l0_position_0": short(tally.n_first_active / n_windows),
            },
            "similarity": _similarity(table),
            "co_occurrence": {
                "sampled_tokens": table.together.n_tokens,
                "pairs": _top_pairs(table),
            },
            "subjects": self._subjects(),
        }

    def _subjects(self) -> dict[str, Any]:
        table, fit = self.table, self.table.tally.windows >= 2
        found = {}
        for index, subject in enumerate(self.corpus.subjects):
            specific = fit & (table.shares[:, index] >= SPECIFIC)
            total = table.tally.total.double() * specific
            order = total.argsort(descending=True, stable=True)[:N_SPECIFIC]
            found[subject] = {
                "tokens": int(table.tally.subject_tokens[index]),
                "specific_features": int(specific.sum()),
                "most_active": [int(f) for f in order if specific[f]],
            }
        return found

    def rows(self) -> str:
        """The CSV of all features."""
        table, tally = self.table, self.table.tally
        subjects = self.corpus.subjects
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(
            ["feature", "density", "tokens", "windows", "mean", "max", "at_position_0",
             "nearest", "nearest_cosine", *(f"share_{subject}" for subject in subjects)]
        )  # fmt: skip
        nearest, cosines = table.neighbours[:, 0].tolist(), table.cosines[:, 0].tolist()
        count, total, top = tally.count.tolist(), tally.total.tolist(), self.table.best.value[:, 0]
        figures = zip(
            table.density.tolist(), count, tally.windows.tolist(), total, top.tolist(),
            tally.at_first.tolist(), nearest, cosines, table.shares.tolist(), strict=True,
        )  # fmt: skip
        for feature, (density, n, windows, sum_, most, first, near, cosine, shares) in enumerate(
            figures
        ):
            mean = short(sum_ / max(1, n))
            own = [short(density), n, windows, mean, short(most), first, near, short(cosine)]
            writer.writerow([feature, *own, *("" if math.isnan(s) else short(s) for s in shares)])
        return out.getvalue()


def short(number: float, digits: int = 4) -> float:
    """A number with this many significant digits."""
    return float(f"{number:.{digits}g}")


def _shares(table: FeatureTable, subjects: list[str], feature: int) -> dict[str, float]:
    shares = table.shares[feature].tolist()
    return {name: short(s) for name, s in zip(subjects, shares, strict=True) if not math.isnan(s)}


def _histogram(counts: Tensor) -> dict[str, Any]:
    """Histogram of one feature's activations by their log2, without the empty ends."""
    filled = counts.nonzero().squeeze(1).tolist()
    first, last = (filled[0], filled[-1]) if filled else (0, -1)
    edges = [i / BINS_AN_OCTAVE - OCTAVES for i in range(first, last + 2)]
    return {"log2_edges": edges, "counts": counts[first : last + 1].tolist()}


def _similarity(table: FeatureTable) -> dict[str, Any]:
    """Each active feature's cosine to its nearest neighbour, between decoder rows."""
    nearest = table.cosines[table.active, 0].double()
    counts, edges = torch.histogram(nearest, bins=COSINE_BINS, range=(-1.0, 1.0))
    return {
        "nearest_cosine": {
            "edges": [round(edge, 4) for edge in edges.tolist()],
            "counts": [int(count) for count in counts.tolist()],
        },
        "mean": short(float(nearest.mean())) if len(nearest) else None,
        "above_0.9": int((nearest > 0.9).sum()),
    }


def _ranked_pairs(table: FeatureTable) -> Iterator[tuple[int, int, int, float]]:
    """Pairs of features, their tokens and Jaccard's index, the closest first."""
    together = table.together
    enough = (together.tokens >= FEW_TOKENS).nonzero().squeeze(1)
    jaccard = together.jaccard[enough]
    order = enough[jaccard.argsort(descending=True, stable=True)]
    columns = (together.first, together.second, together.tokens, together.jaccard)
    yield from zip(*(column[order].tolist() for column in columns), strict=True)


def _top_pairs(table: FeatureTable) -> list[list[Any]]:
    pairs = _ranked_pairs(table)
    return [[a, b, n, short(j)] for (a, b, n, j), _ in zip(pairs, range(N_PAIRS), strict=False)]


def _partners(table: FeatureTable) -> dict[int, list[list[Any]]]:
    """For each feature, the features that are most often active together with it."""
    found: dict[int, list[list[Any]]] = {}
    for a, b, tokens, jaccard in _ranked_pairs(table):
        for one, other in ((a, b), (b, a)):
            if len(mine := found.setdefault(one, [])) < N_PARTNERS:
                mine.append([other, short(jaccard), tokens])
    return found
