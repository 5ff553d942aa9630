"""What sae-lens and dictionary_learning make of SAEs; to be run in their environment.

    python peers.py OURS THEIRS REPO

OURS holds activations in `x.safetensors` and an exported SAE directory for each kind. SAELens reads
each from there and from REPO on the Hub, and its answers go into `disk.safetensors` and
`hub.safetensors` beside the SAE's files, the metadata that it found into `metadata.json`. THEIRS
gets an SAE of each class of both libraries with random weights, and its answer.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

warnings.simplefilter("ignore")

from dictionary_learning.dictionary import (  # noqa: E402
    AutoEncoder,
    AutoEncoderNew,
    GatedAutoEncoder,
    JumpReluAutoEncoder,
)
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.top_k import AutoEncoderTopK  # noqa: E402
from dictionary_learning.utils import load_dictionary  # noqa: E402
from sae_lens import SAE  # noqa: E402
from sae_lens.registry import get_sae_training_class  # noqa: E402
from sae_lens.saes.sae import SAEMetadata  # noqa: E402

D_SAE, K = 24, 3

SAELENS = {
    "standard": {"architecture": "standard"},
    "gated": {"architecture": "gated"},
    "jumprelu": {"architecture": "jumprelu", "apply_b_dec_to_input": False},
    "topk": {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True},
}

TRAINED: dict[str, dict[str, Any]] = {
    "standard": {},
    "gated": {},
    "jumprelu": {},
    "topk": {"k": K},
    "batchtopk": {"k": K},
    "matryoshka_batchtopk": {"k": K, "matryoshka_widths": [8, 16, D_SAE]},
}
"""SAEs as SAELens trains them; their checkpoints have other settings and tensors."""

METADATA = {"model_name": "gpt2", "hook_name": "blocks.3.hook_resid_post"}


def answer(sae: Any, x: Tensor, path: Path) -> None:
    """Write the features of `x` (N, D), and its reconstruction."""
    with torch.no_grad():
        features = sae.encode(x)
        save_file({"features": features.contiguous(), "x_hat": sae.decode(features)}, path)


def read_ours(ours: Path, x: Tensor, repo: str) -> None:
    for folder in sorted(path for path in ours.iterdir() if path.is_dir()):
        sae = SAE.load_from_disk(folder)
        answer(sae, x, folder / "disk.safetensors")
        (folder / "metadata.json").write_text(json.dumps(sae.cfg.metadata.to_dict()))
        answer(SAE.from_pretrained(repo, folder.name), x, folder / "hub.safetensors")


def randomise(sae: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            values = torch.randn(parameter.shape)
            parameter.copy_(values.abs() if name == "threshold" else values)


def make_saelens(theirs: Path, x: Tensor) -> None:
    for name, options in SAELENS.items():
        shape = {"d_in": x.shape[1], "d_sae": D_SAE}
        sae = SAE.from_dict(shape | {"dtype": "float32", "metadata": METADATA} | options)
        randomise(sae)
        folder = theirs / f"saelens {name}"
        sae.save_model(folder)
        answer(SAE.load_from_disk(folder), x, folder / "answer.safetensors")


def make_checkpoints(theirs: Path, x: Tensor) -> None:
    """Checkpoints of SAELens's training, and the answers of what it exports of them."""
    for name, options in TRAINED.items():
        kind, settings = get_sae_training_class(name)
        about = SAEMetadata(**METADATA)
        sae = kind(settings(d_in=x.shape[1], d_sae=D_SAE, metadata=about, **options))
        randomise(sae)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(1.5)
        folder = theirs / f"checkpoint {name}"
        sae.save_model(folder)
        sae.save_inference_model(folder / "export")
        answer(SAE.load_from_disk(folder / "export"), x, folder / "answer.safetensors")


def make_dictionaries(theirs: Path, x: Tensor) -> None:
    d = x.shape[1]
    made = [AutoEncoder(d, D_SAE), AutoEncoderNew(d, D_SAE), GatedAutoEncoder(d, D_SAE)]
    made += [JumpReluAutoEncoder(d, D_SAE)]
    for sae in made:
        randomise(sae)
    with_k = [AutoEncoderTopK(d, D_SAE, K), BatchTopKSAE(d, D_SAE, K)]
    with_k += [MatryoshkaBatchTopKSAE(d, D_SAE, K, [8, 16])]
    for sae in with_k:
        sae.threshold.fill_(0.7)
    for sae in made + with_k:
        folder = theirs / f"dictionary_learning {type(sae).__name__}"
        folder.mkdir()
        torch.save(sae.state_dict(), folder / "ae.pt")
        trainer = {"dict_class": type(sae).__name__, "layer": 3, "lm_name": "gpt2", "k": K}
        trainer["submodule_name"] = "resid_post_layer_3"
        (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
        answer(load_dictionary(str(folder), "cpu")[0], x, folder / "answer.safetensors")


def main(ours: Path, theirs: Path, repo: str) -> None:
    torch.manual_seed(0)
    x = load_file(ours / "x.safetensors")["x"]
    read_ours(ours, x, repo)
    make_saelens(theirs, x)
    make_checkpoints(theirs, x)
    make_dictionaries(theirs, x)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
