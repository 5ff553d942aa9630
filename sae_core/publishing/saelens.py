"""SAELens's format (6.x): `cfg.json` and `sae_weights.safetensors`.

Its architectures encode as the kinds that are exported as one do ("jumprelu" is
`f = relu(pre) * (pre > threshold)` with `pre = (x - b_dec) @ W_enc + b_enc`), so that the tensors
go over as they are.
"""

import json
from typing import Any

from safetensors.torch import save

from sae_core.sae_base import SparseAutoencoder

SAELENS_VERSION = "6.0.0"
"""The version whose format this is; SAELens drops the names below it when there is none."""


def saelens_files(sae: SparseAutoencoder) -> dict[str, bytes]:
    """The two files that `SAE.load_from_disk` of SAELens reads."""
    spec, origin = sae.spec, sae.spec.metadata
    tensors = {name: t.detach().contiguous() for name, t in sae.saelens_tensors().items()}
    config: dict[str, Any] = sae.saelens_config() | {
        "d_in": spec.d_in,
        "d_sae": spec.d_sae,
        "dtype": spec.dtype,
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "model_name": origin["model_name"],
            "hook_name": spec.hook_spec,
            "hook_head_index": None,
            "context_size": origin["max_text_length"],
            "prepend_bos": origin["prepend_bos"],
            "dataset_path": origin["data_file"],
            "model_from_pretrained_kwargs": {},
        },
    }
    return {
        "cfg.json": (json.dumps(config, indent=2) + "\n").encode(),
        "sae_weights.safetensors": save(tensors),
    }
