"""Tokens a second of a harvest, beside the plain forward pass of the same model up to that layer.

Both read the same windows in the same number format, in turn. The plain pass is that of the Hugging
Face model cut behind the layer, without its unembedding; the harvest also writes what it reads.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from demo_model import demo_model, read_chapters
from machine import describe

from sae_core.activations.shards import harvest
from sae_core.activations.token_windows import read_windows
from sae_core.models.language_model import Hook
from sae_core.train_config import DataConfig

BATCH = 8


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chapters", type=Path, default=Path("sae_core/data/raw_data"))
    parser.add_argument("--layer", type=int, default=14)
    parser.add_argument("--length", type=int, default=256, help="tokens in a window")
    parser.add_argument("--windows", type=int, default=32, help="windows a measurement")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"Harvest, tokens a second ({describe('transformers', 'transformer-lens')})\n")
    print("| number format | plain forward | harvest of 1 layer | ratio | of 3 layers | ratio |")
    print("|---" + "|--:" * 5 + "|")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        texts = read_chapters(options.chapters, scratch)
        for dtype in ("float32", "bfloat16"):
            print(row(dtype, texts, scratch, options), flush=True)


def row(dtype: str, texts: list[str], scratch: Path, options: argparse.Namespace) -> str:
    """The figures in one number format."""
    model, plain = demo_model(dtype), demo_model(dtype).model.model
    plain.layers = plain.layers[: options.layer + 1]
    some = read_windows(model.tokenizer, texts, DataConfig(options.length, 0.0, 0))
    some.n_train = options.windows
    tokens = some.train(0, torch.arange(options.windows))
    one = [Hook(options.layer, "hook_resid_post")]
    three = [Hook(layer, "hook_resid_post") for layer in (5, 9, options.layer)]

    @torch.no_grad()
    def forward() -> None:
        for batch in tokens.split(BATCH):
            plain(batch, use_cache=False)

    works = {
        "plain": forward,
        "one": lambda: harvest(model, some, one, scratch / "one", batch_size=BATCH),
        "three": lambda: harvest(model, some, three, scratch / "three", batch_size=BATCH),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(options.repeats + 1):
        for name, work in works.items():
            times[name].append(seconds(work))
    rate = {name: tokens.numel() / statistics.median(taken[1:]) for name, taken in times.items()}
    ratios = {name: f"{rate[name] / rate['plain']:.2f}" for name in rate}
    return (
        f"| {dtype} | {rate['plain']:.0f} | {rate['one']:.0f} | {ratios['one']} "
        f"| {rate['three']:.0f} | {ratios['three']} |"
    )


if __name__ == "__main__":
    main()
