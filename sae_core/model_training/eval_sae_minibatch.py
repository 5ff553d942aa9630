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
    "mse": "MSE",
    "fvu": "FVU",
    "l0": "L0",
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
    """Hub id or local directory of the language model; by default the Hub id that the SAE records.
    The path of a directory is recorded nowhere, and has to be given."""

    num_windows: int = 16
    """Windows in the minibatch, at most."""

    batch_size: int = RuntimeConfig.batch_size
    """Windows in a forward pass of the language model on a GPU; a CPU takes about 1,024 tokens."""

    device: str = RuntimeConfig.device
    """Where to compute: auto, cuda, mps or cpu."""

    json: bool = False
    """Print JSON, with all that is measured, in place of the tables."""

    load: LoadConfig = field(default_factory=LoadConfig)


def measure(config: Minibatch) -> list[dict[str, Any]]:
    """The figures of every SAE, on the same windows."""
    from sae_core.activations.language_model import LanguageModel
    from sae_core.checkpoint import load_sae
    from sae_core.data_processing.texts import read_texts
    from sae_core.devices import pick_device
    from sae_core.evaluation.identity import identity
    from sae_core.evaluation.metrics import evaluate, held_out_windows
    from sae_core.model_sources import model_of

    if not config.sae_dirs:
        raise SAEError("SAE_DIR: name at least one SAE directory")
    texts = read_texts(config.data_path)
    saes = [load_sae(folder) for folder in config.sae_dirs]
    name = model_of([sae.spec for sae in saes], config.model_name)
    options = {key: getattr(config.load, key) for key in LoadConfig.__dataclass_fields__}
    model = LanguageModel.load(
        ModelConfig(model_name=name, **options),
        pick_device(config.device),
        max(sae.spec.window for sae in saes),
    )
    windows = held_out_windows(saes[0].spec, model.tokenizer, texts, config.num_windows)
    return [
        identity(folder.name, sae.spec, name) | evaluate(model, sae, windows, config.batch_size)
        for folder, sae in zip(config.sae_dirs, saes, strict=True)
    ]


def table(results: list[dict[str, Any]]) -> str:
    """One line an SAE."""
    rows = [[_figure(result[key]) for key in SHOWN] for result in results]
    names = [result["run_name"] for result in results]
    return _aligned(["SAE", *SHOWN.values()], names, rows)


def table_of_layers(results: list[dict[str, Any]]) -> str:
    """The error behind the hook: one line a layer, and a column for each SAE, in their order."""
    layers = sorted({int(layer) for result in results for layer in result["block_mse"]})
    rows = [[_figure(result["block_mse"].get(str(n))) for result in results] for n in layers]
    heading = ["layer", *(f"SAE {number}" for number in range(1, len(results) + 1))]
    return _aligned(heading, list(map(str, layers)), rows)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _aligned(heading: list[str], names: list[str], rows: list[list[str]]) -> str:
    lines = [heading, *([name, *row] for name, row in zip(names, rows, strict=True))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [f"{first:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(rest, widths[1:], strict=True))]
        )
        for first, *rest in lines
    )


def show(config: Minibatch) -> None:
    """Measure and print."""
    results = measure(config)
    if config.json:
        print(json.dumps(results, indent=1))
    else:
        print(f"{results[0]['n_windows']} windows, {results[0]['n_tokens']} tokens")
        print(table(results))
        print(f"\nMSE of the residual after each layer behind the hook\n{table_of_layers(results)}")


def main(argv: Sequence[str] | None = None) -> None:
    cli.run(show, Minibatch, "Measure SAEs side by side on the same held-out windows.", argv)


if __name__ == "__main__":
    main()
