"""SAEs and the language model that they were trained on, by their names."""

from collections.abc import Mapping
from dataclasses import asdict

from sae_core.evaluation.unseen import ModelIdentity, check_model
from sae_core.models.language_model import LanguageModel
from sae_core.models.model_sources import model_of
from sae_core.pretrained import load_pretrained
from sae_core.sae.config import SAESpec
from sae_core.sae_base import SparseAutoencoder
from sae_core.train_config import ComputeConfig, LoadConfig, ModelConfig
from sae_core.utils.devices import pick_device
from sae_core.utils.errors import SAEError
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
        SAEError: one of them is not there, the SAE records no model that can be fetched, or it was
            trained on another one.
    """
    try:
        sae = load_pretrained(sae_name)
    except SAEError as error:
        raise type(error)(f"--sae {error}") from error
    model = load_model_of({sae_name: sae.spec}, model_name, load, device)
    return sae.to(model.device).float(), model


def load_model_of(
    specs: Mapping[str, SAESpec],
    model_name: str | None = None,
    load: LoadConfig | None = None,
    device: str = ComputeConfig.device,
) -> LanguageModel:
    """The language model of one or several SAEs, by their names, at the commit that the first
    records.

    Raises:
        SAEError: they record no common model that can be fetched, or were trained on another one.
    """
    name = model_of([*specs.values()], model_name)
    known = next(iter(specs.values())).metadata
    is_recorded = same_name(known.get("model_name") or "") == same_name(name)
    commit = known.get("model_commit") if is_recorded else None
    settings = asdict(load or LoadConfig())
    config = ModelConfig(model_name=name, revision=commit, **settings)
    given = ModelIdentity.given(config)
    for sae_name, spec in specs.items():
        check_model(sae_name, spec, given, "--model-name")
    return LanguageModel.load(config, pick_device(device))
