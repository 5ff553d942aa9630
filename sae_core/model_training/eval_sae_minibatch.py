"""Measure SAEs side by side on the same minibatch of held-out windows."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

if not __package__:  # run as a file: import the package from the repository it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import tyro

from sae_core import cli
from sae_core.errors import SAEError
from sae_core.train_config import DEFAULT_DATA_PATH, LoadConfig, ModelConfig, RuntimeConfig

SHOWN = {
    "l0": "L0",
    "fvu": "FVU",
    "ce_clean": "CE clean",
    "ce_sae": "CE spliced",
    "loss_recovered": "recovered",
    "kl": "KL",
    "block_mse_mean": "block MSE",
    "block_mse_min": "least",
    "block_mse_max": "greatest",
    "dead_fraction": "dead",
}
"""Columns of the table."""


@dataclass(frozen=True)
class Minibatch:
    """The SAEs, and what they are measured on."""

    sae_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """SAE directories, final exports or checkpoints, of one language model."""

    data_path: Path = DEFAULT_DATA_PATH
    """JSON file with a list of texts; the windows that the first SAE held out are used."""

    model_name: str | None = None
    """Hub id or local directory of the language model; by default as the SAE records it."""

    num_windows: int = 16
    """Windows in the minibatch, at most."""

    batch_size: int = RuntimeConfig.batch_size
    """Windows in a forward pass of the language model on a GPU; a CPU takes about 1,024 tokens."""

    device: str = RuntimeConfig.device
    """Where to compute: auto, cuda, mps or cpu."""

    json: bool = False
    """Print JSON, with the error of every layer, in place of the table."""

    load: LoadConfig = field(default_factory=LoadConfig)


def measure(config: Minibatch) -> list[dict[str, Any]]:
    """The figures of every SAE, on the same windows."""
    from sae_core.activations.language_model import LanguageModel
    from sae_core.checkpoint import load_sae
    from sae_core.data_processing.texts import read_texts
    from sae_core.devices import pick_device
    from sae_core.evaluation.metrics import evaluate, held_out_windows, identity

    if not config.sae_dirs:
        raise SAEError("SAE_DIR: name at least one SAE directory")
    texts = read_texts(config.data_path)
    saes = [load_sae(folder) for folder in config.sae_dirs]
    names = {sae.spec.metadata.get("model_name") for sae in saes}
    name = config.model_name or (names.pop() if len(names) == 1 else None)
    if name is None:
        raise SAEError(
            "--model-name: the SAEs do not record one common language model; name the one to use"
        )
    options = {key: getattr(config.load, key) for key in LoadConfig.__dataclass_fields__}
    model = LanguageModel.load(ModelConfig(model_name=name, **options), pick_device(config.device))
    windows = held_out_windows(saes[0].spec, model.tokenizer, texts, config.num_windows)
    return [
        identity(folder.name, sae.spec) | evaluate(model, sae, windows, config.batch_size)
        for folder, sae in zip(config.sae_dirs, saes, strict=True)
    ]


def table(results: list[dict[str, Any]]) -> str:
    """One line an SAE."""
    rows = [["SAE", *SHOWN.values()]]
    for result in results:
        figures = [result[key] for key in SHOWN]
        rows.append([result["run_name"], *("-" if f is None else f"{f:.4g}" for f in figures)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([f"{first:<{widths[0]}}", *cells]))
    return "\n".join(lines)


def show(config: Minibatch) -> None:
    """Measure and print."""
    results = measure(config)
    if config.json:
        print(json.dumps(results, indent=1))
    else:
        print(f"{results[0]['n_windows']} windows, {results[0]['n_tokens']} tokens")
        print(table(results))


def main(argv: Sequence[str] | None = None) -> None:
    cli.run(show, Minibatch, "Measure SAEs side by side on the same held-out windows.", argv)


if __name__ == "__main__":
    main()
