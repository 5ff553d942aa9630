"""The kinds of SAE, one per file, and their registry; settings and names are in `sae/config.py`."""

from sae_core.sae.config import SAESpec
from sae_core.sae.kinds.batch_topk import BatchTopKSAE
from sae_core.sae.kinds.gated import GatedSAE
from sae_core.sae.kinds.jumprelu import JumpReLUSAE
from sae_core.sae.kinds.matryoshka_batch_topk import MatryoshkaBatchTopKSAE
from sae_core.sae.kinds.multi_batch_topk import MultiBatchTopKSAE
from sae_core.sae.kinds.standard import StandardSAE
from sae_core.sae.kinds.topk import TopKSAE
from sae_core.sae_base import SparseAutoencoder
from sae_core.utils.errors import SAEError

KINDS: dict[str, type[SparseAutoencoder]] = {
    "batch_topk": BatchTopKSAE,
    "topk": TopKSAE,
    "matryoshka_batch_topk": MatryoshkaBatchTopKSAE,
    "multi_batch_topk": MultiBatchTopKSAE,
    "jumprelu": JumpReLUSAE,
    "gated": GatedSAE,
    "standard": StandardSAE,
}


def build(spec: SAESpec) -> SparseAutoencoder:
    """An SAE of the kind that `spec.sae_type` names, with zero weights.

    Raises:
        SAEError: no such kind.
    """
    if spec.sae_type not in KINDS:
        raise SAEError(f"sae_type: {spec.sae_type!r} is not one of {', '.join(sorted(KINDS))}")
    return KINDS[spec.sae_type](spec)
