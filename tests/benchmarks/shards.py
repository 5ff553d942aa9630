"""A harvest of SmolLM2's activations on a folder of chapters, for the benchmark of quality."""

import argparse
import tempfile
from pathlib import Path

from demo_model import demo_model, read_chapters

from sae_core.activations.shards import harvest
from sae_core.activations.token_windows import read_windows
from sae_core.models.language_model import Hook
from sae_core.train_config import DataConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="shard to write; left as it is when it is there")
    parser.add_argument("--chapters", type=Path, default=Path("sae_core/data/raw_data"))
    parser.add_argument("--hooks", nargs="+", default=["blocks.14.hook_resid_post"])
    parser.add_argument("--passes", type=int, default=3)
    options = parser.parse_args()
    if (options.folder / "manifest.json").is_file():
        return
    model = demo_model()
    with tempfile.TemporaryDirectory() as scratch:
        texts = read_chapters(options.chapters, Path(scratch))
    windows = read_windows(model.tokenizer, texts, DataConfig(max_text_length=256))
    hooks = list(map(Hook.parse, options.hooks))
    harvest(model, windows, hooks, options.folder, batch_size=8, passes=options.passes)


if __name__ == "__main__":
    main()
