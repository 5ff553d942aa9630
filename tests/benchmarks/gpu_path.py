"""What feeds a training on a GPU: the loader beside the step, a harvest beside the plain forward
pass, and the rules of the workflow from chapters to features. `make gpu` runs it (gpu.py).

Language models have random weights and the shapes of real ones, so nothing is downloaded.
"""

import argparse
import csv
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from gpu_steps import ON_GPU, SHAPES, Shape, eager, graph  # noqa: E402
from gpu_tables import Row, table  # noqa: E402
from harvest import rates  # noqa: E402
from machine import DEVICE, describe, wait  # noqa: E402
from project import make_project  # noqa: E402
from random_model import make_random_model  # noqa: E402
from tiny_model import VOCABULARY, tokenizer  # noqa: E402

from sae_core.activations import store  # noqa: E402
from sae_core.activations.shards import harvest  # noqa: E402
from sae_core.activations.store import CachedSource  # noqa: E402
from sae_core.activations.token_windows import TokenWindows  # noqa: E402
from sae_core.models.language_model import Hook, LanguageModel  # noqa: E402
from sae_core.train_config import ModelConfig, windows_per_pass  # noqa: E402
from sae_core.utils.code_hash import ROOT  # noqa: E402
from sae_core.workflow.plan_tables import ModelShape, Tables  # noqa: E402

LENGTH = 512
CHUNK = 2**17
"""Activations that are shuffled together here: half as many as otherwise."""
LOADER_CHUNKS = 5
"""The next one is loaded beside the steps on one."""
WINDOWS = 192
"""Of a harvest: six forward passes, the last of which no other one follows."""
REPEATS = 2
TEXT = ROOT / "sae_core/data/raw_data/physics_chapters/chapter_01.md"
NARROW = {"n_heads": 4, "n_kv_heads": 4, "head_dim": 16, "d_mlp": 64, "vocab_size": VOCABULARY}
TINY = ModelShape(n_layers=4, d_model=64, tied=True, **NARROW)
TINY_STEP = Shape(64, 256, 4, 256)
TINY_CHUNK = 2**12


def random_windows(n_tokens: int, length: int) -> TokenWindows:
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (n_tokens,), generator=draw)
    return TokenWindows(tokens, tokens[:0], length, seed=0)


def written(folder: Path, shape: ModelShape, n_layers: int | None = None) -> Path:
    words = tokenizer(TEXT.read_text(encoding="utf-8"))
    return make_random_model(folder, shape, words, n_layers, str(DEVICE))


def random_model(folder: Path, shape: ModelShape, n_layers: int | None = None) -> LanguageModel:
    given = ModelConfig(model_name=str(written(folder, shape, n_layers)), model_dtype="bfloat16")
    return LanguageModel.load(given, DEVICE)


def tokens_per_second(batches: Iterator[Tensor], work: Callable[[Tensor], object]) -> float:
    """Over all batches after the first chunk; the clock starts when the first chunk is done."""
    start, n = 0.0, -store.SHUFFLE_TOKENS
    for batch in batches:
        if n < 0 <= n + len(batch):
            wait()
            start, n = time.perf_counter(), 0
        work(batch)
        n += len(batch)
    wait()
    return n / (time.perf_counter() - start)


def loaders(shapes: dict[str, Shape], scratch: Path) -> Iterator[Row]:
    """(e) The loader by itself, the step on one batch again and again, and the two together, from
    files that the system has just written and so keeps in memory."""
    for name, shape in shapes.items():
        batches = stored_batches(scratch / f"loader {name}", shape)
        same = next(batches())
        n_steps = LOADER_CHUNKS * store.SHUFFLE_TOKENS // shape.tokens
        step = (graph if ON_GPU else eager)(shape, False, False)
        loaded = tokens_per_second(batches(), lambda batch: None)
        alone = tokens_per_second(repeat(same, n_steps), step)
        both = tokens_per_second(batches(), step)
        step.check()
        yield {
            "shape": name, "loader, tokens/s": loaded, "step": alone, "both": both,
            "share of time waiting": max(0.0, 1 - both / alone),
        }  # fmt: skip


def stored_batches(scratch: Path, shape: Shape) -> Callable[[], Iterator[Tensor]]:
    """Batches of one epoch over activations that a model of one narrow block has given."""
    model = random_model(scratch / "model", ModelShape(1, shape.d, tied=True, **NARROW))
    n_tokens = LOADER_CHUNKS * store.SHUFFLE_TOKENS
    windows = random_windows(n_tokens * LENGTH // (LENGTH - 1), LENGTH)
    hook, shard = Hook(0, "hook_resid_post"), scratch / "shard"
    harvest(model, windows, [hook], shard, batch_size="auto")

    def batches() -> Iterator[Tensor]:
        source = CachedSource([shard], hook, tokens_per_step=shape.tokens, seed=0, device=DEVICE)
        return source.train_batches(0)

    return batches


def harvests(shapes: dict[str, ModelShape], n_windows: int, scratch: Path) -> Iterator[Row]:
    """(f) Tokens a second of the blocks up to the middle one, and of harvests with all written."""
    for name, shape in shapes.items():
        middle = shape.n_layers // 2
        folder = scratch / f"harvest {name.replace('/', ' ')}"
        few_words = replace(shape, vocab_size=VOCABULARY)  # no logits here
        model = random_model(folder, few_words, middle + 1)
        windows = random_windows(n_windows * LENGTH, LENGTH)
        layers = (middle,), (0, middle // 2, middle)
        size = windows_per_pass(LENGTH, "auto")
        plain, one, three = rates(model, windows, layers, size, scratch / "harvests", REPEATS)
        yield {
            "model": name, "plain, tokens/s": plain, "one layer": one, "of plain": one / plain,
            "three layers": three, "these of plain": three / plain,
        }  # fmt: skip
        del model
        torch.cuda.empty_cache()


def whole_run(name: str, shape: ModelShape, scratch: Path) -> Iterator[Row]:
    """(g) Seconds and memory of each job of a small configuration, with the end-to-end phase."""
    folder = make_random_model(
        scratch / "model", shape, tokenizer(TEXT.read_text()), None, str(DEVICE)
    )
    project = make_project(scratch / "project", ROOT, folder)
    project.options = ("--cores", "all", "--retries", "0")
    config = project.config
    config["runtime"] = {"device": "cuda" if ON_GPU else "cpu", "batch_size": "auto"}
    config["windows"] = {"max_text_length": 128, "val_fraction": 0.2}
    config["training"] = {"num_epochs": 4, "tokens_per_step": 1024}
    config["end_to_end"] = {"use_end_to_end": True, "end_to_end_fraction": 0.25}
    config["models"][0] |= {"layers": ["middle"], "saes": [{"topk": 32, "sae_expansion": 4}]}
    project.configure(config)
    project.environment["PYTHONPATH"] = str(project.folder)
    start, shown, goes_on = time.perf_counter(), set(), True
    with (scratch / "log").open("w") as log:
        running = project.start(stdout=log)
        while goes_on:
            time.sleep(0.2)
            goes_on = running.poll() is None
            for rule, row in jobs(project.folder / "results/benchmarks").items():
                if rule not in shown:
                    shown.add(rule)
                    yield {"model": name, "job": rule} | row
    total = time.perf_counter() - start
    if running.returncode:
        raise RuntimeError((scratch / "log").read_text())
    [evaluation] = (project.folder / "results/evaluations").glob("*.json")
    fvu = json.loads(evaluation.read_text())["fvu"]
    yield {"model": name, "job": f"all; FVU {fvu:.3g}", "seconds": total, "memory, MB": None}


def jobs(folder: Path) -> dict[str, Row]:
    """What Snakemake has noted of each rule's job that is done, in the order in which they were."""
    found = {}
    for path in sorted(folder.rglob("*.tsv"), key=os.path.getmtime):
        for job in csv.DictReader(path.read_text().splitlines(), delimiter="\t"):
            rule = path.relative_to(folder).parts[0].removesuffix(".tsv")
            found[rule] = {"seconds": float(job["s"]), "memory, MB": job["max_rss"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["loaders", "harvests", "run"], help="one part")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on any machine: a trial")
    options = parser.parse_args()
    if not (options.tiny or ON_GPU):
        print("gpu_path.py: this machine has no NVIDIA GPU, so there is nothing to measure")
        return
    print(describe("transformers", "transformer-lens", "snakemake"))
    known = Tables.load(ROOT / "config/planning.yaml").shapes
    names = ["Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B"]
    shapes = {"tiny": TINY} if options.tiny else {name: known[name] for name in names}
    store.SHUFFLE_TOKENS = TINY_CHUNK if options.tiny else CHUNK
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if options.only in (None, "harvests"):
            table("harvests", harvests(shapes, 4 if options.tiny else WINDOWS, scratch), wrong)
        if options.only in (None, "loaders"):
            steps = {"tiny": TINY_STEP} if options.tiny else {name: SHAPES[name] for name in "AD"}
            table("loaders", loaders(steps, scratch), wrong)
        if options.only in (None, "run"):
            name, shape = next(iter(shapes.items()))
            table("run", whole_run(name, shape, scratch), wrong)
    if wrong:
        sys.exit("a part fails: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
