"""The analysis of an SAE's features as files.

`<run>.jsonl`: one line per active feature, with its label and its windows, the most telling ones
first. `<run>.csv`: one row for every feature. `<run>.json`: the corpus, the position profile,
similarity, co-occurrence and subjects.

Bytes in addition to the tally (`tally.py`): those of `Words`, 8 `features.ROWS` F for the cosines,
40 `features.LOGITS`, and some 400 F for labels and partners. The lines are made one at a time.
"""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sae_core.evaluation.default_labels import DefaultLabels
from sae_core.evaluation.features import SPECIFIC, Corpus, FeatureTable, logit_effects
from sae_core.evaluation.identity import density_histogram
from sae_core.evaluation.tally import BINS_AN_OCTAVE, OCTAVES
from sae_core.evaluation.words import Pieces, Words
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


class Writer:
    """Creates the contents of the files from a finished analysis."""

    def __init__(
        self, model: LanguageModel, sae: SparseAutoencoder, corpus: Corpus, table: FeatureTable
    ) -> None:
        self.model, self.sae, self.corpus, self.table = model, sae, corpus, table
        self.pieces = Pieces(model.tokenizer)
        self.words = Words(self.pieces, corpus.windows.tokens, corpus.file.end_of_text)
        self.labels = DefaultLabels(table, self.words, corpus.subjects).of_all()
        self.occurring = corpus.windows.tokens.unique()
        self._names = [self.pieces.one(token) for token in self.occurring.tolist()]
        self._text = corpus.windows.text.numpy()
        self._partners = _partners(table)

    def telling_order(self) -> list[int]:
        """The active features, those first whose label says most."""
        scores = torch.tensor([label.score for label in self.labels], dtype=torch.float64)
        order = scores.argsort(descending=True, stable=True)
        return order[self.table.active[order]].tolist()

    def entries(self, features: Sequence[int]) -> Iterator[dict[str, Any]]:
        """One JSON object for each of the features."""
        directions = self.sae.W_dec[list(features)].float()
        n_tokens = min(N_TOKENS, len(self.occurring))
        nearest, cosines = self.table.neighbours.numpy(), self.table.cosines.numpy()
        for rows, effects in logit_effects(self.model, directions, self.occurring):
            promoted, suppressed = effects.topk(n_tokens), (-effects).topk(n_tokens)
            for number, up, down in zip(
                rows.tolist(),
                self._tokens(promoted.indices, promoted.values),
                self._tokens(suppressed.indices, -suppressed.values),
                strict=True,
            ):
                feature = features[number]
                near = zip(nearest[feature].tolist(), cosines[feature].tolist(), strict=True)
                yield self._figures(feature) | {
                    "promoted": up,
                    "suppressed": down,
                    "neighbours": [[other, short(cosine)] for other, cosine in near],
                    "partners": self._partners.get(feature, []),
                    "top": self._top(feature),
                    "quantiles": self._quantiles(feature),
                }

    def _figures(self, feature: int) -> dict[str, Any]:
        tally, label = self.table.tally, self.labels[feature]
        count, first = int(tally.count[feature]), int(tally.at_first[feature])
        return {
            "feature": feature,
            "label": label.text,
            "peaks": [list(peak) for peak in label.peaks],
            "density": short(float(self.table.density[feature])),
            "tokens": count,
            "windows": int(tally.windows[feature]),
            "mean": short(float(tally.total[feature]) / max(1, count)),
            "max": short(float(self.table.best.value[feature, 0])),
            "position_0": short(first / max(1, first + count)),
            "subjects": _shares(self.table, self.corpus.subjects, feature),
            "histogram": _histogram(tally.histogram[feature]),
        }

    def _tokens(self, indices: Tensor, effects: Tensor) -> Iterator[list[list[Any]]]:
        """For each row of indices (r, n) into `occurring`: the tokens, and how a feature changes
        their logits."""
        for row, changes in zip(indices.tolist(), effects.tolist(), strict=True):
            yield [[self._names[i], short(by)] for i, by in zip(row, changes, strict=True)]

    def _top(self, feature: int) -> list[dict[str, Any]]:
        best = self.table.best
        places, contexts = best.place[feature].tolist(), best.context[feature].tolist()
        return [self._window(p, c) for p, c in zip(places, contexts, strict=True) if p >= 0]

    def _quantiles(self, feature: int) -> list[dict[str, Any]]:
        """Windows at `QUANTILES` of the sampled ones, each once and none that is among the top."""
        sample, best = self.table.sample, self.table.best
        places, values = sample.place[feature].tolist(), sample.value[feature].tolist()
        filled = [at for at, place in enumerate(places) if place >= 0]
        filled.sort(key=values.__getitem__, reverse=True)
        shown = set(best.place[feature].tolist())
        found = []
        for quantile in QUANTILES:
            at = filled[min(int((1 - quantile) * len(filled)), len(filled) - 1)] if filled else None
            if at is None or places[at] in shown:
                continue
            place = places[at]
            shown.add(place)
            window = self._window(place, sample.context[feature, at].tolist())
            found.append({"quantile": quantile} | window)
        return found

    def _window(self, place: int, context: list[float]) -> dict[str, Any]:
        """The tokens around a peak, with the feature's activation on each."""
        windows, before = self.corpus.windows, self.table.tally.before
        window, peak = divmod(place, windows.tokens.shape[1])
        start = max(0, peak - before)
        pieces = self.words.pieces[window][start : peak - before + len(context)]
        activations = context[start - (peak - before) :][: len(pieces)]
        text = int(self._text[window, peak])
        chapter = self.corpus.chapter(text)
        return {
            "text": text,
            "chapter": chapter and chapter.file,
            "subject": chapter and chapter.subject,
            "position": peak,
            "peak": peak - start,
            "tokens": pieces,
            "activations": [short(a, 3) if a else 0 for a in activations],
        }

    def corpus_figures(self) -> dict[str, Any]:
        """The analysis of the corpus as a whole."""
        table, tally = self.table, self.table.tally
        n_windows, n_tokens = len(self.corpus.windows.tokens), max(1, tally.n_tokens)
        return {
            "end_of_text": self.pieces.one(self.corpus.file.end_of_text),
            "n_tokens": tally.n_tokens,
            "n_windows": n_windows,
            "n_texts": len(self.corpus.file.texts),
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
            ["feature", "label", "density", "tokens", "windows", "mean", "max", "at_position_0",
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
            label = self.labels[feature].text
            own = [label, short(density), n, windows, mean, short(most), first, near, short(cosine)]
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
    numbers = counts.tolist()
    filled = [i for i, n in enumerate(numbers) if n]
    first, last = (filled[0], filled[-1]) if filled else (0, -1)
    edges = [i / BINS_AN_OCTAVE - OCTAVES for i in range(first, last + 2)]
    return {"log2_edges": edges, "counts": numbers[first : last + 1]}


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


def _ranked_pairs(table: FeatureTable) -> Tensor:
    """(Q,) indices of the pairs of features that are often enough together, the closest first."""
    enough = (table.together.tokens >= FEW_TOKENS).nonzero().squeeze(1)
    return enough[table.together.jaccard[enough].argsort(descending=True, stable=True)]


def _top_pairs(table: FeatureTable) -> list[list[Any]]:
    """[feature, feature, tokens with both, Jaccard, PMI in bits, correlation]."""
    together, best = table.together, _ranked_pairs(table)[:N_PAIRS]
    counts = (together.first, together.second, together.tokens)
    measures = (together.jaccard, together.pmi, together.correlation)
    pairs = zip(*(column[best].tolist() for column in (*counts, *measures)), strict=True)
    return [[a, b, n, *map(short, found)] for a, b, n, *found in pairs]


def _partners(table: FeatureTable) -> dict[int, list[list[Any]]]:
    """For each feature, the features that are most often active together with it."""
    together, pairs = table.together, _ranked_pairs(table)
    one = torch.stack([together.first[pairs], together.second[pairs]], 1).flatten()
    other = torch.stack([together.second[pairs], together.first[pairs]], 1).flatten()
    pair = pairs.repeat_interleave(2)
    order = one.argsort(stable=True)
    _, counts = torch.unique_consecutive(one[order], return_counts=True)
    rank = torch.arange(len(order)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    kept = order[rank < N_PARTNERS]
    found: dict[int, list[list[Any]]] = {}
    for mine, partner, jaccard, tokens in zip(
        one[kept].tolist(), other[kept].tolist(), together.jaccard[pair[kept]].tolist(),
        together.tokens[pair[kept]].tolist(), strict=True,
    ):  # fmt: skip
        found.setdefault(mine, []).append([partner, short(jaccard), tokens])
    return found
