"""Time of the analysis of features beside a harvest of the same tokens, in turn.

Both run the model up to the same layer. The harvest writes its activations; the analysis encodes
them with a BatchTopK SAE of random directions that is calibrated to k features a token, and keeps
each feature's windows, counts, histogram and partners. The files have a label and the windows of
every active feature.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import deque
from itertools import pairwise
from pathlib import Path

import torch
from demo_model import demo_model, read_chapters
from machine import describe

from sae_core.activations.shards import harvest
from sae_core.activations.token_windows import read_windows
from sae_core.corpus.corpora import json_list
from sae_core.corpus.token_file import TokenFile
from sae_core.corpus.tokenise import tokenise
from sae_core.evaluation.feature_files import Writer
from sae_core.evaluation.features import Corpus, feature_table, tally_features
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.sae.config import SAEConfig
from sae_core.sae.kinds import build
from sae_core.sae.precision import pick_precision
from sae_core.sae_base import SparseAutoencoder
from sae_core.settings.steps import FeaturesConfig
from sae_core.train_config import DataConfig
from sae_core.trainer.training_inputs import sae_spec

BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chapters", type=Path, default=Path("sae_core/data/raw_data"))
    parser.add_argument("--layer", type=int, default=9)
    parser.add_argument("--length", type=int, default=128, help="tokens in a window")
    parser.add_argument("--windows", type=int, default=224, help="windows a measurement")
    parser.add_argument("--expansion", type=int, default=8)
    parser.add_argument("--topk", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu", action="store_true", help="CPU seconds, for a machine with others")
    options = parser.parse_args()
    print(f"Analysis of features ({describe('transformers')})\n")
    columns = ("features", "k", "tokens", "harvest", "pass", "tables", "files")
    print("| " + " | ".join((*columns, "pass / harvest", "all / harvest")) + " |")
    print("|--:" * 9 + "|")
    with tempfile.TemporaryDirectory() as folder:
        print(row(Path(folder), options))


def row(scratch: Path, options: argparse.Namespace) -> str:
    texts, model = read_chapters(options.chapters, scratch), demo_model()
    hook = Hook(options.layer, "hook_resid_post")
    sae = random_sae(model, hook, texts, options)
    tokenise(json_list(scratch / "texts.json", "--chapters"), model.tokenizer, scratch / "tokens")
    corpus = Corpus.read(TokenFile.open(scratch / "tokens"), sae.spec, options.windows)
    same = read_windows(model.tokenizer, texts, DataConfig(options.length, 0.0, 0))
    same.n_train = len(corpus.windows.tokens)
    taken: dict[str, list[float]] = {name: [] for name in ("harvest", "pass", "tables", "files")}
    clock = time.process_time if options.cpu else time.perf_counter
    for _ in range(options.repeats + 1):
        start = clock()
        harvest(model, same, [hook], scratch / "shard", batch_size=BATCH)
        harvested = clock()
        precision = pick_precision("float32", model.device)
        tallies = tally_features(model, sae, corpus, FeaturesConfig(), BATCH, precision)
        [tally] = deque(tallies, maxlen=1)
        passed = clock()
        table = feature_table(sae, tally)
        tabled = clock()
        writer = Writer(model, sae, corpus, table)
        for entry in writer.entries(writer.telling_order()):
            json.dumps(entry, ensure_ascii=False)
        times = (start, harvested, passed, tabled, clock())
        for name, (before, after) in zip(taken, pairwise(times), strict=True):
            taken[name].append(after - before)
    median = {name: statistics.median(times[1:]) for name, times in taken.items()}
    shown = " | ".join(f"{seconds:.2f} s" for seconds in median.values())
    ratio = median["pass"] / median["harvest"]
    whole = (sum(median.values()) - median["harvest"]) / median["harvest"]
    k = float(tally.count.sum()) / tally.n_tokens
    tokens = corpus.windows.tokens.numel()
    return f"| {sae.spec.d_sae} | {k:.0f} | {tokens} | {shown} | {ratio:.2f} | {whole:.2f} |"


def random_sae(
    model: LanguageModel, hook: Hook, texts: list[str], options: argparse.Namespace
) -> SparseAutoencoder:
    config = SAEConfig(topk=options.topk, sae_expansion=options.expansion)
    metadata = {"max_text_length": options.length}
    sae = build(sae_spec(config, hook, model.d_model, model.device, metadata))
    sae.initialise(torch.Generator().manual_seed(0))
    windows = read_windows(model.tokenizer, texts, DataConfig(options.length, 0.0, 0))
    sample = model.activations(windows.train(0, torch.arange(16)), [hook])[hook][:, 1:]
    x = sample.flatten(0, 1).float()
    sae.b_dec.data.copy_(x.mean(0))
    sae.calibrate([x])
    return sae.requires_grad_(False)


if __name__ == "__main__":
    main()
