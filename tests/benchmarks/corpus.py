"""From texts to windows, at several sizes of a synthetic corpus: seconds of the processor, and the
most memory that the processes take.

The texts are words of the sample chapters, as often as there, with one in twenty made up of random
letters, as JSON lines. Each part is a process of its own:

    library   the tokenizer library's own call for batches of texts that have been read
    tokenise  the token files, as the workflow makes them, reading and writing included
    windows   the split, and an epoch of windows in random order
    repeated  what the log says of the texts: how much of the held-out ones occurs in the others
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
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from sae_core.models.loading import load_tokenizer
from sae_core.settings.texts import CorpusConfig
from sae_core.train_config import DataConfig, ModelConfig

ROOT = Path(__file__).resolve().parents[2]

TEXT_WORDS = 200
"""Words of a text, on average."""

TOKENS_PER_WORD = 1.57
"""About; the table has the tokens that there are."""

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WATCH = 0.2
"""Seconds between two looks at the memory."""

Work = Callable[[], int]
"""What is measured; gives the number of tokens."""


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


def library(folder: Path, tokenizer: Any, processes: int) -> Work:
    from sae_core.corpus.tokenise import BATCH_TEXTS

    with (folder / "texts.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    read = iter(texts)

    def work() -> int:
        n_tokens = 0
        while batch := [*islice(read, BATCH_TEXTS)]:
            found = tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            n_tokens += sum(len(one.ids) for one in found)
        return n_tokens

    return work


def tokenise(folder: Path, tokenizer: Any, processes: int) -> Work:
    from sae_core.corpus.corpora import read_corpus
    from sae_core.corpus.tokenise import tokenise

    config = CorpusConfig(data_path=folder / "texts.jsonl")
    return lambda: tokenise(read_corpus(config), tokenizer, folder / "tokens", processes).n_tokens


def windows(folder: Path, tokenizer: Any, processes: int) -> Work:
    import torch

    from sae_core.activations.store import SHUFFLE_TOKENS
    from sae_core.activations.token_windows import token_windows
    from sae_core.corpus.token_file import TokenFile

    def work() -> int:
        found = token_windows(TokenFile.open(folder / "tokens"), tokenizer, DataConfig())
        order = torch.randperm(found.n_train, generator=torch.Generator().manual_seed(0))
        return sum(
            found.train(0, some).numel()
            for some in order.split(-(-SHUFFLE_TOKENS // found.positions))
        )

    return work


def repeated(folder: Path, tokenizer: Any, processes: int) -> Work:
    from sae_core.corpus.split import Split
    from sae_core.corpus.token_file import TokenFile

    data = DataConfig()

    def work() -> int:
        file = TokenFile.open(folder / "tokens")
        Split(file, data.val_fraction, data.seed).repeated()
        return len(file.tokens)

    return work


PARTS = {part.__name__: part for part in (library, tokenise, windows, repeated)}


def measure(name: str, folder: Path, model: str, processes: int) -> None:
    """One part, in a process of its own: its figures as JSON on standard output."""
    tokenizer = load_tokenizer(ModelConfig(model_name=model))
    work = PARTS[name](folder, tokenizer, processes)
    start = spent()
    n_tokens = work()
    print(json.dumps({"seconds": spent() - start, "tokens": n_tokens}))


def spent() -> float:
    """Seconds of the processor that this process and those that it waited for have had."""
    both = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


class Memory(threading.Thread):
    """The most megabytes of a process and those that it started. What several share counts once.
    Files that are mapped do not count: the kernel drops them when memory is short."""

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
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            for pid in (self.pid, *children):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                yield from (int(line.split()[1]) for line in lines if line.startswith("Pss_Anon"))
        except OSError:  # one of them has ended
            return


def row(n_tokens: int, model: str, processes: int) -> str:
    """All parts at one size."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder, "texts.jsonl"), n_tokens)
        for name in PARTS:
            command = [sys.executable, __file__, "--part", name, "--folder", folder]
            command += ["--model", model, "--processes", str(processes)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                memory = Memory(process.pid)
                printed, _ = process.communicate()
            if process.returncode:
                raise SystemExit(process.returncode)
            found[name] = json.loads(printed.splitlines()[-1]) | {"memory": memory.most}
    seconds = {name: figures["seconds"] for name, figures in found.items()}
    own = seconds["tokenise"]
    cells = [
        f"{found['tokenise']['tokens']:,}",
        *(f"{seconds[name]:.1f}" for name in PARTS),
        f"{seconds['library'] / own:.2f}",
        *(f"{100 * seconds[name] / own:.1f}%" for name in ("windows", "repeated")),
        *(f"{found[name]['memory']:.0f}" for name in ("tokenise", "windows", "repeated")),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=float, nargs="+", default=(1e6, 1e7))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--model", help="a directory with a tokenizer, in place of SmolLM2-135M's")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        measure(options.part, options.folder, options.model, options.processes)
        return
    from demo_model import demo_record
    from machine import describe

    print(f"Texts to windows, seconds of the processor ({describe('tokenizers')})\n")
    names = [*PARTS, "speed, ×", "windows, +", "repeated, +"]
    names += [f"MB, {name}" for name in ("tokenise", "windows", "repeated")]
    print(f"| tokens | {' | '.join(names)} |\n|{'--:|' * (len(names) + 1)}")
    for n_tokens in options.tokens:
        model = options.model or demo_record().path
        print(row(int(n_tokens), model, options.processes), flush=True)


if __name__ == "__main__":
    main()
