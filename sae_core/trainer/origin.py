"""A training that begins with an SAE instead of random weights: whether it can, and how.

The optimizer and the counts of dead features are new. Activations are centred and scaled as they
are measured on the new texts, and the SAE's weights with them, so that it reconstructs what it did.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from sae_core.models.language_model import Hook
from sae_core.pretrained import Origin, load_origin
from sae_core.sae.config import SAEConfig, SAESpec
from sae_core.sae.conversion import take_over
from sae_core.sae.normalisation import Normalisation
from sae_core.sae_base import SparseAutoencoder
from sae_core.utils.errors import SAEError
from sae_core.utils.naming import hook_label, hook_spec, same_name


def origin_of(
    sae: SAEConfig, hook: Hook, target: Hook | None, d_in: int, model_name: str, output: Path
) -> Origin | None:
    """The SAE that a training begins with; None if it begins with random weights.

    Args:
        sae: what is to be trained, at `hook` (with a `target`: a transcoder) of the model.
        output: the SAE directory that the training writes.

    Raises:
        SAEError: there is no such SAE, or it is of another hook, width or model, or larger.
    """
    name = sae.origin(hook.layer)
    if name is None:
        return None
    origin = load_origin(name, output)
    spec, where = origin.sae.spec, f"--init-from {name}"
    site = hook_spec(hook.layer, hook_label(hook.hook_name, target.hook_name if target else ""))
    if spec.site != site:
        raise SAEError(
            f"{where}: an SAE of {spec.site}, but this one is of {site}; change --hook-layer and "
            "--hook-name, or give one of this hook"
        )
    if spec.d_in != d_in:
        raise SAEError(
            f"{where}: reads activations of width {spec.d_in}, but they have {d_in} at {site} of "
            f"{model_name}; give an SAE of this model"
        )
    _check_model(where, spec, model_name)
    _check_size(where, spec, sae, d_in)
    return origin


def _check_model(where: str, spec: SAESpec, model_name: str) -> None:
    """SAELens names a model without its owner; some SAEs name none."""
    recorded = same_name(spec.metadata.get("model_name") or model_name)
    given = same_name(model_name)
    if recorded not in (given, given.rpartition("/")[2]):
        raise SAEError(
            f"{where}: an SAE of {spec.metadata['model_name']}, but --model-name is {model_name}; "
            "change it, or if that is another name of this model, convert the SAE with "
            f"import_sae.py --model-name {model_name}"
        )


def _check_size(where: str, spec: SAESpec, sae: SAEConfig, d_in: int) -> None:
    if spec.d_sae > sae.n_features(d_in):
        raise SAEError(
            f"{where}: has {spec.d_sae} features, but --sae-expansion {sae.sae_expansion} makes "
            f"{sae.n_features(d_in)}; use --sae-expansion {-(-spec.d_sae // d_in)} or more"
        )


def begin_with(origin: Origin, sae: SparseAutoencoder, normalise: Normalisation, x: Tensor) -> None:
    """Give an initialised SAE the weights of its origin.

    Args:
        normalise: how activations enter `sae`.
        x: (N, D) of the first batch, as they enter it.
    """
    target: Any = normalise.target and (normalise.target.mean, normalise.target.scale)
    take_over(sae, origin.sae.unfolded(normalise.mean, normalise.scale, target), x)
