"""From texts to windows, at several sizes of a synthetic corpus: seconds of the processor, beside the
tokenizer library's own batched call, and the most memory that the processes take.

The texts are words of the sample chapters, as often as there, with one in twenty made up of random
letters, as JSON lines. Each measurement is a process of its own: `library` gives batches that were
read before to the tokenizer, `tokenise` makes the token files, and `windows` splits them, counts what
the two sides share, and reads one epoch of windows in random order.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import torch
from demo_model import ROOT, demo_record
from machine import describe

from sae_core.activations.store import SHUFFLE_TOKENS
from sae_core.activations.token_windows import corpus_notes, token_windows
from sae_core.corpus.corpora import read_corpus
from sae_core.corpus.token_file import TokenFile
from sae_core.corpus.tokenise import BATCH_TEXTS, tokenise
from sae_core.models.loading import load_tokenizer
from sae_core.train_config import CorpusConfig, DataConfig, ModelConfig

TEXT_WORDS = 200
"""Words of a text, on average."""

TOKENS_PER_WORD = 1.9
"""About; the table has the tokens that there are."""

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WATCH = 0.05
"""Seconds between two looks at the memory."""


def write_corpus(path: Path, n_tokens: int) -> None:
    """Texts of about so many tokens together, the same every time."""
    draw = random.Random(0)
    chapters = sorted((ROOT / "sae_core/data/raw_data").glob("*/*.md"))
    words = " ".join(chapter.read_text(encoding="utf-8") for chapter in chapters).split()
    left = int(n_tokens / TOKENS_PER_WORD)
    with path.open("w", encoding="utf-8") as file:
        while left > 0:
            text = draw.choices(words, k=draw.randrange(1, 2 * TEXT_WORDS))
            for at in range(draw.randrange(20), len(text), 20):
                text[at] = "".join(draw.choices(LETTERS, k=draw.randrange(3, 12)))
            left -= len(text)
            file.write(json.dumps({"text": " ".join(text)}) + "\n")


def library(folder: Path, processes: int) -> dict[str, float]:
    """The tokenizer's own call for batches, which has threads of its own; reading does not count."""
    tokenizer = loaded().backend_tokenizer
    seconds, n_tokens = 0.0, 0
    with (folder / "texts.jsonl").open(encoding="utf-8") as file:
        while batch := [json.loads(line)["text"] for line in islice(file, BATCH_TEXTS)]:
            start = time.process_time()
            encoded = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            n_tokens += sum(len(one.ids) for one in encoded)
            seconds += time.process_time() - start
    return {"seconds": seconds, "tokens": n_tokens}


def tokens(folder: Path, processes: int) -> dict[str, float]:
    """The token files, as a job of the workflow makes them."""
    corpus = read_corpus(CorpusConfig(data_path=folder / "texts.jsonl"))
    manifest = tokenise(corpus, loaded(), folder / "tokens", processes)
    return {"tokens": manifest.n_tokens}


def windows(folder: Path, processes: int) -> dict[str, float]:
    """One epoch of windows, and what a log says of the texts."""
    data = DataConfig()
    file = TokenFile.open(folder / "tokens")
    corpus_notes(file, data)
    found = token_windows(file, loaded(), data)
    order = torch.randperm(found.n_train, generator=torch.Generator().manual_seed(0))
    for some in order.split(-(-SHUFFLE_TOKENS // found.positions)):
        found.train(0, some)
    return {"tokens": found.n_train * found.length}


PARTS = {"library": library, "tokenise": tokens, "windows": windows}


def loaded() -> Any:
    return load_tokenizer(ModelConfig(model_name=demo_record().path))


def part(name: str, folder: Path, processes: int) -> None:
    """One measurement, in a process of its own: figures as JSON on standard output."""
    loaded()  # what is imported and read for the tokenizer does not count
    before = spent()
    found = PARTS[name](folder, processes)
    print(json.dumps({"seconds": spent() - before} | found))


def spent() -> float:
    """Seconds of the processor that this process and those that it waited for have had."""
    both = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


class Memory(threading.Thread):
    """The most megabytes of a process and those that it started. What several share counts once, and
    files that are mapped do not count: the kernel drops them when memory is short."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.most = pid, 0.0
        self.start()

    def run(self) -> None:
        while sizes := list(self._own()):
            self.most = max(self.most, sum(sizes) / 1000)
            time.sleep(WATCH)

    def _own(self) -> Iterator[int]:
        try:
            process = psutil.Process(self.pid)
            pids = [self.pid, *(child.pid for child in process.children(recursive=True))]
        except psutil.NoSuchProcess:
            return
        for pid in pids:
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            except OSError:  # it has ended
                continue
            yield from (int(line.split()[1]) for line in lines if line.startswith("Pss_Anon"))


def measured(name: str, folder: Path, processes: int) -> dict[str, float]:
    """The figures of one part, with its memory."""
    command = [sys.executable, __file__, "--part", name, "--folder", str(folder)]
    command += ["--processes", str(processes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        memory = Memory(process.pid)
        printed, _ = process.communicate()
    if process.returncode:
        raise SystemExit(process.returncode)
    return json.loads(printed.splitlines()[-1]) | {"memory": memory.most}


def row(n_tokens: int, processes: int) -> str:
    """All parts at one size."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_corpus(folder / "texts.jsonl", n_tokens)
        found = {name: measured(name, folder, processes) for name in PARTS}
    own, theirs, rest = (found[name]["seconds"] for name in ("tokenise", "library", "windows"))
    cells = [
        f"{found['tokenise']['tokens']:,}",
        *(f"{seconds:.1f}" for seconds in (theirs, own)),
        f"{theirs / own:.2f}",
        f"{rest:.2f}",
        f"{100 * rest / own:.1f}%",
        *(f"{found[name]['memory']:.0f}" for name in ("tokenise", "windows")),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=float, nargs="+", default=(1e6, 1e7))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        part(options.part, options.folder, options.processes)
        return
    print(f"Texts to windows, seconds of the processor ({describe('tokenizers')})\n")
    print(
        "| tokens | library | tokenise | speed, × | windows | over tokenise "
        "| MB, tokenise | MB, windows |\n|--:|--:|--:|--:|--:|--:|--:|--:|"
    )
    for n_tokens in options.tokens:
        print(row(int(n_tokens), options.processes), flush=True)


if __name__ == "__main__":
    main()
