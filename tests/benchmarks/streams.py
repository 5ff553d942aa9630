"""Several SAEs from one stream beside one SAE from its own: seconds of the model and of the rest,
on a CPU those of the processor.

The trainings are those of `single_sae_training.py`, without an end-to-end phase, on the model and
texts of the example. The model's part is everything that reads activations, validation included.
"""

import argparse
import shlex
import tempfile
import time
from pathlib import Path
from typing import Any

from demo_model import demo_record, read_chapters
from machine import DEVICE, describe, wait

from sae_core.model_training.one_run import train_one, train_several
from sae_core.models.language_model import LanguageModel
from sae_core.train_config import RunsConfig
from sae_core.utils import cli
from sae_core.utils.progress import quiet

clock = time.perf_counter if DEVICE.type == "cuda" else time.process_time

LAYERS, TOPKS = (5, 9), (16, 32, 64)


class Timed:
    """Adds up the seconds of the model's passes."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.run = LanguageModel.activations
        LanguageModel.activations = self  # type: ignore[method-assign, assignment]

    def __get__(self, model: LanguageModel, kind: type) -> Any:
        def timed(*arguments: Any) -> Any:
            start = clock()
            found = self.run(model, *arguments)
            wait()
            self.seconds += clock() - start
            return found

        return timed


def row(timed: Timed, base: list[str], layers: tuple[int, ...], topks: tuple[int, ...]) -> str:
    """The seconds of one training, or of several from one stream."""
    with tempfile.TemporaryDirectory() as folder:
        options = [
            *base,
            "--output-root",
            f"{folder}/saes",
            "--checkpoint-root",
            f"{folder}/points",
        ]
        for name, values in (("--hook-layers", layers), ("--topks", topks)):
            options += [name, *map(str, values)]
        runs = cli.parse(RunsConfig, "", options).runs()
        timed.seconds, start = 0.0, clock()
        with quiet():
            train_several(runs) if len(runs) > 1 else train_one(runs[0])
        whole = clock() - start
    where = ", ".join(map(str, layers))
    rest = whole - timed.seconds
    return f"| {len(runs)} | {where} | {timed.seconds:.1f} | {rest:.1f} | {whole:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chapters", type=Path, default=Path("sae_core/data/raw_data"))
    parser.add_argument("--model", help="a directory, in place of SmolLM2-135M")
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    parser.add_argument("--options", default="", help="of single_sae_training.py")
    options = parser.parse_args()
    print(f"Streams, seconds ({describe('transformers')})\n")
    print("| SAEs | layers | model | the rest | all |")
    print("|--:|---|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        read_chapters(options.chapters, Path(folder))
        base = f"--model-name {options.model or demo_record().path} --no-use-end-to-end"
        base += f" --data-path {folder}/texts.json --num-epochs 1 --tokens-per-step 1024"
        words = shlex.split(f"{base} --max-text-length 128 {options.options}")
        timed, last = Timed(), options.layers[-1:]
        for layers, topks in ((last, TOPKS[:1]), (last, TOPKS), (options.layers, TOPKS)):
            print(row(timed, words, tuple(layers), topks), flush=True)


if __name__ == "__main__":
    main()
