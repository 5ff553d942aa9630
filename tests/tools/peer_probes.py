"""Probes and absorption as sae-bench computes them; to be run in its environment.

    python peer_probes.py FOLDER

FOLDER holds, in `probes.safetensors`, windows of two classes: `x`, `code` and `subject` of
`train` and `test`; and in `words.safetensors` the activations `x` and the `code` of words, the
decoder `W_dec`, a probe's direction `p` and the `main` features. The answers go into `theirs.json`
and, for each word, into `absorbed.safetensors`.
"""

import json
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

warnings.simplefilter("ignore")
# Checked types take the number of windows of a class and that of all for one size.
os.environ["JAXTYPING_DISABLE"] = "1"

from sae_bench.evals.absorption.feature_absorption_calculator import (  # noqa: E402
    FeatureAbsorptionCalculator,
)
from sae_bench.evals.sparse_probing.probe_training import train_probe_on_activations  # noqa: E402

PROBED = (1, 2, 5, 20)
HOOK = "blocks.0.hook_resid_post"
EXAMPLES = ["zebra", "yoghurt"]


def probe_accuracies(given: dict[str, Tensor]) -> dict[str, float]:
    """Mean test accuracy over the classes, of probes on `x` and on the k best columns of `code`."""

    def of_class(name: str, part: str) -> dict[str, Tensor]:
        subject = given[f"{part}.subject"]
        return {str(i): given[f"{part}.{name}"][subject == i] for i in range(2)}

    def accuracy(name: str, k: int | None) -> float:
        torch.manual_seed(0)
        train, test = (of_class(name, part) for part in ("train", "test"))
        _, found = train_probe_on_activations(train, test, select_top_k=k)
        return sum(found.values()) / len(found)

    return {"dense": accuracy("x", None)} | {str(k): accuracy("code", k) for k in PROBED}


class Model:
    """What the calculator asks of a model: the activation at the word that ends a prompt."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to_tokens(self, prompt: str) -> Tensor:
        return torch.zeros(1, 2)

    def run_with_cache(self, prompts: list[str], names_filter: list[str]) -> tuple[None, Any]:
        rows = [int(prompt.split("word")[-1].rstrip(":")) for prompt in prompts]
        at_word = self.x[rows][:, None]
        return None, {HOOK: torch.cat([at_word, torch.zeros_like(at_word)], 1)}


def absorption_of_words(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The absorbed fraction of each word, and whether it is fully absorbed."""
    x, code = given["x"], given["code"]
    codes = {tuple(row.tolist()): a for row, a in zip(x, code, strict=True)}
    sae = SimpleNamespace(
        W_dec=given["W_dec"],
        device=x.device,
        encode=lambda rows: torch.stack([codes[tuple(row.tolist())] for row in rows]),
    )
    calculator = FeatureAbsorptionCalculator(Model(x), EXAMPLES)  # type: ignore[arg-type]
    words = [f"word{row}" for row in range(len(x))]
    found = calculator.calculate_absorption(
        sae, words, given["p"], given["main"].tolist(), layer=0, show_progress=False
    ).word_results
    assert [result.word for result in found] == words
    return {
        "fraction": torch.tensor([float(result.absorption_fraction) for result in found]),
        "full": torch.tensor([float(result.is_full_absorption) for result in found]),
    }


def main(folder: Path) -> None:
    accuracies = probe_accuracies(load_file(folder / "probes.safetensors"))
    (folder / "theirs.json").write_text(json.dumps(accuracies))
    absorbed = absorption_of_words(load_file(folder / "words.safetensors"))
    save_file(absorbed, folder / "absorbed.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
