"""Measure SAEs side by side on a minibatch of windows that they held out."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if not __package__:  # run as a file: import the package from the repository it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import tyro

from sae_core.settings.texts import TextsConfig
from sae_core.train_config import (
    BatchSize,
    DataConfig,
    LoadConfig,
    ModelConfig,
    RuntimeConfig,
)
from sae_core.utils import cli
from sae_core.utils.errors import SAEError

if TYPE_CHECKING:
    from torch import Tensor

    from sae_core.corpus.token_file import TokenFile
    from sae_core.evaluation.unseen import ModelIdentity
    from sae_core.sae.config import SAESpec

DATA_NAMES = tuple(DataConfig.__dataclass_fields__)

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
    "dead_fraction": "silent",
}
"""Columns of the table."""


@dataclass(frozen=True)
class Minibatch:
    """The SAEs, and what they are measured on."""

    sae_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """SAE directories, final exports or checkpoints, of one language model."""

    model_name: str | None = None
    """Hub id or local directory of the language model; by default the Hub id that the SAE records.
    The path of a local directory is never recorded, so give it here."""

    num_windows: int = 16
    """Maximum number of windows in the minibatch."""

    batch_size: BatchSize = RuntimeConfig.batch_size
    """Windows per forward pass of the language model on a GPU; `auto` takes about 16,384 tokens,
    and fewer when memory runs out (a CPU always uses about 1,024)."""

    device: str = RuntimeConfig.device
    """Where to compute: auto, cuda, mps or cpu."""

    json: bool = False
    """Print JSON with all figures instead of the tables."""

    texts: TextsConfig = field(default_factory=TextsConfig)

    load: LoadConfig = field(default_factory=LoadConfig)


def measure(config: Minibatch) -> list[dict[str, Any]]:
    """The figures of every SAE, each on windows that it has not seen.

    Raises:
        SAEError: an SAE was trained on other texts or another model.
    """
    from sae_core.corpus.cache import cached_tokens
    from sae_core.corpus.corpora import read_corpus
    from sae_core.evaluation.identity import identity
    from sae_core.evaluation.metrics import evaluate
    from sae_core.evaluation.unseen import check_model, check_texts
    from sae_core.formats.checkpoint import load_sae
    from sae_core.models.language_model import LanguageModel
    from sae_core.models.loading import load_tokenizer
    from sae_core.utils.devices import pick_device

    if not config.sae_dirs:
        raise SAEError("SAE_DIR: name at least one SAE directory")
    saes = [load_sae(folder) for folder in config.sae_dirs]
    named = [(str(folder), sae.spec) for folder, sae in zip(config.sae_dirs, saes, strict=True)]
    model_config, given = _model(config, named)
    corpus = read_corpus(config.texts)
    file = cached_tokens(corpus, load_tokenizer(model_config), config.texts.token_root)
    assert file.manifest is not None
    for name, spec in named:
        check_texts(name, spec, config.texts.place, file.manifest.data_sha256)
        check_model(name, spec, given, "--model-name")
    longest = max(sae.spec.window for sae in saes)
    model = LanguageModel.load(model_config, pick_device(config.device), longest)
    windows = _windows(config, named, model.tokenizer, file)
    return [
        identity(folder.name, sae.spec, given.name)
        | evaluate(model, sae, of_sae, config.batch_size)
        for folder, sae, of_sae in zip(config.sae_dirs, saes, windows, strict=True)
    ]


def _model(
    config: Minibatch, named: Sequence[tuple[str, "SAESpec"]]
) -> tuple[ModelConfig, "ModelIdentity"]:
    """The language model to load: the one that is asked for, or that all SAEs record."""
    from sae_core.evaluation.unseen import ModelIdentity
    from sae_core.models.model_sources import model_of
    from sae_core.utils.naming import same_name

    name = model_of([spec for _, spec in named], config.model_name)
    recorded = [of for _, spec in named if (of := ModelIdentity.recorded(spec))]
    commits = {of.commit for of in recorded if same_name(of.name) == same_name(name)}
    commit = commits.pop() if len(commits) == 1 else None
    options = {key: getattr(config.load, key) for key in LoadConfig.__dataclass_fields__}
    model = ModelConfig(model_name=name, revision=commit, **options)
    return model, ModelIdentity.given(model)


def _windows(
    config: Minibatch, named: Sequence[tuple[str, "SAESpec"]], tokenizer: Any, file: "TokenFile"
) -> "list[Tensor]":
    """Each SAE's windows: the ones that it held out. An SAE that does not record its texts gets
    the windows of the first SAE that does."""
    from sae_core.evaluation.metrics import data_config, held_out_windows
    from sae_core.evaluation.unseen import records_texts

    recording = [spec for _, spec in named if records_texts(spec)]
    windows: dict[DataConfig, Tensor] = {}
    chosen: list[Tensor] = []
    for _, spec in named:
        spec = spec if records_texts(spec) or not recording else recording[0]
        key = data_config(spec)
        if key not in windows:
            windows[key] = held_out_windows(spec, tokenizer, file, config.num_windows)
        chosen.append(windows[key])
    if len(windows) > 1:
        values = {name: {getattr(key, name) for key in windows} for name in DATA_NAMES}
        differ = [
            f"{name} {', '.join(_in_words(value) for value in sorted(found))}"
            for name, found in values.items()
            if len(found) > 1
        ]
        print(
            f"not the same windows or tokens for all SAEs ({'; '.join(differ)}): each is measured "
            "on windows that it has not seen, without the tokens that its training left out, so "
            "their figures are not strictly comparable",
            file=sys.stderr,
            flush=True,
        )
    return chosen


def _in_words(value: object) -> str:
    """A setting's value; a list of words, or `none` if it is empty."""
    return (" ".join(value) or "none") if isinstance(value, tuple) else str(value)


def table(results: list[dict[str, Any]]) -> str:
    """One line per SAE."""
    rows = [[_figure(result[key]) for key in SHOWN] for result in results]
    names = [result["run_name"] for result in results]
    return _aligned(["SAE", *SHOWN.values()], names, rows)


def table_of_layers(results: list[dict[str, Any]]) -> str:
    """The error after the hook: one line per layer, and one column per SAE, in their order."""
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
        for size in dict.fromkeys((result["n_windows"], result["n_tokens"]) for result in results):
            print(f"{size[0]} windows, {size[1]} tokens")
        print(table(results))
        print(f"\nMSE of the residual stream after each later layer\n{table_of_layers(results)}")


def main(argv: Sequence[str] | None = None) -> None:
    cli.run(show, Minibatch, "Measure SAEs side by side on the same held-out windows.", argv)


if __name__ == "__main__":
    main()
