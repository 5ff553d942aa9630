"""The kinds of SAE, one a file; a new kind is registered here and nowhere else."""

from sae_core.errors import SAEError
from sae_core.kinds.batch_topk import BatchTopKSAE
from sae_core.kinds.standard import StandardSAE
from sae_core.sae_base import SparseAutoencoder
from sae_core.sae_config import SAESpec

KINDS: dict[str, type[SparseAutoencoder]] = {"batch_topk": BatchTopKSAE, "standard": StandardSAE}


def build(spec: SAESpec) -> SparseAutoencoder:
    """An SAE of the kind that `spec.sae_type` names, with zero weights.

    Raises:
        SAEError: no such kind.
    """
    if spec.sae_type not in KINDS:
        raise SAEError(f"sae_type: {spec.sae_type!r} is not one of {', '.join(sorted(KINDS))}")
    return KINDS[spec.sae_type](spec)
