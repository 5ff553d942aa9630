"""Several SAEs from one stream are those that each would be alone, and the model runs once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from sae_core.model_training.one_run import train_one, train_several
from sae_core.models.language_model import LanguageModel
from sae_core.train_config import RunConfig, RunsConfig
from sae_core.utils import cli

WEIGHTS = ("weights.pt", "config.json", "history.json")

SHORT = (
    "--model-dtype float32 --device cpu --max-text-length 24 --val-fraction 0.25 --seed 5"
    " --num-epochs 3 --tokens-per-step 256 --sae-expansion 2 --log-freq 1"
    " --early-stopping-patience 0 --end-to-end-fraction 0.1 --checkpoint-freq 0"
)
SEVERAL = "--hook-layers 2 1 --topks 4 8"

Configured = Callable[..., RunsConfig]


@pytest.fixture
def configured(tmp_path: Path, data_path: Path, tiny_model: Path) -> Configured:
    """The settings of a command line, with results in a folder."""

    def make(folder: str, *options: str) -> RunsConfig:
        base = f"--model-name {tiny_model} --data-path {data_path} {SHORT}".split()
        root = tmp_path / folder
        roots = ["--output-root", str(root), "--checkpoint-root", str(root / "points")]
        return cli.parse(RunsConfig, "", [*base, *roots, *" ".join(options).split()])

    return make


def files(config: RunConfig | RunsConfig) -> dict[str, bytes]:
    """The contents of all exported SAEs."""
    root = config.output.output_root
    return {
        f"{path.parent.name}/{path.name}": path.read_bytes()
        for path in root.glob("*/*")
        if path.name in WEIGHTS
    }


def alone(configured: Configured, *options: str) -> dict[str, bytes]:
    """The same SAEs, each from a stream of its own."""
    config = configured("alone", *options)
    for run in config.runs():
        train_one(run)
    return files(config)


def assert_same(mine: dict[str, bytes], theirs: dict[str, bytes]) -> None:
    assert sorted(mine) == sorted(theirs) and theirs
    assert [name for name in mine if mine[name] != theirs[name]] == []


class Passes:
    """Counts the windows that a model is given, by the deepest layer."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.layers: list[int] = []
        run = LanguageModel._activations

        def counted(model: LanguageModel, tokens: Tensor, hooks: Any) -> Any:
            self.layers.append(max(hook.layer for hook in hooks))
            return run(model, tokens, hooks)

        patch.setattr(LanguageModel, "_activations", counted)


@pytest.mark.parametrize(
    "options",
    [
        SEVERAL,
        "--topks 4 8 --sae-types topk standard jumprelu --sparsity-penalty 0.01"
        " --no-use-end-to-end",
        "--hook-layers 1 2 --hook-name mlp.hook_in --target-hook-name hook_mlp_out --topk 4",
    ],
)
def test_each_is_the_one_that_it_is_alone(options: str, configured: Configured) -> None:
    config = configured("together", options)
    train_several(config.runs())
    assert_same(files(config), alone(configured, options))
