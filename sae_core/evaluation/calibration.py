"""A threshold for SAEs that have none: BatchTopK SAEs of this trainer's predecessor, which kept
the N*k largest features of a batch even at inference.

Such an SAE is calibrated on the texts that it is used on, so that its tokens have k active features
on average. The threshold holds for these texts only: the next texts get their own.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sae_core.models.language_model import Hook, LanguageModel
from sae_core.sae.normalisation import OUTLIER_FACTOR
from sae_core.sae_base import SparseAutoencoder
from sae_core.train_config import BatchSize

WINDOWS = 256
"""Windows that a threshold is found on, at most."""


@contextmanager
def calibrated(
    model: LanguageModel, sae: SparseAutoencoder, windows: Tensor, batch_size: BatchSize
) -> Iterator[dict[str, Any]]:
    """While this lasts, `sae` has a threshold: its own, or one that gives the tokens of `windows`
    (W, L) `top_k` active features on average.

    Position 0 and outliers, which do not count in the evaluation, do not count here.

    Yields:
        what to record of that, as JSON values; nothing for an SAE that has a threshold.
    """
    if sae.threshold is not None:
        yield {}
        return
    x = _counted_activations(model, sae, windows, batch_size)
    sae.calibrate(x)
    threshold = float(sae.known_threshold)
    print(
        f"{sae.spec.site}: the SAE was stored without a threshold; {threshold:.6g} gives these "
        f"texts {sae.spec.top_k} active features per token on average",
        file=sys.stderr,
        flush=True,
    )
    try:
        yield {"calibration": {"threshold": threshold, "n_tokens": len(x)}}
    finally:
        sae.threshold = None


def _counted_activations(
    model: LanguageModel, sae: SparseAutoencoder, windows: Tensor, batch_size: BatchSize
) -> Tensor:
    """(N, D) the activations of at most `WINDOWS` evenly spaced windows."""
    if len(windows) > WINDOWS:
        windows = windows[torch.arange(WINDOWS) * len(windows) // WINDOWS]
    hook = Hook(sae.spec.hook_layer, sae.spec.hook_name)
    microbatch = model.forward_microbatch(windows.shape[1], batch_size)
    found = microbatch.parts(len(windows), lambda at: model.activations(windows[at], [hook])[hook])
    x = torch.cat([part[:, 1:].float().flatten(0, 1) for part in found])
    norms = x.norm(dim=-1)
    return x[norms <= OUTLIER_FACTOR * norms.median()]
