"""Sparse probes for the subjects of texts, with two ways to choose the texts that train them.

In order: the first three quarters of every subject, as the analysis of features reports it; of
books, the test is on later chapters. At random: three quarters of every subject's texts, as
SAEBench splits its data sets; a mean of `--draws`. "Above chance" is a sparse probe's accuracy less
0.5, over the same of the dense one. All SAEs must be of one hook and one window length.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe

from sae_core.activations.token_windows import seen_tokens
from sae_core.corpus.token_file import TokenFile
from sae_core.evaluation.features import Corpus
from sae_core.evaluation.probes import PROBED, probe_subjects
from sae_core.evaluation.window_means import Samples, WindowMeans
from sae_core.formats.checkpoint import load_sae
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.models.model_sources import ModelRecord
from sae_core.sae_base import SparseAutoencoder
from sae_core.settings.steps import FeaturesConfig
from sae_core.train_config import ModelConfig

BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("saes", type=Path, nargs="+", help="SAE directories")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of tokenised texts")
    parser.add_argument("--record", type=Path, required=True, help="the language model's record")
    parser.add_argument("--draws", type=int, default=3)
    options = parser.parse_args()
    saes = [load_sae(folder).requires_grad_(False) for folder in options.saes]
    spec, path = saes[0].spec, ModelRecord.load(options.record).path
    model = LanguageModel.load(ModelConfig(model_name=path), torch.device("cpu"), spec.window)
    corpus = Corpus.read(TokenFile.open(options.tokens), spec, FeaturesConfig.corpus_windows)
    print(f"Sparse probes ({describe('scikit-learn')})\n")
    shown = (*map(str, PROBED), *(f"{k} above chance" for k in PROBED))
    print("| " + " | ".join(("SAE", "texts", "dense", *shown)) + " |")
    print("|---|---|" + "--:|" * (1 + len(shown)))
    for number, (samples, text) in enumerate(of_all(model, saes, corpus)):
        found = probed(samples, corpus)
        print(row(number, "in order", [found]), flush=True)
        draws = [probed(mixed(samples, text, seed), corpus) for seed in range(options.draws)]
        print(row(number, "at random", draws), flush=True)


@torch.no_grad()
def of_all(
    model: LanguageModel, saes: list[SparseAutoencoder], corpus: Corpus
) -> Iterator[tuple[Samples, np.ndarray]]:
    """For each SAE its samples, and the text (W,) that each of the W windows begins in."""
    subjects = corpus.subject_of_texts()
    assert subjects is not None, "the texts have no subjects"
    all_means, texts = [WindowMeans() for _ in saes], []
    hook = Hook(saes[0].spec.hook_layer, saes[0].spec.hook_name)
    norm = saes[0].spec.metadata.get("outlier_norm", torch.inf)
    windows = corpus.windows
    for tokens, text in zip(windows.tokens.split(BATCH), windows.text.split(BATCH), strict=True):
        x, subject = model.activations(tokens, [hook])[hook].float(), subjects[text.long()]
        counted = seen_tokens(tokens, []) & (x.norm(dim=-1) <= norm)
        for sae, means in zip(saes, all_means, strict=True):
            means.add(x, sae.encode_sparse(x.flatten(0, 1)), counted, subject)
        texts.append(text[:, 0][(subject == subject[:, :1]).all(1) & counted.any(1)])
    for means in all_means:
        samples = means.samples()
        assert samples is not None
        yield samples, torch.cat(texts).numpy()


def mixed(samples: Samples, text: np.ndarray, seed: int) -> Samples:
    """The windows with their texts in another order, of which the first train a probe."""
    place = np.random.default_rng(seed).permutation(int(text.max()) + 1)[text]
    order = np.argsort(place, kind="stable")
    return Samples(samples.x[order], samples.code[order], samples.subject[order])


def probed(samples: Samples, corpus: Corpus) -> dict[str, Any]:
    found = probe_subjects(samples, corpus.subjects, None, 0)
    assert found is not None, "fewer than two subjects have enough windows"
    return dict(found["mean"])


def row(number: int, split: str, found: list[dict[str, Any]]) -> str:
    dense = np.mean([of["dense"] for of in found])
    sparse = np.mean([[of["sae"][str(k)] for k in PROBED] for of in found], axis=0)
    figures = (dense, *sparse, *(sparse - 0.5) / (dense - 0.5))
    return f"| {number + 1} | {split} | " + " | ".join(f"{figure:.3f}" for figure in figures) + " |"


if __name__ == "__main__":
    main()
