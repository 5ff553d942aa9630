"""The settings of the workflow's steps before and after a training."""

from dataclasses import dataclass

from sae_core.utils.errors import SAEError
from sae_core.utils.limits import NaturalInt, PositiveInt, check_limits


@dataclass(frozen=True)
class HarvestConfig:
    """The workflow's store of activations."""

    passes: PositiveInt = 1
    """How many different random crops of the corpus are stored; epochs take them in turn. Disk use
    grows in proportion."""

    harvest_jobs: PositiveInt = 1
    """Jobs that split the pass of one model, each writing one shard."""

    store: bool = True
    """Store the activations. Without a store, one job runs the model and trains the SAEs of a batch
    of layers on what comes out of it; each epoch is another pass, over other crops."""

    layers_per_job: PositiveInt | None = None
    """Layers per job when activations are not stored, by default all layers of a model. Each job
    runs the model up to the last of its layers, on a GPU of its own."""

    def __post_init__(self) -> None:
        check_limits(self)
        if self.store and self.layers_per_job:
            raise SAEError("--layers-per-job is for --no-store; give both or neither")
        if not self.store and (self.passes, self.harvest_jobs) != (1, 1):
            raise SAEError("--passes and --harvest-jobs are for a store; leave them out")


@dataclass(frozen=True)
class EvaluationConfig:
    """How an SAE is evaluated."""

    max_windows: PositiveInt = 256
    """Maximum number of held-out windows evaluated."""

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True)
class FeaturesConfig:
    """What the analysis of an SAE's features reads, and what its page shows."""

    corpus_windows: PositiveInt = 4096
    """Maximum number of windows read; if there are more, an evenly spaced subset."""

    top_windows: PositiveInt = 10
    """Windows shown per feature, the ones in which it is most active."""

    context_tokens: PositiveInt = 40
    """Tokens shown per window."""

    map_features: NaturalInt = 1000
    """Features on the map, the ones with the most activation in total; 0 for no map."""

    probes: bool = True
    """Train linear probes for the texts' subjects on a few features, and on the activations."""

    absorption_words: NaturalInt = 2000
    """Words of the model's vocabulary, at most, on which absorption of first-letter features is
    measured; 0 to leave it out."""

    def __post_init__(self) -> None:
        check_limits(self)
