"""The models and SAEs that a configuration asks for, by name and by layer."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from sae_core.formats.sae_places import content_hashes, local_folder
from sae_core.models.model_sources import SourceConfig
from sae_core.sae.config import SAEConfig
from sae_core.train_config import (
    DataConfig,
    HookConfig,
    ModelConfig,
    PublishingConfig,
    RuntimeConfig,
)
from sae_core.utils.naming import hook_spec, middle_layer, model_id, run_name

SAES = "results/saes"
"""Where the workflow's SAE directories are."""


@dataclass(frozen=True)
class ModelPlan:
    """A language model, and the SAEs to train on it."""

    name: str
    source: SourceConfig
    model: ModelConfig
    layers: tuple[int | str, ...]
    """0-based layers, or the word `middle`."""
    hook: HookConfig
    data: DataConfig
    runtime: RuntimeConfig
    publishing: PublishingConfig
    saes: tuple[SAEConfig, ...]

    @property
    def model_id(self) -> str:
        return model_id(self.name)

    @property
    def needs_depth(self) -> bool:
        """Whether its layers are unknown until the model's number of layers is known."""
        return "middle" in self.layers

    def batch_of(self, layer: int | str, harvested: Iterable[str]) -> str:
        """The batch of layers that one pass of the model serves, and that holds `layer`.

        A layer stays in the batch it was first harvested in: `harvested` are the names of the
        batches that exist. The layers in none of them form a new batch. So a layer that is added
        later is harvested alone, and nothing that hangs on the old activations runs again.
        """
        held = {label: batch for batch in harvested for label in batch.split("+")}
        label = str(layer)
        if label in held:
            return held[label]
        return "+".join(str(layer) for layer in self.layers if str(layer) not in held)

    def resolve(self, layer: int | str, n_layers: int | None) -> int:
        """The layer as a number; `n_layers` is needed for `middle` only."""
        if layer == "middle":
            assert n_layers is not None
            return middle_layer(n_layers, self.hook.middle_layer_strategy)
        return int(layer)

    def hook_specs(self, batch: str, n_layers: int | None) -> list[str]:
        """The full names of the hooks of a batch of layers."""
        layers = [self.resolve(label, n_layers) for label in batch.split("+")]
        names = filter(None, (self.hook.hook_name, self.hook.target_hook_name))
        return [hook_spec(layer, name) for name in names for layer in layers]

    def runs(self, n_layers: int | None) -> Iterator["RunPlan"]:
        """The SAEs of this model."""
        for label in self.layers:
            layer = self.resolve(label, n_layers)
            for sae in self.saes:
                name = run_name(self.name, layer, self.hook.label, sae.tag, sae.sae_expansion)
                yield RunPlan(name, self, label, layer, sae)

    @cached_property
    def _by_name(self) -> "dict[int | None, dict[str, RunPlan]]":
        return {}

    def runs_by_name(self, n_layers: int | None) -> "dict[str, RunPlan]":
        """The same by name, listed once: a thousand SAEs ask thousands of times."""
        if n_layers not in self._by_name:
            self._by_name[n_layers] = {run.name: run for run in self.runs(n_layers)}
        return self._by_name[n_layers]

    def origin_run(self, run: "RunPlan", n_layers: int | None) -> str | None:
        """The name of the SAE that a training begins with, if this configuration makes it too."""
        if run.origin is None:
            return None
        folder, _, name = run.origin.rpartition("/")
        if folder not in ("", SAES) or name not in self.runs_by_name(n_layers):
            return None
        return name


@dataclass(frozen=True)
class RunPlan:
    """One SAE to train."""

    name: str
    model: ModelPlan
    label: int | str
    """The layer as the configuration has it: a number, or `middle`."""
    layer: int
    sae: SAEConfig

    @property
    def hook_spec(self) -> str:
        return hook_spec(self.layer, self.model.hook.hook_name)

    @property
    def origin(self) -> str | None:
        """The SAE that the training begins with; None for random weights."""
        return self.sae.origin(self.layer)

    @property
    def origin_sha256(self) -> dict[str, str]:
        """Of the files of an origin that lies on this disk, by name; a change retrains.

        Raises:
            SAEError: they cannot be read.
        """
        folder = local_folder(self.origin) if self.origin else None
        return content_hashes(folder) if folder else {}
