"""The evaluation's figures as sae-lens has them; to be run in its environment.

    python peer_evaluation.py MODEL FOLDER

FOLDER holds windows of tokens in `tokens.safetensors`, and SAE directories. SAELens loads each, the
model runs in plain transformers, and every SAE gets its figures in `theirs.json`.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

warnings.simplefilter("ignore")

from sae_lens import SAE  # noqa: E402
from sae_lens.evals import ExplainedVarianceCalculator, _kl  # noqa: E402

OUTLIER_FACTOR = 10


class Hooked:
    """A model whose residual behind one block is read or replaced."""

    def __init__(self, folder: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def run(self, tokens: Tensor, layer: int, value: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(W, L, V) logits and the (W, L, D) residual, which `value` replaces."""
        seen: list[Tensor] = []

        def hook(module: Any, args: Any, output: Any) -> Any:
            tensor = output[0] if isinstance(output, tuple) else output
            seen.append(tensor)
            if value is None:
                return output
            return (value, *output[1:]) if isinstance(output, tuple) else value

        handle = self.model.model.layers[layer].register_forward_hook(hook)
        logits = self.model(tokens).logits
        handle.remove()
        return logits, seen[0]


def cross_entropy(logits: Tensor, tokens: Tensor) -> float:
    """As TransformerLens takes it: the mean over the predictions of all tokens but the first."""
    log_p = torch.log_softmax(logits, -1)[:, :-1]
    return float(-log_p.gather(-1, tokens[:, 1:, None]).mean())


@torch.no_grad()
def figures(model: Hooked, sae: Any, tokens: Tensor) -> dict[str, float]:
    _, layer, _ = sae.cfg.metadata.hook_name.split(".")
    clean, x = model.run(tokens, int(layer))
    features = sae.encode(x)
    x_hat = sae.decode(features)
    spliced, _ = model.run(tokens, int(layer), x_hat)
    zero, _ = model.run(tokens, int(layer), torch.zeros_like(x))
    norms = x[:, 1:].norm(dim=-1)
    kept = norms <= OUTLIER_FACTOR * norms.median()
    rows, rebuilt = x[:, 1:][kept], x_hat[:, 1:][kept]
    variance = ExplainedVarianceCalculator()
    variance.add_batch(rebuilt, rows)
    return {
        "fvu": 1 - variance.compute(),
        "mse": float((rows - rebuilt).pow(2).sum(-1).mean()) / x.shape[-1],
        "l0": float((features[:, 1:][kept] != 0).sum(-1).float().mean()),
        "ce_clean": cross_entropy(clean, tokens),
        "ce_sae": cross_entropy(spliced, tokens),
        "ce_zero_ablation": cross_entropy(zero, tokens),
        "kl": float(_kl(clean, spliced)[:, :-1].mean()),
    }


def main(model: str, folder: Path) -> None:
    hooked = Hooked(model)
    tokens = load_file(folder / "tokens.safetensors")["tokens"]
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        theirs = figures(hooked, SAE.load_from_disk(path), tokens)
        (path / "theirs.json").write_text(json.dumps(theirs))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
