"""SAELens's format (6.x): `cfg.json` and `sae_weights.safetensors`.

Its architectures encode as the kinds that are exported as one do ("jumprelu" is
`f = relu(pre) * (pre > threshold)` with `pre = (x - b_dec) @ W_enc + b_enc`), so the tensors
are copied unchanged. The same holds for its transcoders, which take x itself, not `x - b_dec`. It
has no TopK or gated transcoders; these become SAEs of these architectures that take x itself, which
compute the same.

It has no rule for outliers: it encodes and replaces them like all other activations. `cfg.json`
says so, with the norm beyond which our SAE leaves them as they are.
"""

import json
from typing import Any

from safetensors.torch import save

from sae_core.sae.config import OUTLIER_NORMS, SAESpec
from sae_core.sae_base import SparseAutoencoder
from sae_core.utils.naming import without_paths

SAELENS_VERSION = "6.0.0"
"""The version whose format this is; SAELens drops the names below it when there is none."""


TRANSCODERS = {"jumprelu": "jumprelu_transcoder", "standard": "transcoder"}
"""SAELens's transcoders by the architecture of the SAE that encodes likewise."""


ORIGIN = {
    "model_name": "model_name",
    "context_size": "max_text_length",
    "prepend_bos": "prepend_bos",
    "dataset_path": "data_file",
}
"""Our names of what an SAE was made from, by SAELens's."""


OUTLIERS = (
    "sae_core leaves activations longer than outlier_norm as they are, because the SAE was not "
    "trained on them; SAELens has no such rule and replaces them by reconstructions"
)
"""What a reader of `cfg.json` has to know."""


def saelens_files(sae: SparseAutoencoder) -> dict[str, bytes]:
    """The two files that `SAE.load_from_disk` of SAELens reads. Unknown facts about the SAE's
    origin are left out, because SAELens treats a missing key as unknown.

    Raises:
        SAEError: its threshold is not known.
    """
    spec, origin = sae.spec, without_paths(sae.spec.metadata)
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
            "hook_name": spec.hook_spec,
            "hook_head_index": None,
            "model_from_pretrained_kwargs": {},
            **{theirs: origin[ours] for theirs, ours in ORIGIN.items() if ours in origin},
            **_about_outliers(spec),
        },
    }
    if spec.target_hook_name:
        config["apply_b_dec_to_input"] = False
        config["metadata"]["hook_name_out"] = spec.target_hook_spec
        if config["architecture"] in TRANSCODERS:
            config |= {"architecture": TRANSCODERS[config["architecture"]], "d_out": spec.d_in}
    return {
        "cfg.json": (json.dumps(config, indent=2) + "\n").encode(),
        "sae_weights.safetensors": save(tensors),
    }


def _about_outliers(spec: SAESpec) -> dict[str, Any]:
    """What SAELens does not reproduce: the norms that the SAE records, and a sentence."""
    norms = {key: spec.metadata[key] for key in OUTLIER_NORMS if spec.metadata.get(key)}
    return norms | {"outliers": OUTLIERS} if norms else {}
