"""What the analysis of features says besides counts: map, probes and absorption."""

from typing import Any

from sae_core.evaluation.absorption import first_letter_absorption
from sae_core.evaluation.feature_map import feature_map
from sae_core.evaluation.features import Corpus, FeatureTable
from sae_core.evaluation.probes import probe_subjects
from sae_core.evaluation.window_means import WindowMeans
from sae_core.models.language_model import LanguageModel
from sae_core.sae.precision import Precision
from sae_core.sae_base import SparseAutoencoder
from sae_core.settings.steps import FeaturesConfig
from sae_core.train_config import BatchSize


def feature_figures(
    model: LanguageModel,
    sae: SparseAutoencoder,
    corpus: Corpus,
    table: FeatureTable,
    means: WindowMeans | None,
    config: FeaturesConfig,
    batch_size: BatchSize,
    precision: Precision,
) -> dict[str, Any]:
    """`map`, `probes` and `absorption` as JSON values; null where there is nothing to measure.

    Args:
        table: of the finished pass over the corpus.
        means: of its windows, if probes are wanted.
    """
    seed = sae.spec.metadata.get("seed") or 0
    samples = means.samples() if means else None
    W_dec = None if sae.spec.target_hook_name else sae.W_dec
    return {
        "map": feature_map(sae.W_dec, table, config.map_features, seed),
        "probes": samples and probe_subjects(samples, corpus.subjects, W_dec, seed),
        "absorption": first_letter_absorption(
            model, sae, config.absorption_words, corpus.file.bos, batch_size, precision, seed
        ),
    }
