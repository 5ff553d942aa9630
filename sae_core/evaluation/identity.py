"""What the files about an SAE share: whose figures they are, and the form of a histogram."""

from typing import Any

import torch
from torch import Tensor

from sae_core.sae.config import SAESpec
from sae_core.utils.naming import without_paths

DENSITY_BINS = 40
"""Bins of the histogram of log10 densities, from one in a million to one."""


def identity(run_name: str, spec: SAESpec, model_name: str | None = None) -> dict[str, Any]:
    """Which SAE a file is about, as its JSON begins; `model_name` is for an SAE that does not
    record the model."""
    return {
        "run_name": run_name,
        "model_name": without_paths(spec.metadata.get("model_name") or model_name),
        "hook_spec": spec.site,
        "sae_type": spec.sae_type,
        "d_in": spec.d_in,
        "d_sae": spec.d_sae,
        "top_k": spec.top_k,
    }


def density_histogram(density: Tensor) -> dict[str, Any]:
    """Histogram of the log10 of features' densities (F,); features that never fired are
    counted separately."""
    alive = density[density > 0].double().cpu().log10().clamp(min=-6.0)
    counts, edges = torch.histogram(alive, bins=DENSITY_BINS, range=(-6.0, 0.0))
    return {
        "log10_edges": [round(edge, 6) for edge in edges.tolist()],
        "counts": [int(count) for count in counts.tolist()],
        "never": int((density == 0).sum()),
    }
