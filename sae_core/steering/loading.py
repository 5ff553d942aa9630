"""SAEs and the language model that they were trained on, by their names."""

from collections.abc import Sequence
from dataclasses import asdict

from sae_core.models.language_model import LanguageModel
from sae_core.models.model_sources import model_of
from sae_core.pretrained import load_pretrained
from sae_core.sae.config import SAESpec
from sae_core.sae_base import SparseAutoencoder
from sae_core.train_config import ComputeConfig, LoadConfig, ModelConfig
from sae_core.utils.devices import pick_device
from sae_core.utils.naming import same_name


def load_pair(
    sae_name: str,
    model_name: str | None = None,
    load: LoadConfig | None = None,
    device: str = ComputeConfig.device,
) -> tuple[SparseAutoencoder, LanguageModel]:
    """The two of them, the SAE in float32 on the model's device.

    Args:
        sae_name: as `load_pretrained` takes it.
        model_name: Hub id or directory; by default the Hub id that the SAE records.

    Raises:
        SAEError: one of them is not there, or the SAE records no model that can be fetched.
    """
    sae = load_pretrained(sae_name)
    model = load_model_of([sae.spec], model_name, load, device)
    return sae.to(model.device).float(), model


def load_model_of(
    specs: Sequence[SAESpec],
    model_name: str | None = None,
    load: LoadConfig | None = None,
    device: str = ComputeConfig.device,
) -> LanguageModel:
    """The language model of one or several SAEs, at the commit that the first records.

    Raises:
        SAEError: they record no common model that can be fetched.
    """
    name = model_of(specs, model_name)
    known = specs[0].metadata
    is_recorded = same_name(known.get("model_name") or "") == same_name(name)
    commit = known.get("model_commit") if is_recorded else None
    settings = asdict(load or LoadConfig())
    config = ModelConfig(model_name=name, revision=commit, **settings)
    return LanguageModel.load(config, pick_device(device))
