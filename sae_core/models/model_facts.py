"""What is known about a model before its weights are loaded: depth, width, hooks, context."""

from collections.abc import Sequence
from typing import NamedTuple

from sae_core.models.architectures import block_component
from sae_core.models.language_model import Hook
from sae_core.models.model_configuration import context_length, read_configuration
from sae_core.models.model_places import cannot_load, model_place
from sae_core.models.offered_hooks import offered_hooks
from sae_core.train_config import ModelConfig
from sae_core.utils.errors import SAEError


class ModelFacts(NamedTuple):
    """What is known about a model before its weights are loaded."""

    n_layers: int
    d_model: int
    commit: str | None
    """Commit of the Hub's repository; None for a local directory."""
    hook_names: tuple[str, ...]
    context_length: int | None
    """Tokens that it reads at most; None without a limit."""


def check_hook(
    hook: Hook, n_layers: int, hook_names: Sequence[str], option: str = "--hook-name"
) -> Hook:
    """`hook`, if a model with `n_layers` layers and these hooks has it.

    Raises:
        SAEError: no such layer or hook.
    """
    if not 0 <= hook.layer < n_layers:
        raise SAEError(f"--hook-layer {hook.layer}: the model's layers are 0 to {n_layers - 1}")
    if hook.hook_name not in hook_names:
        raise SAEError(f"{option} {hook.hook_name}: this model has {', '.join(hook_names)}")
    return hook


def model_facts(config: ModelConfig) -> ModelFacts:
    """Read a model's configuration, from the Hub or a local directory.

    Raises:
        SAEError: there is no such model, or TransformerLens does not know its architecture.
    """
    name, place = config.model_name, model_place(config)
    found = read_configuration(name, place, config.trust_remote_code)
    try:
        text = found.get_text_config()
        n_layers, d_model = text.num_hidden_layers, text.hidden_size
        architecture = found.architectures[0]
    except (TypeError, AttributeError) as error:
        raise cannot_load(name, error) from error
    block_component(found, architecture)
    try:
        hook_names = offered_hooks(found, config.trust_remote_code)
    except Exception as error:  # a model's own code may raise anything
        raise cannot_load(name, error) from error
    return ModelFacts(n_layers, d_model, place.commit, hook_names, context_length(found))
