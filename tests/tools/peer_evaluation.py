"""The evaluation's figures as sae-lens and sae-bench have them; to be run in their environment.

    python peer_evaluation.py MODEL FOLDER

FOLDER holds windows of tokens in `tokens.safetensors`, each with a BOS, and SAE directories.
SAELens loads each, the model runs in plain transformers, and every SAE gets its figures in
`theirs.json`: under our names, and what the tools themselves report under theirs.
"""

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

warnings.simplefilter("ignore")

from sae_bench.evals.core import main as sae_bench  # noqa: E402
from sae_lens import SAE  # noqa: E402
from sae_lens import evals as sae_lens  # noqa: E402
from sae_lens.evals import ExplainedVarianceCalculator  # noqa: E402
from sae_lens.training.activation_scaler import ActivationScaler  # noqa: E402

OUTLIER_FACTOR = 10
SHIFT = 3.0
"""A mean far from zero, as a trained model's activations have."""


class Hooked:
    """A model in plain transformers, with what the tools ask of a TransformerLens model."""

    def __init__(self, folder: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def __call__(self, tokens: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """Logits, and the cross-entropy of each prediction, as TransformerLens takes it."""
        logits = self.model(tokens).logits
        log_p = torch.log_softmax(logits, -1)[:, :-1]
        return logits, -log_p.gather(-1, tokens[:, 1:, None]).squeeze(-1)

    def run_with_hooks(
        self, tokens: Tensor, fwd_hooks: list[tuple[str, Any]], **_: Any
    ) -> tuple[Tensor, Tensor]:
        """The same with the residual behind one block replaced."""
        [(name, replace)] = fwd_hooks

        def hook(module: Any, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (replace(output[0], hook=None), *output[1:])
            return replace(output, hook=None)

        handle = self.model.model.layers[int(name.split(".")[1])].register_forward_hook(hook)
        try:
            return self(tokens)
        finally:
            handle.remove()

    def run_with_cache(
        self, tokens: Tensor, names_filter: list[str], **_: Any
    ) -> tuple[None, dict[str, Tensor]]:
        """The residual behind one block."""
        seen: list[Tensor] = []

        def read(x: Tensor, hook: Any) -> Tensor:
            seen.append(x)
            return x

        self.run_with_hooks(tokens, [(names_filter[0], read)])
        return None, {names_filter[0]: seen[0]}


def spliced(model: Hooked, sae: Any, tokens: Tensor, ignored: list[int]) -> dict[str, float]:
    """SAELens's losses where the tokens `ignored` keep their activation, over all predictions."""
    found = sae_lens.get_recons_loss(
        sae, model, ActivationScaler(), tokens, True, True, ignore_tokens=ignored
    )
    return {
        "ce_clean": float(found["ce_loss_without_sae"].mean()),
        "ce_sae": float(found["ce_loss_with_sae"].mean()),
        "ce_zero_ablation": float(found["ce_loss_with_ablation"].mean()),
        "kl": float(found["kl_div_with_sae"][:, :-1].mean()),
    }


def reported_by_sae_lens(
    model: Hooked, sae: Any, tokens: Tensor, ignored: list[int]
) -> dict[str, float]:
    """What SAELens's `run_evals` reports of the losses."""
    store = SimpleNamespace(get_batch_tokens=lambda _: tokens)
    return sae_lens.get_downstream_reconstruction_metrics(
        sae, model, store, ActivationScaler(), True, True, 1, len(tokens), ignore_tokens=ignored
    )


def reported_by_sae_bench(
    model: Hooked, sae: Any, tokens: Tensor, shift: float = 0.0
) -> dict[str, float]:
    """What SAEBench's core evaluation reports, with no token ignored; the variance is that of
    activations with `shift` added, and of an SAE that knows of it."""
    store = SimpleNamespace(get_batch_tokens=lambda _: tokens)
    about = sae.cfg.metadata
    layer = int(about.hook_name.split(".")[1])
    sae.cfg.hook_name, sae.cfg.hook_head_index, sae.cfg.hook_layer = about.hook_name, None, layer
    losses = sae_bench.get_downstream_reconstruction_metrics(
        sae, model, store, True, True, 1, len(tokens)
    )

    def with_cache(tokens: Tensor, names_filter: list[str], **_: Any) -> tuple[None, Any]:
        found = model.run_with_cache(tokens, names_filter)[1]
        return None, {name: x + shift for name, x in found.items()}

    knowing = SimpleNamespace(
        cfg=sae.cfg,
        device=sae.device,
        encode=lambda x: sae.encode(x - shift),
        decode=lambda features: sae.decode(features) + shift,
    )
    shifted = SimpleNamespace(run_with_cache=with_cache)
    own, _ = sae_bench.get_sparsity_and_variance_metrics(
        knowing, shifted, store, 1, True, True, True, True, len(tokens), {}
    )
    return losses | own


@torch.no_grad()
def figures(model: Hooked, sae: Any, tokens: Tensor) -> dict[str, Any]:
    name, bos = sae.cfg.metadata.hook_name, int(tokens[0, 0])
    x = model.run_with_cache(tokens, [name])[1][name]
    features = sae.encode(x)
    x_hat = sae.decode(features)
    norms = x[:, 1:].norm(dim=-1)
    kept = norms <= OUTLIER_FACTOR * norms.median()
    rows, rebuilt = x[:, 1:][kept], x_hat[:, 1:][kept]
    variance = ExplainedVarianceCalculator()
    variance.add_batch(rebuilt, rows)
    every = spliced(model, sae, tokens, [])
    error, squared = float((x - x_hat).pow(2).sum(-1).mean()), (x + SHIFT).pow(2).sum(-1).mean()
    return {
        "ours": {
            "fvu": 1 - variance.compute(),
            "mse": float((rows - rebuilt).pow(2).sum(-1).mean()) / x.shape[-1],
            "l0": float((features[:, 1:][kept] != 0).sum(-1).float().mean()),
            **spliced(model, sae, tokens, [bos]),
            "ce_sae_all_spliced": every["ce_sae"],
            "kl_all_spliced": every["kl"],
        },
        "sae_lens": reported_by_sae_lens(model, sae, tokens, [bos]),
        "sae_lens_all_spliced": reported_by_sae_lens(model, sae, tokens, []),
        "sae_bench": reported_by_sae_bench(model, sae, tokens, SHIFT),
        "sae_bench_as_documented": {
            "explained_variance": 1 - error / float(squared - (squared / x.shape[-1]) ** 2),
            "l0": float((features != 0).sum(-1).float().mean()),
        },
        "every_token": {"explained_variance": 1 - error / variance_of(x)},
    }


def variance_of(x: Tensor) -> float:
    return float((x - x.mean((0, 1))).pow(2).sum(-1).mean())


def main(model: str, folder: Path) -> None:
    hooked = Hooked(model)
    tokens = load_file(folder / "tokens.safetensors")["tokens"]
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        theirs = figures(hooked, SAE.load_from_disk(path), tokens)
        (path / "theirs.json").write_text(json.dumps(theirs, default=lambda value: None))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
