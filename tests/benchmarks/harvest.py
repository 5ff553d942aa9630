"""Tokens a second of a harvest, beside the plain forward pass of the same model up to that layer.

Both read the same windows in the same number format, in turn. The plain pass is that of the Hugging
Face model cut behind the layer, without its unembedding; the harvest also writes what it reads.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from demo_model import demo_model, read_chapters
from machine import describe, wait

from sae_core.activations.shards import harvest
from sae_core.activations.token_windows import TokenWindows, read_windows
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.train_config import DataConfig

BATCH = 8


def seconds(work: Callable[[], object]) -> float:
    wait()
    start = time.perf_counter()
    work()
    wait()
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
    model = demo_model(dtype)
    some = read_windows(model.tokenizer, texts, DataConfig(options.length, 0.0, 0))
    some.n_train = options.windows
    layers = (options.layer,), (5, 9, options.layer)
    plain, one, three = rates(model, some, layers, BATCH, scratch, options.repeats)
    return (
        f"| {dtype} | {plain:.0f} | {one:.0f} | {one / plain:.2f} "
        f"| {three:.0f} | {three / plain:.2f} |"
    )


def rates(
    model: LanguageModel,
    windows: TokenWindows,
    layers: Sequence[Sequence[int]],
    batch_size: int,
    scratch: Path,
    repeats: int,
) -> list[float]:
    """Tokens a second of the plain forward pass up to the last layer of all, and of the harvests of
    these layers; medians, taken in turn. The model has no later block afterwards."""
    plain = model.model.model
    plain.layers = plain.layers[: max(map(max, layers)) + 1]
    tokens = windows.train(0, torch.arange(windows.n_train))

    @torch.no_grad()
    def forward() -> None:
        for batch in tokens.split(batch_size):
            plain(batch.to(model.device), use_cache=False)

    def harvested(of: Sequence[int]) -> None:
        hooks = [Hook(layer, "hook_resid_post") for layer in of]
        harvest(model, windows, hooks, scratch / str(len(of)), batch_size=batch_size)

    works = [forward, *(partial(harvested, of) for of in layers)]
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats + 1):
        for work, taken in zip(works, times, strict=True):
            taken.append(seconds(work))
    return [tokens.numel() / statistics.median(taken[1:]) for taken in times]


if __name__ == "__main__":
    main()
