"""The peers' contenders with an auxiliary loss that begins as early as ours.

By default sae-lens counts a feature as dead after 1,000 steps without firing and
dictionary-learning after ten million tokens: their auxiliary losses, which are of dead features,
stay zero in a training that is shorter. Here a feature is dead after as many tokens as in ours.
"""

from unittest.mock import patch

import peer_training
from our_training import TOKENS_TO_DEAD
from sae_figures import Data, Trained


def sae_lens(data: Data, features: int, k: int, lr: float, seed: int) -> Trained:
    """sae-lens's trainer, with `dead_feature_window` of as many tokens as ours."""
    from sae_lens.training.sae_trainer import SAETrainer

    window = max(1, TOKENS_TO_DEAD // len(data.batches[0]))
    dead = property(lambda trainer: trainer.n_forward_passes_since_fired > window)
    with patch.object(SAETrainer, "dead_neurons", dead):
        return peer_training.sae_lens(data, features, k, lr, seed)


def dictionary_learning(data: Data, features: int, k: int, lr: float, seed: int) -> Trained:
    """dictionary-learning's trainer, with `dead_feature_threshold` of as many tokens as ours."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

    threshold = property(lambda trainer: TOKENS_TO_DEAD, lambda trainer, value: None)
    with patch.object(BatchTopKTrainer, "dead_feature_threshold", threshold, create=True):
        return peer_training.dictionary_learning(data, features, k, lr, seed)
